// float32 with AVX2 and FMA.
#include <immintrin.h>

#include <cstddef>
#include <cstring>

#include "vector.h"

namespace seq2serve {
namespace {

// COUNT of the eight registers of a group's columns, from column `w` on. Of six rows 12 of the 16
// registers hold sums, 2 hold weights.
template <int ROWS, int COUNT>
void columns_of(const float* x, size_t stride, const float* w, int depth, size_t ahead, float* c) {
  __m256 sums[ROWS][COUNT];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < COUNT; ++p) sums[r][p] = _mm256_setzero_ps();
  for (int k = 0; k < depth; ++k, w += 64) {
    __m256 weights[COUNT];
    for (int p = 0; p < COUNT; ++p) {
      weights[p] = _mm256_loadu_ps(w + p * 8);
      if (p % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(w + ahead + p * 8), _MM_HINT_T0);
    }
    for (int r = 0; r < ROWS; ++r) {
      const __m256 input = _mm256_broadcast_ss(x + r * stride + k);
      for (int p = 0; p < COUNT; ++p) sums[r][p] = _mm256_fmadd_ps(input, weights[p], sums[r][p]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < COUNT; ++p) _mm256_storeu_ps(c + r * 64 + p * 8, sums[r][p]);
}

template <int ROWS>
void product_of(const float* x, size_t stride, const float* w, int depth, size_t ahead, float* c) {
  constexpr int COUNT = ROWS == 1 ? 8 : 2;  // one row reads weights in one pass
  for (int p = 0; p < 8; p += COUNT)
    columns_of<ROWS, COUNT>(x, stride, w + p * 8, depth, ahead, c + p * 8);
}

inline Floats fused(Floats a, Floats b, Floats c) {
  __m256 parts[3][2];
  std::memcpy(parts[0], &a, sizeof a);
  std::memcpy(parts[1], &b, sizeof b);
  std::memcpy(parts[2], &c, sizeof c);
  for (int i = 0; i < 2; ++i) parts[2][i] = _mm256_fmadd_ps(parts[0][i], parts[1][i], parts[2][i]);
  std::memcpy(&c, parts[2], sizeof c);
  return c;
}

}  // namespace
}  // namespace seq2serve

#include "float32_body.h"

const seq2serve::FloatKernels seq2serve::float_avx2 = {"avx2", linear, cell, attend};
