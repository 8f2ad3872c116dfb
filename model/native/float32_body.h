// The float32 kernels, around `product`, which the including file has for its processor:
//
//   void product(const float* x, size_t stride, int rows, const float* w, int depth, size_t ahead,
//                float* c)
//
// multiplies up to BLOCK rows by one group of weights, without the bias: c [rows, 64]. What lies
// `ahead` floats behind the weights that it reads is fetched into the cache.
#include "vector.h"

#include "float32.h"

namespace seq2serve {
namespace {

constexpr int COLUMNS = 64, PANELS = 4;  // of a group
constexpr size_t NEXT = 24;  // inputs after one whose weights are fetched while it is computed

// Calls `each(row, sums [64])` with the products of every row and a group.
template <typename Each>
inline void products(const FloatRows& x, const FloatWeights& w, int group, const Each& each) {
  alignas(64) float c[BLOCK * COLUMNS];
  const float* packed = w.packed + (size_t)group * COLUMNS * w.depth;
  // Blocks of even sizes: 16 rows are 6, 5 and 5.
  const int blocks = (x.rows + BLOCK - 1) / BLOCK;
  for (int block = 0; block < blocks; ++block) {
    const int first = (long long)x.rows * block / blocks;
    const int rows = (long long)x.rows * (block + 1) / blocks - first;
    // The last rows of one group fetch the next group; where they are the first ones too, what
    // they need themselves comes first.
    const bool last = block == blocks - 1 && blocks > 1;
    product(x.x + first * x.stride, x.stride, rows, packed, w.depth,
            last ? (size_t)COLUMNS * w.depth : NEXT * COLUMNS, c);
    for (int r = 0; r < rows; ++r) each(first + r, c + r * COLUMNS);
  }
}

void linear(const FloatRows& x, const FloatWeights& w, int group, int size, bool tanh, float* y) {
  products(x, w, group, [&](int r, const float* sums) {
    for (int p = 0; p < PANELS; ++p) {
      const int at = group * COLUMNS + p * LANES;
      if (at >= size) break;
      const Floats v = load(sums + p * LANES) + load(w.bias + at);
      store(y + (size_t)r * size + at, tanh ? tangent(v) : v, size - at);
    }
  });
}

void cell(const FloatRows& x, const FloatWeights& w, int group, int size,
          const FloatCellRow* rows) {
  const int at = group * LANES, n = size - at < LANES ? size - at : LANES;
  products(x, w, group, [&](int r, const float* sums) {
    const FloatCellRow& row = rows[r];
    Floats gate[PANELS];
    for (int p = 0; p < PANELS; ++p)
      gate[p] = load(sums + p * LANES) + load(row.added + (size_t)group * COLUMNS + p * LANES);
    const Floats c = sigmoid(gate[1]) * load(row.c + at, n) + gated(gate[0], gate[3]);
    store(row.c_next + at, c, n);
    store(row.h_next + at, gated(gate[2], c), n);
  });
}

void attend(const float* query, const float* keys, const float* values, const bool* mask,
            const float* v, int n, int heads, int size, float* scratch, float* context,
            float* weights) {
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
        dot = fused(v == nullptr ? q : tangent(q + k),
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
          mixed = fused(Floats{} + scratch[s],
                        load(values + (size_t)s * width + at + i, size - i), mixed);
      store(context + at + i, mixed, size - i);
    }
  }
}

}  // namespace
}  // namespace seq2serve
