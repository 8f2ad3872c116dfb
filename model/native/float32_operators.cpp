// The float32 kernels as operators of TorchScript; see operators.cpp for int8. Each is one parallel
// region over groups of columns, so that every row is computed by the same code.
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "compute.h"
#include "float32.h"

namespace {

using at::Tensor;
using seq2serve::FloatCellRow;
using seq2serve::FloatKernels;
using seq2serve::FloatRows;
using seq2serve::FloatWeights;
using seq2serve::floats;
using seq2serve::scratch;
using seq2serve::shared_out;

constexpr int64_t COLUMNS = 64, LANES = 16;  // of a group; of one of its four panels

const FloatKernels* named(const std::string& name) {
  __builtin_cpu_init();
  const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = narrow && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  if (wide && (name.empty() || name == "avx512")) return &seq2serve::float_avx512;
  if (narrow && (name.empty() || name == "avx2")) return &seq2serve::float_avx2;
  return nullptr;
}

std::atomic<const FloatKernels*> chosen{nullptr};

const FloatKernels& fastest() {
  const FloatKernels* one = chosen.load(std::memory_order_relaxed);
  if (one == nullptr) chosen = one = named("");
  TORCH_CHECK(one != nullptr, "no float32 kernels for this processor");
  return *one;
}

std::string use(const std::string& name) {
  const FloatKernels* one = named(name);
  if (one != nullptr) chosen = one;
  return one == nullptr ? "" : one->name;
}

// [packed, bias] of model/projection.py, for `inputs` inputs.
FloatWeights weights(at::TensorList t, int64_t inputs, const char* name) {
  TORCH_CHECK(t.size() == 2 && t[0].dim() == 3, name, ": expected two packed tensors");
  const int64_t groups = t[0].size(0);
  return {floats(t[0], name, {groups, inputs, COLUMNS}), floats(t[1], name, {groups * COLUMNS}),
          static_cast<int>(groups), static_cast<int>(inputs)};
}

// Rows of `first` and `second` side by side, in this thread's scratch where there are two. Rows of
// a scratch begin at different places of a cache's sets.
FloatRows beside(const float* first, int64_t first_size, const float* second, int64_t second_size,
                 int64_t rows) {
  if (second_size == 0) return {first, static_cast<size_t>(first_size), static_cast<int>(rows)};
  if (first_size == 0) return {second, static_cast<size_t>(second_size), static_cast<int>(rows)};
  const int64_t stride = first_size + second_size + LANES;
  float* joined = scratch<float>(rows * stride);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(joined + r * stride, first + r * first_size, first_size * sizeof(float));
    std::memcpy(joined + r * stride + first_size, second + r * second_size,
                second_size * sizeof(float));
  }
  return {joined, static_cast<size_t>(stride), static_cast<int>(rows)};
}

Tensor linear(const Tensor& x, const Tensor& more, at::TensorList packed, int64_t size, bool tanh) {
  const int64_t rows = x.size(0), inputs = x.size(1), further = more.size(1);
  const FloatWeights w = weights(packed, inputs + further, "float_linear");
  TORCH_CHECK(0 < size && size <= w.groups * COLUMNS && w.groups * COLUMNS - size < COLUMNS,
              "float_linear: ", size, " outputs of ", w.groups, " groups");
  const FloatRows both = beside(floats(x, "x", {rows, inputs}), inputs,
                                further ? floats(more, "more", {rows, further}) : nullptr, further,
                                rows);
  Tensor y = at::empty({rows, size}, x.options());
  float* out = y.mutable_data_ptr<float>();
  const FloatKernels& kernels = fastest();
  shared_out(w.groups, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group)
      kernels.linear(both, w, static_cast<int>(group), static_cast<int>(size), tanh, out);
  });
  return y;
}

std::tuple<Tensor, Tensor> cell(const Tensor& x, const Tensor& h, const Tensor& c,
                                at::TensorList packed) {
  const int64_t rows = h.size(0), size = h.size(1), inputs = x.size(1);
  const FloatWeights w = weights(packed, inputs + size, "float_cell");
  TORCH_CHECK((size + LANES - 1) / LANES == w.groups, "float_cell: state of ", size, " for ",
              w.groups, " groups");
  const FloatRows both = beside(floats(x, "x", {rows, inputs}), inputs,
                                floats(h, "h", {rows, size}), size, rows);
  const float* cells = floats(c, "c", {rows, size});
  Tensor h_next = at::empty_like(h), c_next = at::empty_like(c);
  FloatCellRow* row = scratch<FloatCellRow>(rows);
  for (int64_t r = 0; r < rows; ++r)
    row[r] = {w.bias, cells + r * size, h_next.mutable_data_ptr<float>() + r * size,
              c_next.mutable_data_ptr<float>() + r * size};
  const FloatKernels& kernels = fastest();
  shared_out(w.groups, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group)
      kernels.cell(both, w, static_cast<int>(group), static_cast<int>(size), row);
  });
  return {h_next, c_next};
}

