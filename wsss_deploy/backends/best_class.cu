// The class of the highest score at every pixel of an image, whose scores are there at another size.
//
// Pillow's bilinear filter, as upsampling.py has it: a triangle around the pixel's centre, one small pixel wide on
// each side, or as wide as the pixel where scores are reduced. Its weights are not divided by their sum, which is one
// for all classes. One thread a pixel.

struct Taps {
  int first, count;
  float offset, narrow;  // of the first tap from the centre; the inverse of the triangle's half width
};

static __device__ Taps taps(int position, int small, int large) {
  // In double: coordinates of large images in float would move the taps.
  const double step = double(small) / large;
  const double half = step > 1 ? step : 1;
  const double centre = (position + 0.5) * step;
  Taps found;
  found.first = int(centre - half + 0.5);
  if (found.first < 0) found.first = 0;
  int end = int(centre + half + 0.5);
  if (end > small) end = small;
  found.count = end - found.first;
  found.offset = float(found.first + 0.5 - centre);
  found.narrow = float(1 / half);
  return found;
}

static __device__ float weight(const Taps& along, int tap) {
  const float distance = along.offset + tap;
  const float left = 1 - (distance < 0 ? -distance : distance) * along.narrow;
  return left > 0 ? left : 0;
}

// 255 where a score is not finite: no class has that number.
extern "C" __global__ void wsss_best_class(const float* scores, int batch, int channels, int height, int width,
                                           int rows, int columns, unsigned char* mask) {
  const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  const long long pixels = (long long)rows * columns, plane = (long long)height * width;
  if (index >= batch * pixels) return;
  const Taps down = taps(int(index % pixels / columns), height, rows);
  const Taps along = taps(int(index % columns), width, columns);
  const float* channel = scores + index / pixels * channels * plane + (long long)down.first * width + along.first;
  float best = 0;
  int found = 0;
  bool finite = true;
  // Enlarging has two taps at most each way, whose weights stay in registers.
  const bool enlarged = height <= rows && width <= columns;
  const int right = along.count > 1, below = down.count > 1 ? width : 0;
  const float upper = weight(down, 0), lower = below ? weight(down, 1) : 0;
  const float near = weight(along, 0), far = right ? weight(along, 1) : 0;
  for (int c = 0; c < channels; ++c, channel += plane) {
    float score = 0;
    if (enlarged) {
      score = upper * (near * channel[0] + far * channel[right]) +
              lower * (near * channel[below] + far * channel[below + right]);
    } else {
      for (int i = 0; i < down.count; ++i) {
        float line = 0;
        for (int j = 0; j < along.count; ++j) line += weight(along, j) * channel[(long long)i * width + j];
        score += weight(down, i) * line;
      }
    }
    finite = finite && score - score == 0;
    if (c == 0 || score > best) {
      best = score;
      found = c;
    }
  }
  mask[index] = (unsigned char)(finite ? found : 255);
}
