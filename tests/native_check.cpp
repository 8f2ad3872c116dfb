// Every kernel on random shapes, in buffers of exactly the size that it may touch: built with
// sanitizers by tests/test_int8.py, which wants the exit code 0 and the same digest of each. With
// AMX_EMULATED, AMX's are those of tests/amx_emulated.h, where AVX-512 is there for the rest.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../model/native/float32.h"
#include "../model/native/kernels.h"

using namespace seq2serve;

uint32_t seed = 7;
int draw(int most) { return static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 16) % most; }

std::vector<float> floats(size_t count) {
  std::vector<float> all(count);
  for (auto& one : all) one = static_cast<float>(draw(2001) - 1000) / 500.0f;
  return all;
}

uint64_t digest = 0;  // FNV-1a of everything that came out

template <typename T>
void told(const std::vector<T>& all) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(all.data());
  for (size_t i = 0; i < all.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
}

int check(const Kernels& kernels) {
  seed = 7;
  digest = 14695981039346656037u;
  for (int round = 0; round < 60; ++round) {
    const int rows = 1 + draw(35), size = 1 + draw(70), inputs = 1 + draw(150);
    const int groups = (size + 15) / 16, depth = (inputs + DEPTH - 1) / DEPTH * DEPTH;
    std::vector<int8_t> packed(static_cast<size_t>(groups) * WIDTH * depth);
    for (auto& one : packed) one = static_cast<int8_t>(draw(255) - 127);
    std::vector<int32_t> compensation(groups * WIDTH, 5);
    const auto scale = floats(groups * WIDTH), bias = floats(groups * WIDTH);
    const Weights w{packed.data(), compensation.data(), scale.data(), bias.data(), groups, depth};
    const auto x = floats(static_cast<size_t>(rows) * inputs);
    std::vector<uint8_t> bytes(static_cast<size_t>(rows) * depth);
    std::vector<float> scales(rows);
    const int first = inputs / 3;
    for (int r = 0; r < rows; ++r)
      scales[r] = kernels.quantise(
          {x.data() + r * inputs, first, x.data() + r * inputs + first, inputs - first},
          bytes.data() + static_cast<size_t>(r) * depth, depth);
    const Quantized q{bytes.data(), scales.data(), rows};

    std::vector<float> c = floats(rows * size), h(rows * size), next(rows * size);
    std::vector<CellRow> row(rows);
    for (int r = 0; r < rows; ++r)
      row[r] = {bias.data(), c.data() + r * size, h.data() + r * size, next.data() + r * size};
    const int outputs = groups * WIDTH - draw(WIDTH), count = 1 + draw(12);
    std::vector<float> y(static_cast<size_t>(rows) * outputs), maxima(rows * groups),
        sums(rows * groups), values(rows * count, -std::numeric_limits<float>::infinity());
    std::vector<int64_t> tokens(rows * count);
    const Best best{count, values.data(), tokens.data(), maxima.data(), sums.data()};
    for (int group = 0; group < groups; ++group) {
      kernels.cell(q, w, group, size, row.data());
      kernels.linear(q, w, group, outputs, round % 2 == 0, y.data());
      kernels.best(q, w, group, best);
    }
    // A list of channels, some of them twice, whose weights lie channel by channel.
    std::vector<int8_t> channels(static_cast<size_t>(outputs) * depth);
    for (auto& one : channels) one = static_cast<int8_t>(draw(255) - 127);
    std::vector<int32_t> ids(1 + draw(150));
    for (auto& one : ids) one = draw(outputs);
    Weights part = w;
    part.groups = static_cast<int>(ids.size() + WIDTH - 1) / WIDTH;
    std::vector<float> tops(rows * part.groups), totals(rows * part.groups),
        kept(rows * count, -std::numeric_limits<float>::infinity());
    std::vector<int64_t> places(rows * count);
    const Best chosen{count, kept.data(), places.data(), tops.data(), totals.data()};
    for (int group = 0; group < part.groups; ++group)
      kernels.listed(q, part, {channels.data(), ids.data(), static_cast<int>(ids.size())}, group,
                     chosen);
    for (const auto& all : {scales, c, h, next, y, maxima, sums, values, tops, totals, kept}) told(all);
    for (const auto& all : {tokens, places}) told(all);
    told(bytes);
    for (int64_t place : places)
      if (place < 0 || place >= static_cast<int64_t>(ids.size())) return 3;
    for (int r = 0; r < rows; ++r) {
      const float total = kernels.normaliser(&maxima[r * groups], &sums[r * groups], groups);
      if (!(total >= values[r * count]) || std::isnan(h[r * size])) return 1;
    }

    const int steps = 1 + draw(40), heads = 1 + draw(3), head = 1 + draw(40);
    const auto query = floats(heads * head), keys = floats(static_cast<size_t>(steps) * heads * head);
    std::unique_ptr<bool[]> mask(new bool[steps]);
    for (int s = 0; s < steps; ++s) mask[s] = s == 0 || s < steps / 2;
    std::vector<float> scratch(steps), context(heads * head), weights(steps);
    kernels.attend(query.data(), keys.data(), keys.data(), mask.get(), steps, heads, head,
                   scratch.data(), context.data(), weights.data());
    for (const auto& all : {context, weights}) told(all);
    float sum = 0;
    for (float one : weights) sum += one;
    if (std::fabs(sum - 1) > 1e-4f) return 2;
  }
  return 0;
}

