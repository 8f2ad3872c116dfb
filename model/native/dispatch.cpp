// Which kernels this processor has. AMX must be asked for of the system, and what the fastest
// kernels give is compared with AVX2's before they are used.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "kernels.h"

namespace seq2serve {
namespace {

bool allowed_amx() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, ...)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, bytes = d >> 25 & 1;
  return tiles && bytes && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// A product of every number of rows that a block can have, with an output of any width.
bool agrees(const Kernels& one, const Kernels& other) {
  constexpr int ROWS = 19, INPUTS = 70, STORED = 128, SIZE = 50;
  std::vector<int8_t> packed(WIDTH * STORED);
  std::vector<int32_t> compensation(WIDTH);
  std::vector<float> x(ROWS * INPUTS), scale(WIDTH, 0.01f), bias(WIDTH, 0.5f);
  uint32_t draw = 1;
  const auto next = [&] { return static_cast<int>((draw = draw * 1664525u + 1013904223u) >> 24); };
  for (auto& one_weight : packed) one_weight = static_cast<int8_t>(next() - 128);
  for (auto& value : compensation) value = next();
  for (auto& value : x) value = static_cast<float>(next() - 128) / 64.0f;
  const Weights weights{packed.data(), compensation.data(), scale.data(), bias.data(), 1, STORED};
  for (int rows = 1; rows <= ROWS; ++rows) {
    std::vector<float> y[2];
    for (const Kernels* each : {&one, &other}) {
      std::vector<uint8_t> bytes(rows * STORED);
      std::vector<float> scales(rows);
      for (int r = 0; r < rows; ++r)
        scales[r] = each->quantise({x.data() + r * INPUTS, INPUTS, nullptr, 0},
                                   bytes.data() + r * STORED, STORED);
      auto& out = y[each == &one];
      out.resize(rows * SIZE);
      each->linear({bytes.data(), scales.data(), rows}, weights, 0, SIZE, true, out.data());
    }
    if (std::memcmp(y[0].data(), y[1].data(), y[0].size() * sizeof(float)) != 0) return false;
  }
  return true;
}

std::vector<const Kernels*> found() {
  std::vector<const Kernels*> all;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return all;
  all.push_back(&avx2);
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni");
  if (wide && agrees(avx512, avx2)) all.push_back(&avx512);
  if (wide && allowed_amx() && agrees(amx, avx2)) all.push_back(&amx);
  return all;
}

}  // namespace

const Kernels* kernels(const char* named) {
  static const std::vector<const Kernels*> all = found();  // once, whatever thread comes first
  if (named == nullptr) return all.empty() ? nullptr : all.back();
  for (const Kernels* one : all)
    if (std::strcmp(one->name, named) == 0) return one;
  return nullptr;
}

}  // namespace seq2serve
