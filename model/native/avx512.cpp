// AVX-512 with VNNI: Cascade Lake, Zen 4 and later.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace seq2serve {
namespace {

constexpr int BLOCK = 6;  // 24 of the 32 registers hold sums, 4 hold weights

template <int ROWS>
void product_of(const uint8_t* a, size_t stride, const int8_t* w, int depth, int32_t* c) {
  __m512i sums[ROWS][4];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < 4; ++p) sums[r][p] = _mm512_setzero_si512();
  for (int k = 0; k < depth; k += 4, w += 256) {
    __m512i weights[4];
    for (int p = 0; p < 4; ++p) weights[p] = _mm512_loadu_si512(w + p * 64);
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a + r * stride + k, 4);
      const __m512i inputs = _mm512_set1_epi32(four);
      for (int p = 0; p < 4; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], inputs, weights[p]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < 4; ++p) _mm512_storeu_si512(c + r * 64 + p * 16, sums[r][p]);
}

void product(const uint8_t* a, size_t stride, int rows, const int8_t* w, int depth, int32_t* c) {
  static constexpr decltype(&product_of<1>) of[BLOCK] = {
      product_of<1>, product_of<2>, product_of<3>, product_of<4>, product_of<5>, product_of<6>};
  of[rows - 1](a, stride, w, depth, c);
}

}  // namespace
}  // namespace seq2serve

#include "dots512.h"

#include "body.h"

const seq2serve::Kernels seq2serve::avx512 = {"avx512", quantise, cell,       linear,
                                              best,     listed,   normaliser, attend};
