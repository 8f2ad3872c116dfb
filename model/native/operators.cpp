// The kernels as operators of TorchScript. Each is one parallel region; scratch belongs to the
// thread that calls, so any number of models and threads may be at work.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using seq2serve::Best;
using seq2serve::CellRow;
using seq2serve::Kernels;
using seq2serve::Quantized;
using seq2serve::Weights;
using seq2serve::WIDTH;
using at::Tensor;

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& fastest() {
  const Kernels* one = chosen.load(std::memory_order_relaxed);
  TORCH_CHECK(one != nullptr, "no kernels for this processor");
  return *one;
}

std::string use(const std::string& name) {
  const Kernels* one = seq2serve::kernels(name.empty() ? nullptr : name.c_str());
  if (one != nullptr) chosen = one;
  return one == nullptr ? "" : one->name;
}

const float* floats(const Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_cpu() && t.is_contiguous(), name,
              ": expected contiguous float32 on the CPU");
  TORCH_CHECK(t.sizes() == shape, name, ": got shape ", t.sizes(), ", expected ", shape);
  return t.const_data_ptr<float>();
}

// [packed, compensation, scale, bias] of model/quantized.py, for `inputs` inputs.
Weights weights(at::TensorList t, int64_t inputs, const char* name) {
  TORCH_CHECK(t.size() == 4 && t[0].dim() == 5, name, ": expected four packed tensors");
  const int64_t groups = t[0].size(0), depth = t[0].size(1) * 4;
  TORCH_CHECK(t[0].scalar_type() == at::kChar && t[0].is_contiguous() && t[0].is_cpu() &&
                  t[0].sizes() == at::IntArrayRef({groups, depth / 4, 4, 16, 4}) &&
                  depth % seq2serve::DEPTH == 0 && inputs <= depth && depth - inputs < WIDTH,
              name, ": got packed weights ", t[0].sizes(), " for ", inputs, " inputs");
  TORCH_CHECK(t[1].scalar_type() == at::kInt && t[1].is_contiguous() &&
                  t[1].numel() == groups * WIDTH, name, ": compensation does not fit");
  return {t[0].const_data_ptr<int8_t>(), t[1].const_data_ptr<int32_t>(),
          floats(t[2], name, {groups * WIDTH}), floats(t[3], name, {groups * WIDTH}),
          static_cast<int>(groups), static_cast<int>(depth)};
}

template <typename T>
T* scratch(size_t count, int which = 0) {
  static thread_local std::vector<T> kept[3];
  if (kept[which].size() < count) kept[which].resize(count);
  return kept[which].data();
}

// Each thread takes one piece of 0..count; nothing below it throws.
template <typename Work>
void shared_out(int64_t count, const Work& work) {
  const int threads = static_cast<int>(std::min<int64_t>(at::get_num_threads(), count));
  if (threads <= 1) {
    if (count > 0) work(0, count);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) work(count * i / threads, count * (i + 1) / threads);
}

constexpr int64_t ALONE = 8;  // rows that are quantised before a second thread would have begun

// Rows of `first` and `second` side by side, as bytes, in this thread's scratch.
Quantized quantised(const float* first, int64_t first_size, const float* second,
                    int64_t second_size, int64_t rows, const Weights& w) {
  const Kernels& kernels = fastest();
  uint8_t* bytes = scratch<uint8_t>(rows * w.depth);
  float* scale = scratch<float>(rows);
  const auto some = [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r)
      scale[r] = kernels.quantise(
          {first + r * first_size, static_cast<int>(first_size), second + r * second_size,
           static_cast<int>(second_size)},
          bytes + r * w.depth, w.depth);
  };
  if (rows <= ALONE)
    some(0, rows);
  else
    shared_out(rows, some);
  return {bytes, scale, static_cast<int>(rows)};
}

