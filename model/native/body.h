// The kernels, around `product`, which the including file has for its processor:
//
//   void product(const uint8_t* a, size_t stride, int rows, const int8_t* w, int depth, int32_t* c)
//
// multiplies up to BLOCK rows of bytes by one group of weights: c [rows, 64], without compensation;
//
//   void dots(const uint8_t* a, size_t stride, int rows, const int8_t* const* w, int depth,
//             int32_t* c)
//
// up to BESIDE rows by 64 channels that lie anywhere, [depth] each.
#include "attention.h"

#include "kernels.h"

namespace seq2serve {
namespace {

float quantise(const Parts& parts, uint8_t* bytes, int depth) {
  const float* vectors[2] = {parts.first, parts.second};
  const int sizes[2] = {parts.first_size, parts.second_size};
  Floats most = Floats{}, spoilt = Floats{};
  for (int p = 0; p < 2; ++p)
    for (int i = 0; i < sizes[p]; i += LANES) {
      const Floats x = load(vectors[p] + i, sizes[p] - i);
      most = larger(larger(x, -x), most);
      spoilt += x * 0.0f;  // NaN where x is NaN or infinite
    }
  const float range = greatest(most), scale = range / 127.0f + sum(spoilt);
  const float inverse = range > LEAST && scale == scale ? 127.0f / range : 0.0f;
  // Adding ROUNDING leaves the rounded value in the low bits; 128 on top makes it positive.
  const Floats offset = Floats{} + (ROUNDING + 128.0f);
  int at = 0;
  for (int p = 0; p < 2; ++p)
    for (int i = 0; i < sizes[p]; i += LANES) {
      const int n = sizes[p] - i < LANES ? sizes[p] - i : LANES;
      const Floats x = scale == scale ? load(vectors[p] + i, n) : Floats{};
      const Bytes q = __builtin_convertvector(bits(x * inverse + offset) & 0xFF, Bytes);
      std::memcpy(bytes + at, &q, n);
      at += n;
    }
  std::memset(bytes + at, 128, depth - at);
  return scale;
}

// Calls `each(row, sums [64])` with the products of every row and a group.
template <typename Each>
inline void products(const Quantized& x, const Weights& w, int group, const Each& each) {
  alignas(64) int32_t c[BLOCK * WIDTH];
  const int8_t* packed = w.packed + (size_t)group * WIDTH * w.depth;
  for (int first = 0; first < x.rows; first += BLOCK) {
    const int rows = x.rows - first < BLOCK ? x.rows - first : BLOCK;
    product(x.bytes + (size_t)first * w.depth, w.depth, rows, packed, w.depth, c);
    for (int r = 0; r < rows; ++r) each(first + r, c + r * WIDTH);
  }
}

struct Channels {  // of one group
  Ints compensation[4];
  Floats scale[4], bias[4];

  Channels() = default;

  Channels(const Weights& w, int group) {
    for (int p = 0; p < 4; ++p) {
      const size_t at = (size_t)group * WIDTH + p * LANES;
      compensation[p] = load(w.compensation + at);
      scale[p] = load(w.scale + at);
      bias[p] = load(w.bias + at);
    }
  }

