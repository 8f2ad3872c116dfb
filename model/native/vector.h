// Sixteen floats at a time, in the compiler's own vector types: AVX2 takes them as two registers,
// AVX-512 as one, and both give the same bits. (Built with -ffp-contract=off: no product is merged
// into a sum on one processor and not on another.)
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Ints load(const int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// The first n of 16; the rest is `rest`, or is not written.
inline Floats load(const float* p, int n, float rest = 0.0f) {
  if (n >= LANES) return load(p);
  Floats v = Floats{} + rest;
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

inline void store(float* p, Floats v, int n) {
  if (n >= LANES) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

inline Floats of(Ints v) { return __builtin_convertvector(v, Floats); }
inline Ints bits(Floats v) { return (Ints)v; }
// Of two that do not compare, the second: where it is the NaN of an argument, it goes on.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats within(float bound, Floats x) {
  return larger(Floats{} - bound, smaller(Floats{} + bound, x));
}

typedef float Halves __attribute__((vector_size(32)));
typedef float Quarters __attribute__((vector_size(16)));

template <typename Part, typename Whole>
inline Part half(const Whole& v, int which) {
  Part part;
  std::memcpy(&part, reinterpret_cast<const char*>(&v) + which * sizeof part, sizeof part);
  return part;
}

// Sums always pair the same lanes, whatever the processor.
inline float sum(Floats v) {
  const Halves a = half<Halves>(v, 0) + half<Halves>(v, 1);
  const Quarters b = half<Quarters>(a, 0) + half<Quarters>(a, 1);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

inline float greatest(Floats v) {
  const Halves x = half<Halves>(v, 0), y = half<Halves>(v, 1);
  const Halves a = x > y ? x : y;
  const Quarters z = half<Quarters>(a, 0), u = half<Quarters>(a, 1);
  const Quarters b = z > u ? z : u;
  const float c = b[0] > b[2] ? b[0] : b[2], d = b[1] > b[3] ? b[1] : b[3];
  return c > d ? c : d;
}

// 2^23 * 1.5: adding it to a float below 2^22 rounds that to the nearest integer, halves to even,
// which is then in the low bits.
constexpr float ROUNDING = 12582912.0f;
constexpr float LEAST = 1e-30f;  // what is smaller counts as zero, as 127 over it need not be finite

// e^x for |x| <= 87 (beyond, that of the bound), within 2 units in the last place: x = n ln 2 + r,
// the Cephes polynomial of r, and n put into the exponent.
inline Floats exponential(Floats x) {
  x = within(87.0f, x);
  const Floats shifted = x * 1.44269504f + ROUNDING;
  const Floats n = shifted - ROUNDING;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints scale = (bits(shifted) - 0x4B400000 + 127) << 23;
  return p * (Floats)scale;
}

// e^-x with |x| cut to 40, where sigmoid and tanh are flat: products of two stay finite.
inline Floats decay(Floats x) {
  return exponential(within(40.0f, -x));
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + decay(x)); }

inline Floats tangent(Floats x) {
  const Floats e = decay(x + x);
  return (1.0f - e) / (1.0f + e);
}

// sigmoid(x) * tanh(y), with one division.
inline Floats gated(Floats x, Floats y) {
  const Floats e = decay(y + y);
  return (1.0f - e) / ((1.0f + decay(x)) * (1.0f + e));
}

}  // namespace
