// AVX2: every x86 server of the last ten years.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace seq2serve {
namespace {

constexpr int BLOCK = 2;  // 8 of the 16 registers hold sums, 4 hold weights

// Bytes are widened to 16 bits: the product of bytes (vpmaddubsw) would cut sums off at 2^15.
template <int ROWS>
void product_of(const uint8_t* a, size_t stride, const int8_t* w, int depth, int32_t* c) {
  for (int p = 0; p < 4; ++p) {
    __m256i sums[ROWS][4];  // of four channels each, two halves a channel
    for (int r = 0; r < ROWS; ++r)
      for (int q = 0; q < 4; ++q) sums[r][q] = _mm256_setzero_si256();
    const int8_t* panel = w + p * 64;
    for (int k = 0; k < depth; k += 4, panel += 256) {
      __m256i weights[4];
      for (int q = 0; q < 4; ++q)
        weights[q] = _mm256_cvtepi8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + q * 16)));
      for (int r = 0; r < ROWS; ++r) {
        int32_t four;
        __builtin_memcpy(&four, a + r * stride + k, 4);
        const __m256i inputs = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
        for (int q = 0; q < 4; ++q)
          sums[r][q] = _mm256_add_epi32(sums[r][q], _mm256_madd_epi16(inputs, weights[q]));
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int half = 0; half < 2; ++half) {
        const __m256i mixed = _mm256_hadd_epi32(sums[r][2 * half], sums[r][2 * half + 1]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * 64 + p * 16 + half * 8),
                            _mm256_permute4x64_epi64(mixed, 0b11011000));
      }
  }
}

void product(const uint8_t* a, size_t stride, int rows, const int8_t* w, int depth, int32_t* c) {
  if (rows == 1)
    product_of<1>(a, stride, w, depth, c);
  else
    product_of<2>(a, stride, w, depth, c);
}

constexpr int BESIDE = 2;

template <int ROWS>
void dots_of(const uint8_t* a, size_t stride, const int8_t* const* w, int depth, int32_t* c) {
  for (int first = 0; first < 64; first += 4) {
    __m256i sums[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < 4; ++i) sums[r][i] = _mm256_setzero_si256();
    for (int k = 0; k < depth; k += 16) {
      __m256i weights[4];
      for (int i = 0; i < 4; ++i)
        weights[i] = _mm256_cvtepi8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(w[first + i] + k)));
      for (int r = 0; r < ROWS; ++r) {
        const __m256i inputs = _mm256_cvtepu8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + r * stride + k)));
        for (int i = 0; i < 4; ++i)
          sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(inputs, weights[i]));
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[r][0], sums[r][1]),
                                              _mm256_hadd_epi32(sums[r][2], sums[r][3]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(c + r * 64 + first),
                       _mm_add_epi32(_mm256_castsi256_si128(pairs),
                                     _mm256_extracti128_si256(pairs, 1)));
    }
  }
}

void dots(const uint8_t* a, size_t stride, int rows, const int8_t* const* w, int depth,
          int32_t* c) {
  if (rows == 1)
    dots_of<1>(a, stride, w, depth, c);
  else
    dots_of<2>(a, stride, w, depth, c);
}

}  // namespace
}  // namespace seq2serve

#include "body.h"

const seq2serve::Kernels seq2serve::avx2 = {"avx2", quantise, cell,       linear,
                                            best,   listed,   normaliser, attend};
