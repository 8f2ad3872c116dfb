// The float32 kernels, around what the including file has for its processor: `fused`, a * b + c
// rounded once, and
//
//   template <int ROWS>
//   void product_of(const float* x, size_t stride, const float* w, int depth, size_t ahead, float* c)
//
// which multiplies rows, BLOCK at most, by one group of weights, without the bias: c [ROWS, 64]. What
// lies `ahead` floats behind the weights that it reads is fetched into the cache.
#include "attention.h"
#include "float32.h"

namespace seq2serve {
namespace {

constexpr int COLUMNS = 64, PANELS = 4;  // of a group
constexpr size_t NEXT = 24;  // inputs after one whose weights are fetched while it is computed

constexpr int BLOCK = 6;  // rows whose sums fit into the registers

void product(const float* x, size_t stride, int rows, const float* w, int depth, size_t ahead,
             float* c) {
  static constexpr decltype(&product_of<1>) of[BLOCK] = {
      product_of<1>, product_of<2>, product_of<3>, product_of<4>, product_of<5>, product_of<6>};
  of[rows - 1](x, stride, w, depth, ahead, c);
}

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
  attended(query, keys, values, mask, v, n, heads, size, scratch, context, weights, fused);
}

}  // namespace
}  // namespace seq2serve