// Row `id` of a table, checked.
const float* row_of(const float* table, int64_t id, int64_t size, int64_t width) {
  TORCH_CHECK(0 <= id && id < size, "token ", id, " is not in a vocabulary of ", size);
  return table + id * width;
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
  const Quantized q = quantised(input, inputs, states, size, rows, w);
  const Kernels& kernels = fastest();
  shared_out(w.groups, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group)
      kernels.cell(q, w, static_cast<int>(group), static_cast<int>(size), row);
  });
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
  float* out = y.mutable_data_ptr<float>();
  const Kernels& kernels = fastest();
  shared_out(w.groups, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group)
      kernels.linear(q, w, static_cast<int>(group), static_cast<int>(size), tanh, out);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> best(const Tensor& x, at::TensorList packed, int64_t count,
                                        bool normalised) {
  const int64_t rows = x.size(0), inputs = x.size(1);
  const Weights w = weights(packed, inputs, "best");
  TORCH_CHECK(0 < count && count <= w.groups * WIDTH, "best: count ", count);
  const Quantized q = quantised(floats(x, "x", {rows, inputs}), inputs, nullptr, 0, rows, w);
  Tensor values = at::empty({rows, count}, x.options());
  Tensor tokens = at::empty({rows, count}, x.options().dtype(at::kLong));
  Tensor normaliser = at::zeros({normalised ? rows : 0}, x.options());
  float* value = values.mutable_data_ptr<float>();
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  const int64_t pieces = std::min<int64_t>(at::get_num_threads(), w.groups);
  const int64_t kept = rows * count;
  float* lists = scratch<float>(pieces * kept + (normalised ? 2 * rows * w.groups : 0), 1);
  int64_t* names = scratch<int64_t>(pieces * kept);
  float* maxima = normalised ? lists + pieces * kept : nullptr;
  float* sums = normalised ? maxima + rows * w.groups : nullptr;
  std::fill(lists, lists + pieces * kept, -std::numeric_limits<float>::infinity());
  std::fill(names, names + pieces * kept, 0);
  const Kernels& kernels = fastest();
  shared_out(pieces, [&](int64_t from, int64_t to) {
    for (int64_t piece = from; piece < to; ++piece) {
      const Best own{static_cast<int>(count), lists + piece * kept, names + piece * kept, maxima,
                     sums};
      for (int64_t g = w.groups * piece / pieces; g < w.groups * (piece + 1) / pieces; ++g)
        kernels.best(q, w, static_cast<int>(g), own);
    }
  });
  // Of equals the one with the smaller id: the same whatever the number of threads.
  int64_t* at = scratch<int64_t>(pieces, 1);
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(at, at + pieces, 0);
    for (int64_t k = 0; k < count; ++k) {
      int64_t from = 0;
      for (int64_t piece = 1; piece < pieces; ++piece)
        if (lists[piece * kept + r * count + at[piece]] > lists[from * kept + r * count + at[from]])
          from = piece;
      value[r * count + k] = lists[from * kept + r * count + at[from]];
      token[r * count + k] = names[from * kept + r * count + at[from]];
      ++at[from];
    }
    const bool finite = q.scale[r] == q.scale[r];
    if (normalised)
      normaliser.mutable_data_ptr<float>()[r] =
          kernels.normaliser(maxima + r * w.groups, sums + r * w.groups, w.groups);
    if (!finite)
      std::fill(value + r * count, value + (r + 1) * count,
                std::numeric_limits<float>::quiet_NaN());
  }
  return {values, tokens, normaliser};
}

