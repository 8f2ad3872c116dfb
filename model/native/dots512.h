// `dots` of AVX-512 with VNNI: what body.h needs beside `product`, for avx512.cpp and amx.cpp.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace seq2serve {
namespace {

// The sum of each of four registers.
inline __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all),
                                        _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <int ROWS>
void dots_of(const uint8_t* a, size_t stride, const int8_t* const* w, int depth, int32_t* c) {
  for (int first = 0; first < 64; first += 4) {
    __m512i sums[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < 4; ++i) sums[r][i] = _mm512_setzero_si512();
    for (int k = 0; k < depth; k += 64) {
      __m512i weights[4];
      for (int i = 0; i < 4; ++i) {
        weights[i] = _mm512_loadu_si512(w[first + i] + k);
        _mm_prefetch(reinterpret_cast<const char*>(w[(first + 4 + i) & 63] + k), _MM_HINT_T0);
      }
      for (int r = 0; r < ROWS; ++r) {
        const __m512i inputs = _mm512_loadu_si512(a + r * stride + k);
        for (int i = 0; i < 4; ++i)
          sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], inputs, weights[i]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(c + r * 64 + first),
                       sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
  }
}

constexpr int BESIDE = 5;  // rows that `dots` takes at once: a beam of the usual width

void dots(const uint8_t* a, size_t stride, int rows, const int8_t* const* w, int depth,
          int32_t* c) {
  static constexpr decltype(&dots_of<1>) of[BESIDE] = {dots_of<1>, dots_of<2>, dots_of<3>,
                                                       dots_of<4>, dots_of<5>};
  of[rows - 1](a, stride, w, depth, c);
}

}  // namespace
}  // namespace seq2serve
