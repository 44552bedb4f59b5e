// The operator's guide from an image's bytes, as guides.py makes it: whole sums times one constant.
//
// cuda_guide.py writes WSSS_OPPONENT (0: rgb, 1: opponent colours). One thread a pixel.

extern "C" __global__ void wsss_pairwise_guide(const unsigned char* image, int batch, int height, int width,
                                               float* guide) {
  const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  const long long plane = (long long)height * width;
  if (index >= batch * plane) return;
  const unsigned char* pixel = image + 3 * index;
  float* out = guide + 3 * plane * (index / plane) + index % plane;
  const int red = pixel[0], green = pixel[1], blue = pixel[2];
  // The constants are rounded from double, as numpy rounds them: the guide has to be the same bit by bit.
#if WSSS_OPPONENT
  out[0] = float(red + green + blue) * float(1.0 / 765.0);
  out[plane] = float(red - green) * float(1.0 / 255.0);
  out[2 * plane] = float(red + green - 2 * blue) * float(1.0 / 510.0);
#else
  out[0] = float(red) * float(1.0 / 255.0);
  out[plane] = float(green) * float(1.0 / 255.0);
  out[2 * plane] = float(blue) * float(1.0 / 255.0);
#endif
}
