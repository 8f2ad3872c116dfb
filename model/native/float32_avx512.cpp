// float32 with AVX-512.
#include <immintrin.h>

#include <cstddef>

#include "vector.h"

namespace seq2serve {
namespace {

// Of six rows 24 of the 32 registers hold sums, 4 hold weights.
template <int ROWS>
void product_of(const float* x, size_t stride, const float* w, int depth, size_t ahead, float* c) {
  __m512 sums[ROWS][4];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < 4; ++p) sums[r][p] = _mm512_setzero_ps();
  for (int k = 0; k < depth; ++k, w += 64) {
    __m512 weights[4];
    for (int p = 0; p < 4; ++p) {
      weights[p] = _mm512_loadu_ps(w + p * 16);
      _mm_prefetch(reinterpret_cast<const char*>(w + ahead + p * 16), _MM_HINT_T0);
    }
    for (int r = 0; r < ROWS; ++r) {
      const __m512 input = _mm512_set1_ps(x[r * stride + k]);
      for (int p = 0; p < 4; ++p) sums[r][p] = _mm512_fmadd_ps(input, weights[p], sums[r][p]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < 4; ++p) _mm512_storeu_ps(c + r * 64 + p * 16, sums[r][p]);
}

inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

}  // namespace
}  // namespace seq2serve

#include "float32_body.h"

const seq2serve::FloatKernels seq2serve::float_avx512 = {"avx512", linear, cell, attend};