  Floats of_row(int p, const int32_t* sums, float row_scale, Floats added) const {
    return of(load(sums + p * LANES) + compensation[p]) * (row_scale * scale[p]) + added;
  }
};

void cell(const Quantized& x, const Weights& w, int group, int size, const CellRow* rows) {
  const Channels channels(w, group);
  const int at = group * LANES, n = size - at < LANES ? size - at : LANES;
  products(x, w, group, [&](int r, const int32_t* sums) {
    const CellRow& row = rows[r];
    Floats gate[4];
    for (int p = 0; p < 4; ++p)
      gate[p] = channels.of_row(p, sums, x.scale[r],
                                load(row.added + (size_t)group * WIDTH + p * LANES));
    const Floats c = sigmoid(gate[1]) * load(row.c + at, n) + gated(gate[0], gate[3]);
    store(row.c_next + at, c, n);
    store(row.h_next + at, gated(gate[2], c), n);
  });
}

void linear(const Quantized& x, const Weights& w, int group, int size, bool tanh, float* y) {
  const Channels channels(w, group);
  products(x, w, group, [&](int r, const int32_t* sums) {
    for (int p = 0; p < 4; ++p) {
      const int at = group * WIDTH + p * LANES;
      if (at >= size) break;
      const Floats v = channels.of_row(p, sums, x.scale[r], channels.bias[p]);
      store(y + (size_t)r * size + at, tanh ? tangent(v) : v, size - at);
    }
  });
}

// Keeps `value` among the greatest; equals stay in the order in which they came.
inline void keep(float value, int64_t token, int count, float* values, int64_t* tokens) {
  int place = count - 1;
  for (; place > 0 && values[place - 1] < value; --place) {
    values[place] = values[place - 1];
    tokens[place] = tokens[place - 1];
  }
  values[place] = value;
  tokens[place] = token;
}

// Keeps what is best of one row's sums with a group, and what the normaliser needs of it.
inline void offer(const Channels& channels, const int32_t* sums, float row_scale, int row,
                  int group, int groups, const Best& best) {
  Floats logits[4], most = Floats{} - std::numeric_limits<float>::infinity();
  for (int p = 0; p < 4; ++p) {
    logits[p] = channels.of_row(p, sums, row_scale, channels.bias[p]);
    most = larger(logits[p], most);
  }
  const float maximum = greatest(most);
  float* values = best.values + (size_t)row * best.count;
  if (maximum > values[best.count - 1])
    for (int p = 0; p < 4; ++p)
      for (int i = 0; i < LANES; ++i)
        if (logits[p][i] > values[best.count - 1])
          keep(logits[p][i], group * WIDTH + p * LANES + i, best.count, values,
               best.tokens + (size_t)row * best.count);
  if (best.maxima == nullptr) return;
  Floats total = Floats{};
  if (maximum > -std::numeric_limits<float>::infinity())
    for (int p = 0; p < 4; ++p) total += exponential(logits[p] - maximum);
  best.maxima[(size_t)row * groups + group] = maximum;
  best.sums[(size_t)row * groups + group] = sum(total);
}

void best(const Quantized& x, const Weights& w, int group, const Best& best) {
  const Channels channels(w, group);
  products(x, w, group, [&](int r, const int32_t* sums) {
    offer(channels, sums, x.scale[r], r, group, w.groups, best);
  });
}

void listed(const Quantized& x, const Weights& w, const List& list, int group, const Best& best) {
  Channels channels;
  const int8_t* rows[WIDTH];
  for (int i = 0; i < WIDTH; ++i) {
    const int place = group * WIDTH + i;
    const bool there = place < list.count;
    const int32_t id = there ? list.ids[place] : list.ids[0];
    rows[i] = list.rows + (size_t)id * w.depth;
    channels.compensation[i / LANES][i % LANES] = w.compensation[id];
    channels.scale[i / LANES][i % LANES] = w.scale[id];
    channels.bias[i / LANES][i % LANES] =
        there ? w.bias[id] : -std::numeric_limits<float>::infinity();
  }
  alignas(64) int32_t c[BESIDE * WIDTH];
  for (int first = 0; first < x.rows; first += BESIDE) {
    const int some = x.rows - first < BESIDE ? x.rows - first : BESIDE;
    dots(x.bytes + (size_t)first * w.depth, w.depth, some, rows, w.depth, c);
    for (int r = 0; r < some; ++r)
      offer(channels, c + r * WIDTH, x.scale[first + r], first + r, group, w.groups, best);
  }
}

float normaliser(const float* maxima, const float* sums, int groups) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Floats most = Floats{} + lowest, total = Floats{};
  for (int i = 0; i < groups; i += LANES) most = larger(load(maxima + i, groups - i, lowest), most);
  const float maximum = greatest(most);
  for (int i = 0; i < groups; i += LANES)
    total += load(sums + i, groups - i) * exponential(load(maxima + i, groups - i, lowest) - maximum);
  return maximum + std::log(sum(total));
}

void attend(const float* query, const float* keys, const float* values, const bool* mask, int n,
            int heads, int size, float* scratch, float* context, float* weights) {
  attended(query, keys, values, mask, nullptr, n, heads, size, scratch, context, weights,
           [](Floats a, Floats b, Floats c) { return a * b + c; });
}

}  // namespace
}  // namespace seq2serve