int check(const FloatKernels& kernels) {
  seed = 7;
  digest = 14695981039346656037u;
  for (int round = 0; round < 60; ++round) {
    const int rows = 1 + draw(20), size = 1 + draw(70), inputs = 1 + draw(90), more = draw(5);
    const int groups = (size + 15) / 16, outputs = groups * 64 - draw(64);
    const auto packed = floats(static_cast<size_t>(groups) * inputs * 64);
    const auto bias = floats(groups * 64);
    const FloatWeights w{packed.data(), bias.data(), groups, inputs};
    const auto x = floats((rows - 1) * (inputs + more) + inputs);
    const FloatRows given{x.data(), static_cast<size_t>(inputs + more), rows};
    std::vector<float> c = floats(rows * size), h(rows * size), next(rows * size);
    std::vector<FloatCellRow> row(rows);
    for (int r = 0; r < rows; ++r)
      row[r] = {bias.data(), c.data() + r * size, h.data() + r * size, next.data() + r * size};
    std::vector<float> y(static_cast<size_t>(rows) * outputs);
    for (int group = 0; group < groups; ++group) {
      kernels.cell(given, w, group, size, row.data());
      kernels.linear(given, w, group, outputs, round % 2 == 0, y.data());
    }
    const int steps = 1 + draw(40), heads = 1 + draw(3), head = 1 + draw(40);
    const auto query = floats(heads * head), keys = floats(static_cast<size_t>(steps) * heads * head);
    std::unique_ptr<bool[]> mask(new bool[steps]);
    for (int s = 0; s < steps; ++s) mask[s] = s == 0 || s < steps / 2;
    std::vector<float> scratch(steps), context(heads * head), weights(steps);
    kernels.attend(query.data(), keys.data(), keys.data(), mask.get(),
                   round % 3 ? query.data() : nullptr, steps, heads, head, scratch.data(),
                   context.data(), weights.data());
    for (const auto& all : {c, h, next, y, context, weights}) told(all);
    float sum = 0;
    for (float one : weights) sum += one;
    if (std::fabs(sum - 1) > 1e-4f) return 2;
  }
  return 0;
}

const Kernels* named(const char* name) {
#ifdef AMX_EMULATED
  if (std::strcmp(name, "amx") == 0) return kernels("avx512") == nullptr ? nullptr : &amx;
#endif
  return kernels(name);
}

int main() {
  for (const char* name : {"avx2", "avx512", "amx"}) {
    const Kernels* one = named(name);
    if (one == nullptr) continue;
    const int wrong = check(*one);
    std::printf("%s: %d %016llx\n", name, wrong, static_cast<unsigned long long>(digest));
    if (wrong) return wrong;
  }
  for (const FloatKernels* one : {&float_avx2, &float_avx512}) {
    if (kernels(one->name) == nullptr) continue;
    const int wrong = check(*one);
    std::printf("float %s: %d %016llx\n", one->name, wrong, static_cast<unsigned long long>(digest));
    if (wrong) return wrong;
  }
  return 0;
}
