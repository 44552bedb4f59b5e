// Whole arrays: packing, rows over threads, steps in turn.
#pragma once

#include <cstddef>

#include "plan.h"

namespace wsss {

// Which instruction set a call uses: "auto" takes the best that this processor has; an unknown or missing one is nullptr.
template <class S, class T = S>
const Kernels<S, T>* kernels_named(const char* name);
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

// Affinity and `iterations` steps, weights and masks in the kernels' own layout throughout. With Compact storage `unary` is
// null; false, and nothing of use in `out`, where the masks or the guide (NaN, infinity) do not fit it.
template <class S, class T>
bool refine(const Plan&, const Kernels<S, T>&, Shape, const S* masks, const S* guide, const S* unary, double compatibility,
            int iterations, S* out, int threads);

// By how much `iterations` steps can raise the largest value of masks, at least 1.
double most_growth(const Plan&, int iterations);

// Whether Compact storage can hold weights and masks: weights nowhere negative, and so few steps, which raise masks by so
// little, that rounding stays below 1e-3.
bool fits_compact(const Plan&, int iterations);

}  // namespace wsss
