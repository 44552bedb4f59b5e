// Whole arrays: packing, rows over threads, steps in turn.
#pragma once

#include <cstddef>

#include "plan.h"

namespace wsss {

// Which instruction set a call uses: "auto" takes the best that this processor has; an unknown or missing one is nullptr.
template <class S>
const Kernels<S>* kernels_named(const char* name);
const char* best_instruction_set();

struct Shape {
  int batch, channels, guide_channels, height, width;
};

// All arrays are contiguous, (N, channels, H, W) with the channels of Shape (K for weights).
template <class S>
void affinity(const Plan&, const Kernels<S>&, Shape, const S* guide, S* weights, int threads);

// `unary` may be null: the plain sum. Otherwise softmax(unary + compatibility * sum).
template <class S>
void step(const Plan&, const Kernels<S>&, Shape, const S* masks, const S* weights, const S* unary, double compatibility,
          S* out, int threads);

// Affinity and `iterations` steps, weights and masks in the kernels' own layout throughout.
template <class S>
void refine(const Plan&, const Kernels<S>&, Shape, const S* masks, const S* guide, const S* unary, double compatibility,
            int iterations, S* out, int threads);

}  // namespace wsss