// One direction of an encoder layer over packed sequences, see torch's PackedSequence: `sizes`
// int64 [S] rows at each step, which never grow, and `added` [sum of sizes, groups * 64], the
// input's product. Returns y [sum of sizes, H] and the last states [N, H].
std::tuple<Tensor, Tensor, Tensor> layer(const Tensor& added, const Tensor& sizes,
                                         at::TensorList packed, int64_t size, bool backwards) {
  const FloatWeights w = weights(packed, size, "float_layer");
  const int64_t width = w.groups * COLUMNS, steps = sizes.size(0);
  TORCH_CHECK((size + LANES - 1) / LANES == w.groups, "float_layer: state of ", size, " for ",
              w.groups, " groups");
  TORCH_CHECK(sizes.scalar_type() == at::kLong && sizes.is_cpu() && sizes.is_contiguous() &&
                  steps > 0, "float_layer: sizes");
  const int64_t* live = sizes.const_data_ptr<int64_t>();
  std::vector<int64_t> offset(steps);
  int64_t total = 0;
  for (int64_t t = 0; t < steps; ++t) {
    TORCH_CHECK(0 < live[t] && live[t] <= live[t ? t - 1 : 0], "float_layer: sizes grow");
    offset[t] = total;
    total += live[t];
  }
  const float* inputs = floats(added, "added", {total, width});
  Tensor y = at::empty({total, size}, added.options());
  Tensor h_last = at::zeros({live[0], size}, y.options()), c_last = at::zeros_like(h_last);
  float* out = y.mutable_data_ptr<float>();
  float *h = h_last.mutable_data_ptr<float>(), *c = c_last.mutable_data_ptr<float>();
  FloatCellRow* row = scratch<FloatCellRow>(live[0]);
  const FloatKernels& kernels = fastest();
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t t = backwards ? steps - 1 - i : i;
    for (int64_t r = 0; r < live[t]; ++r)
      row[r] = {inputs + (offset[t] + r) * width, c + r * size, out + (offset[t] + r) * size,
                c + r * size};
    const FloatRows states{h, static_cast<size_t>(size), static_cast<int>(live[t])};
    shared_out(w.groups, [&](int64_t from, int64_t to) {
      for (int64_t group = from; group < to; ++group)
        kernels.cell(states, w, static_cast<int>(group), static_cast<int>(size), row);
    });
    std::memcpy(h, out + offset[t] * size, live[t] * size * sizeof(float));
  }
  return {y, h_last, c_last};
}

// `score` [heads, A / heads] of additive attention; empty for scaled products.
std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& keys, const Tensor& values,
                                  const Tensor& mask, const Tensor& score, int64_t heads) {
  const int64_t n = keys.size(0), s = keys.size(1), width = keys.size(2), k = query.size(1);
  const float* asked = floats(query, "query", {n, k, width});
  TORCH_CHECK(heads > 0 && width % heads == 0, "float_attend: ", heads, " heads for ", width);
  TORCH_CHECK(mask.scalar_type() == at::kBool && mask.sizes() == at::IntArrayRef({n, s}) &&
                  values.sizes() == keys.sizes() && keys.scalar_type() == at::kFloat &&
                  values.scalar_type() == at::kFloat && mask.stride(1) == 1 &&
                  keys.stride(2) == 1 && keys.stride(1) == width && values.stride(2) == 1 &&
                  values.stride(1) == width, "float_attend: keys, values and mask do not fit");
  const float* v = score.numel() ? floats(score, "score", {heads, width / heads}) : nullptr;
  Tensor context = at::empty({n, k, width}, query.options());
  Tensor shares = at::empty({n, k, s}, query.options());
  float* mixed = context.mutable_data_ptr<float>();
  float* told = shares.mutable_data_ptr<float>();
  const float *key = keys.const_data_ptr<float>(), *value = values.const_data_ptr<float>();
  const bool* valid = mask.const_data_ptr<bool>();
  const int64_t key_rows = keys.stride(0), value_rows = values.stride(0), masks = mask.stride(0);
  const FloatKernels& kernels = fastest();
  const auto some = [&](int64_t from, int64_t to) {
    float* scores = scratch<float>(s);
    for (int64_t r = from; r < to; ++r)
      kernels.attend(asked + r * width, key + r / k * key_rows, value + r / k * value_rows,
                     valid + r / k * masks, v, static_cast<int>(s), static_cast<int>(heads),
                     static_cast<int>(width / heads), scores, mixed + r * width, told + r * s);
  };
  constexpr int64_t ALONE = 2;  // rows that are done before a second thread would have begun
  if (n * k <= ALONE)
    some(0, n * k);
  else
    shared_out(n * k, some);
  return {context, shares};
}

}  // namespace

// Schemas: see handler/decoding/native.py.
TORCH_LIBRARY_IMPL(seq2serve, CompositeExplicitAutograd, m) {
  m.impl("float_use", use);
  m.impl("float_linear", linear);
  m.impl("float_cell", cell);
  m.impl("float_layer", layer);
  m.impl("float_attend", attend);
}
