// Attention of one query; the float32 and the int8 models differ in how a product is added to a sum.
#pragma once
#include <cstddef>
#include <limits>

#include "vector.h"

namespace {

// Scores are v . tanh(query + key), or query . key where v is null; see `attend` of float32.h.
// `added(a, b, c)` is a * b + c.
template <typename Added>
inline void attended(const float* query, const float* keys, const float* values, const bool* mask,
                     const float* v, int n, int heads, int size, float* scratch, float* context,
                     float* weights, const Added& added) {
  const int width = heads * size;
  for (int s = 0; s < n; ++s) weights[s] = 0.0f;
  for (int head = 0; head < heads; ++head) {
    const int at = head * size;
    float maximum = -std::numeric_limits<float>::infinity();
    for (int s = 0; s < n; ++s) {
      if (!mask[s]) continue;
      const float* key = keys + (size_t)s * width + at;
      Floats dot = Floats{};
      for (int i = 0; i < size; i += LANES) {
        const Floats q = load(query + at + i, size - i), k = load(key + i, size - i);
        dot = added(v == nullptr ? q : tangent(q + k),
                    v == nullptr ? k : load(v + at + i, size - i), dot);
      }
      scratch[s] = sum(dot);
      maximum = scratch[s] > maximum ? scratch[s] : maximum;
    }
    Floats total = Floats{};
    for (int s = 0; s < n; s += LANES) {
      Floats e = exponential(load(scratch + s, n - s) - maximum);
      for (int i = 0; i < LANES; ++i) e[i] = s + i < n && mask[s + i] ? e[i] : 0.0f;
      store(scratch + s, e, n - s);
      total += e;
    }
    const float share = 1.0f / sum(total);
    for (int s = 0; s < n; ++s) {
      scratch[s] *= share;
      weights[s] += scratch[s] / heads;
    }
    for (int i = 0; i < size; i += LANES) {
      Floats mixed = Floats{};
      for (int s = 0; s < n; ++s)
        if (mask[s])
          mixed = added(Floats{} + scratch[s],
                        load(values + (size_t)s * width + at + i, size - i), mixed);
      store(context + at + i, mixed, size - i);
    }
  }
}

}  // namespace