// `best` over a list of channels for each sentence: `common` [F], and its own among `candidates`
// int32 [N, S, C], up to the first zero. Both ascend and have none in common. `rows` int8 [channels,
// depth] are the weights of `packed` channel by channel. x has equally many rows for each sentence.
std::tuple<Tensor, Tensor, Tensor> listed(const Tensor& x, const Tensor& rows,
                                          at::TensorList packed, const Tensor& candidates,
                                          const Tensor& common, int64_t count, bool normalised) {
  const int64_t total = x.size(0), inputs = x.size(1);
  const Weights w = weights(packed, inputs, "listed");
  TORCH_CHECK(rows.scalar_type() == at::kChar && rows.is_contiguous() && rows.is_cpu() &&
                  rows.dim() == 2 && rows.size(1) == w.depth && rows.size(0) <= w.groups * WIDTH,
              "listed: got rows ", rows.sizes(), " for ", w.groups, " groups of depth ", w.depth);
  TORCH_CHECK(candidates.scalar_type() == at::kInt && candidates.is_cpu() &&
                  candidates.dim() == 3 && candidates.size(0) > 0 &&
                  candidates.stride(2) == 1 && candidates.stride(1) == candidates.size(2) &&
                  total % candidates.size(0) == 0, "listed: got candidates ", candidates.sizes(),
              " for ", total, " rows");
  TORCH_CHECK(common.scalar_type() == at::kInt && common.is_cpu() && common.is_contiguous() &&
                  common.numel() > 0, "listed: common does not fit");
  const int64_t n = candidates.size(0), k = total / n, channels = rows.size(0);
  const int64_t most = candidates.size(1) * candidates.size(2), shared = common.numel();
  TORCH_CHECK(0 < count, "listed: count ", count);
  const int32_t *own = candidates.const_data_ptr<int32_t>(), *ids = common.const_data_ptr<int32_t>();
  const auto valid = [&](int32_t id) { return 0 < id && id < channels; };
  TORCH_CHECK(std::all_of(ids, ids + shared, valid), "listed: common names no channel");
  int64_t* counted = scratch<int64_t>(n, 1);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t *first = own + i * candidates.stride(0), *last = std::find(first, first + most, 0);
    TORCH_CHECK(std::all_of(first, last, valid), "listed: a candidate is no channel of ", channels);
    counted[i] = last - first;
  }
  const Quantized q = quantised(floats(x, "x", {total, inputs}), inputs, nullptr, 0, total, w);
  Tensor values = at::full({total, count}, -std::numeric_limits<float>::infinity(), x.options());
  Tensor tokens = at::zeros({total, count}, x.options().dtype(at::kLong));
  Tensor normaliser = at::empty({normalised ? total : 0}, x.options());
  float* value = values.mutable_data_ptr<float>();
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  float* logsum = normaliser.mutable_data_ptr<float>();
  const int8_t* row = rows.const_data_ptr<int8_t>();
  const Kernels& kernels = fastest();
  const auto some = [&](int64_t from, int64_t to) {
    int32_t* list = scratch<int32_t>(shared + most);
    const int64_t widest = (shared + most + WIDTH - 1) / WIDTH;
    float* maxima = normalised ? scratch<float>(2 * k * widest, 2) : nullptr;
    for (int64_t i = from; i < to; ++i) {
      const int32_t* first = own + i * candidates.stride(0);
      std::merge(ids, ids + shared, first, first + counted[i], list);
      const int listed = static_cast<int>(shared + counted[i]);
      Weights part = w;
      part.groups = (listed + WIDTH - 1) / WIDTH;
      float* sums = normalised ? maxima + k * part.groups : nullptr;
      const int64_t at = i * k;
      const Quantized rows_of{q.bytes + at * w.depth, q.scale + at, static_cast<int>(k)};
      const Best best{static_cast<int>(count), value + at * count, token + at * count, maxima, sums};
      for (int group = 0; group < part.groups; ++group)
        kernels.listed(rows_of, part, {row, list, listed}, group, best);
      for (int64_t r = 0; r < k; ++r) {
        for (int64_t c = (at + r) * count; c < (at + r + 1) * count; ++c) token[c] = list[token[c]];
        if (normalised)
          logsum[at + r] = kernels.normaliser(maxima + r * part.groups, sums + r * part.groups,
                                              part.groups);
        if (q.scale[at + r] != q.scale[at + r])
          std::fill(value + (at + r) * count, value + (at + r + 1) * count,
                    std::numeric_limits<float>::quiet_NaN());
      }
    }
  };
  shared_out(n, some);
  return {values, tokens, normaliser};
}

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& keys, const Tensor& values,
                                  const Tensor& mask, int64_t heads) {
  const int64_t n = keys.size(0), s = keys.size(1), width = keys.size(2), k = query.size(1);
  const float* asked = floats(query, "query", {n, k, width});
  TORCH_CHECK(heads > 0 && width % heads == 0, "attend: ", heads, " heads for ", width);
  TORCH_CHECK(mask.scalar_type() == at::kBool && mask.sizes() == at::IntArrayRef({n, s}) &&
                  values.sizes() == keys.sizes() && keys.scalar_type() == at::kFloat &&
                  values.scalar_type() == at::kFloat && mask.stride(1) == 1 &&
                  keys.stride(2) == 1 && keys.stride(1) == width && values.stride(2) == 1 &&
                  values.stride(1) == width, "attend: keys, values and mask do not fit");
  Tensor context = at::empty({n, k, width}, query.options());
  Tensor shares = at::empty({n, k, s}, query.options());
  float* mixed = context.mutable_data_ptr<float>();
  float* told = shares.mutable_data_ptr<float>();
  const float *key = keys.const_data_ptr<float>(), *value = values.const_data_ptr<float>();
  const bool* valid = mask.const_data_ptr<bool>();
  const int64_t key_rows = keys.stride(0), value_rows = values.stride(0), masks = mask.stride(0);
  const Kernels& kernels = fastest();
  const auto some = [&](int64_t from, int64_t to) {
    float* scores = scratch<float>(s, 2);
    for (int64_t r = from; r < to; ++r)
      kernels.attend(asked + r * width, key + r / k * key_rows, value + r / k * value_rows,
                     valid + r / k * masks, static_cast<int>(s), static_cast<int>(heads),
                     static_cast<int>(width / heads), scores, mixed + r * width, told + r * s);
  };
  if (n * k <= ALONE / 4)
    some(0, n * k);
  else
    shared_out(n * k, some);
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
    const Quantized q{bytes, scale, static_cast<int>(active)};
    shared_out(w.groups, [&](int64_t from, int64_t to) {
      for (int64_t group = from; group < to; ++group)
        kernels.cell(q, w, static_cast<int>(group), static_cast<int>(size), row);
    });
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
