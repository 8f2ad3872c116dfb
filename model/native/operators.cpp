// The kernels as operators of TorchScript. Each is one parallel region; scratch belongs to the
// thread that calls, so any number of models and threads may be at work.
#include <torch/library.h>

#include <numeric>
#include <string>
#include <tuple>

#include "compute.h"

namespace {

using namespace seq2serve;
using at::Tensor;

std::string use(const std::string& name) {
  const Kernels* one = kernels(name.empty() ? nullptr : name.c_str());
  if (one != nullptr) chosen = one;
  return one == nullptr ? "" : one->name;
}

std::tuple<Tensor, Tensor> cell(const Tensor& x, const Tensor& tokens, const Tensor& table,
                                const Tensor& h, const Tensor& c, at::TensorList packed) {
  const bool folded = table.numel() > 0;
  const int64_t rows = h.size(0), size = h.size(1), inputs = folded ? 0 : x.size(1);
  const Weights w = weights(packed, inputs + size, "cell");
  TORCH_CHECK((size + 15) / 16 == w.groups, "cell: state of ", size, " for ", w.groups, " groups");
  const float* states = floats(h, "h", {rows, size});
  const float* cells = floats(c, "c", {rows, size});
  Tensor h_next = at::empty_like(h), c_next = at::empty_like(c);
  CellRow* row = scratch<CellRow>(rows);
  const int64_t width = w.groups * WIDTH;
  const float* entries = folded ? floats(table, "table", {table.size(0), width}) : w.bias;
  TORCH_CHECK(!folded || (tokens.scalar_type() == at::kLong && tokens.is_contiguous() &&
                          tokens.numel() == rows), "cell: tokens do not fit");
  for (int64_t r = 0; r < rows; ++r)
    row[r] = {folded ? row_of(entries, tokens.const_data_ptr<int64_t>()[r], table.size(0), width)
                     : entries,
              cells + r * size, h_next.mutable_data_ptr<float>() + r * size,
              c_next.mutable_data_ptr<float>() + r * size};
  const float* input = folded ? nullptr : floats(x, "x", {rows, inputs});
  cell_of(quantised(input, inputs, states, size, rows, w), w, size, row);
  return {h_next, c_next};
}

Tensor linear(const Tensor& x, const Tensor& more, at::TensorList packed, int64_t size, bool tanh) {
  const int64_t rows = x.size(0), inputs = x.size(1), further = more.dim() == 2 ? more.size(1) : 0;
  const Weights w = weights(packed, inputs + further, "linear");
  TORCH_CHECK(0 < size && size <= w.groups * WIDTH && w.groups * WIDTH - size < WIDTH,
              "linear: ", size, " outputs of ", w.groups, " groups");
  const float* second = further ? floats(more, "more", {rows, further}) : nullptr;
  const Quantized q = quantised(floats(x, "x", {rows, inputs}), inputs, second, further, rows, w);
  Tensor y = at::empty({rows, size}, x.options());
  linear_of(q, w, size, tanh, y.mutable_data_ptr<float>());
  return y;
}

// Where what is chosen of so many rows goes.
struct Told {
  Tensor values, tokens, normaliser;

  Told(int64_t rows, int64_t count, bool normalised, const Tensor& like)
      : values(at::empty({rows, count}, like.options())),
        tokens(at::empty({rows, count}, like.options().dtype(at::kLong))),
        normaliser(at::empty({normalised ? rows : 0}, like.options())) {}

  Choice choice() {
    return {values.size(1), values.mutable_data_ptr<float>(), tokens.mutable_data_ptr<int64_t>(),
            normaliser.numel() > 0 ? normaliser.mutable_data_ptr<float>() : nullptr};
  }
};

std::tuple<Tensor, Tensor, Tensor> best(const Tensor& x, at::TensorList packed, int64_t count,
                                        bool normalised) {
  const int64_t rows = x.size(0), inputs = x.size(1);
  const Weights w = weights(packed, inputs, "best");
  TORCH_CHECK(0 < count && count <= w.groups * WIDTH, "best: count ", count);
  const Quantized q = quantised(floats(x, "x", {rows, inputs}), inputs, nullptr, 0, rows, w);
  Told told(rows, count, normalised, x);
  best_of(q, w, told.choice());
  return {told.values, told.tokens, told.normaliser};
}

// `best` over a list of channels for each sentence, see `Lists`: `candidates` are int32 [N, S, C].
std::tuple<Tensor, Tensor, Tensor> listed(const Tensor& x, const Tensor& rows,
                                          at::TensorList packed, const Tensor& candidates,
                                          const Tensor& common, int64_t count, bool normalised) {
  const int64_t total = x.size(0), inputs = x.size(1);
  const Weights w = weights(packed, inputs, "listed");
  TORCH_CHECK(0 < count, "listed: count ", count);
  const Lists lists = lists_of(rows, w, candidates, common, total);
  const Quantized q = quantised(floats(x, "x", {total, inputs}), inputs, nullptr, 0, total, w);
  Told told(total, count, normalised, x);
  listed_of(q, w, lists, told.choice());
  return {told.values, told.tokens, told.normaliser};
}

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& keys, const Tensor& values,
                                  const Tensor& mask, int64_t heads) {
  const int64_t n = keys.size(0), k = query.size(1);
  const Memory memory = memory_of(keys, values, mask, heads, k);
  const float* asked = floats(query, "query", {n, k, memory.width});
  Tensor context = at::empty({n, k, memory.width}, query.options());
  Tensor shares = at::empty({n, k, memory.sources}, query.options());
  attend_to(memory, asked, n * k, context.mutable_data_ptr<float>(),
            shares.mutable_data_ptr<float>());
  return {context, shares};
}

// One direction of an encoder layer over N sequences: y [N, S, H], zero in the padding, and the
// last states [N, H]. `added` [N, S, width] is the input's product, or empty where rows of `table`
// are, by token.
std::tuple<Tensor, Tensor, Tensor> layer(const Tensor& added, const Tensor& tokens,
                                         const Tensor& table, const Tensor& lengths,
                                         at::TensorList packed, int64_t size, bool backwards) {
  const Weights w = weights(packed, size, "layer");
  TORCH_CHECK((size + 15) / 16 == w.groups, "layer: state of ", size, " for ", w.groups, " groups");
  const bool folded = table.numel() > 0;
  const int64_t n = lengths.size(0), width = w.groups * WIDTH;
  const int64_t steps = folded ? tokens.size(1) : added.size(1);
  TORCH_CHECK(lengths.scalar_type() == at::kLong && lengths.is_contiguous(), "layer: lengths");
  TORCH_CHECK(!folded || (tokens.scalar_type() == at::kLong && tokens.is_contiguous() &&
                          tokens.size(0) == n), "layer: tokens do not fit");
  const float* entries = folded ? floats(table, "table", {table.size(0), width})
                                : floats(added, "added", {n, steps, width});
  const int64_t* token = folded ? tokens.const_data_ptr<int64_t>() : nullptr;
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  Tensor y = at::zeros({n, steps, size}, lengths.options().dtype(at::kFloat));
  Tensor h_last = at::zeros({n, size}, y.options()), c_last = at::zeros_like(h_last);
  float* out = y.mutable_data_ptr<float>();
  float *h = h_last.mutable_data_ptr<float>(), *c = c_last.mutable_data_ptr<float>();
  // Longest first: those that go on at a step are the first ones.
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length[a] > length[b]; });
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK(0 < length[i] && length[i] <= steps, "layer: length ", length[i]);
    for (int64_t t = 0; folded && t < length[i]; ++t)
      row_of(entries, token[i * steps + t], table.size(0), width);
  }
  const Kernels& kernels = fastest();
  uint8_t* bytes = scratch<uint8_t>(n * w.depth);
  float* scale = scratch<float>(n);
  CellRow* row = scratch<CellRow>(n);
  int64_t active = n;
  for (int64_t t = 0; t < steps && active > 0; ++t) {
    while (active > 0 && length[order[active - 1]] <= t) --active;
    if (active == 0) break;
    for (int64_t r = 0; r < active; ++r) {
      const int64_t i = order[r], at = backwards ? length[i] - 1 - t : t;
      scale[r] = kernels.quantise({h + i * size, static_cast<int>(size), nullptr, 0},
                                  bytes + r * w.depth, w.depth);
      const int64_t entry = folded ? token[i * steps + at] : i * steps + at;
      row[r] = {entries + entry * width, c + i * size, out + (i * steps + at) * size, c + i * size};
    }
    cell_of({bytes, scale, static_cast<int>(active)}, w, size, row);
    for (int64_t r = 0; r < active; ++r) {
      const int64_t i = order[r];
      std::copy(row[r].h_next, row[r].h_next + size, h + i * size);
    }
  }
  return {y, h_last, c_last};
}

}  // namespace

// Their schemas are declared by handler/decoding/native.py, which a process without this library
// needs as well. `use` has no tensor whose device could choose.
TORCH_LIBRARY_IMPL(seq2serve, CompositeExplicitAutograd, m) {
  m.impl("use", use);
  m.impl("cell", cell);
  m.impl("linear", linear);
  m.impl("best", best);
  m.impl("listed", listed);
  m.impl("attend", attend);
  m.impl("layer", layer);
}
