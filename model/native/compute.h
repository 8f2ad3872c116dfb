// What the operators share: checks of what torch gives, scratch, threads, and the products of whole
// matrices that the kernels make in parts.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "kernels.h"

namespace seq2serve {

inline std::atomic<const Kernels*> chosen{nullptr};

inline const Kernels& fastest() {
  const Kernels* one = chosen.load(std::memory_order_relaxed);
  TORCH_CHECK(one != nullptr, "no kernels for this processor");
  return *one;
}

inline const float* floats(const at::Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_cpu() && t.is_contiguous(), name,
              ": expected contiguous float32 on the CPU");
  TORCH_CHECK(t.sizes() == shape, name, ": got shape ", t.sizes(), ", expected ", shape);
  return t.const_data_ptr<float>();
}

// [packed, compensation, scale, bias] of model/quantized.py, for `inputs` inputs.
inline Weights weights(at::TensorList t, int64_t inputs, const char* name) {
  TORCH_CHECK(t.size() == 4 && t[0].dim() == 5, name, ": expected four packed tensors");
  const int64_t groups = t[0].size(0), depth = t[0].size(1) * 4;
  TORCH_CHECK(t[0].scalar_type() == at::kChar && t[0].is_contiguous() && t[0].is_cpu() &&
                  t[0].sizes() == at::IntArrayRef({groups, depth / 4, 4, 16, 4}) &&
                  depth % DEPTH == 0 && inputs <= depth && depth - inputs < WIDTH,
              name, ": got packed weights ", t[0].sizes(), " for ", inputs, " inputs");
  TORCH_CHECK(t[1].scalar_type() == at::kInt && t[1].is_contiguous() &&
                  t[1].numel() == groups * WIDTH, name, ": compensation does not fit");
  return {t[0].const_data_ptr<int8_t>(), t[1].const_data_ptr<int32_t>(),
          floats(t[2], name, {groups * WIDTH}), floats(t[3], name, {groups * WIDTH}),
          static_cast<int>(groups), static_cast<int>(depth)};
}

// Of this thread, which keeps it.
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

// Rows as bytes, in this thread's scratch; `parts(r)` are the inputs of row r.
template <typename Inputs>
Quantized quantised(int64_t rows, const Weights& w, const Inputs& parts) {
  const Kernels& kernels = fastest();
  uint8_t* bytes = scratch<uint8_t>(rows * w.depth);
  float* scale = scratch<float>(rows);
  const auto some = [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r)
      scale[r] = kernels.quantise(parts(r), bytes + r * w.depth, w.depth);
  };
  if (rows <= ALONE)
    some(0, rows);
  else
    shared_out(rows, some);
  return {bytes, scale, static_cast<int>(rows)};
}

// Rows of `first` and `second` side by side.
inline Quantized quantised(const float* first, int64_t first_size, const float* second,
                           int64_t second_size, int64_t rows, const Weights& w) {
  return quantised(rows, w, [=](int64_t r) {
    return Parts{first + r * first_size, static_cast<int>(first_size), second + r * second_size,
                 static_cast<int>(second_size)};
  });
}

// Row `id` of a table, checked.
inline const float* row_of(const float* table, int64_t id, int64_t size, int64_t width) {
  TORCH_CHECK(0 <= id && id < size, "token ", id, " is not in a vocabulary of ", size);
  return table + id * width;
}

inline void cell_of(const Quantized& q, const Weights& w, int64_t size, const CellRow* row) {
  const Kernels& kernels = fastest();
  shared_out(w.groups, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group)
      kernels.cell(q, w, static_cast<int>(group), static_cast<int>(size), row);
  });
}

inline void linear_of(const Quantized& q, const Weights& w, int64_t size, bool tanh, float* out) {
  const Kernels& kernels = fastest();
  shared_out(w.groups, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group)
      kernels.linear(q, w, static_cast<int>(group), static_cast<int>(size), tanh, out);
  });
}

// Attended memory of sentences, each `hypotheses` rows of queries; strides are those of sentences.
struct Memory {
  const float *keys, *values;  // [sentences, sources, width]
  const bool* mask;            // [sentences, sources]
  int64_t key_stride, value_stride, mask_stride;
  int64_t sources, width, heads, hypotheses;
};

inline Memory memory_of(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& mask,
                        int64_t heads, int64_t hypotheses) {
  TORCH_CHECK(keys.dim() == 3 && values.dim() == 3, "attend: keys, values and mask do not fit");
  const int64_t n = keys.size(0), s = keys.size(1), width = keys.size(2);
  TORCH_CHECK(heads > 0 && width % heads == 0, "attend: ", heads, " heads for ", width);
  TORCH_CHECK(mask.scalar_type() == at::kBool && mask.sizes() == at::IntArrayRef({n, s}) &&
                  values.sizes() == keys.sizes() && keys.scalar_type() == at::kFloat &&
                  values.scalar_type() == at::kFloat && mask.stride(1) == 1 &&
                  keys.stride(2) == 1 && keys.stride(1) == width && values.stride(2) == 1 &&
                  values.stride(1) == width, "attend: keys, values and mask do not fit");
  return {keys.const_data_ptr<float>(), values.const_data_ptr<float>(), mask.const_data_ptr<bool>(),
          keys.stride(0), values.stride(0), mask.stride(0), s, width, heads, hypotheses};
}

// Contexts [rows, width] and weights [rows, sources] of queries [rows, width].
inline void attend_to(const Memory& m, const float* query, int64_t rows, float* context,
                      float* weights) {
  const Kernels& kernels = fastest();
  const auto some = [&](int64_t from, int64_t to) {
    float* scores = scratch<float>(m.sources, 2);
    for (int64_t r = from; r < to; ++r) {
      const int64_t i = r / m.hypotheses;
      kernels.attend(query + r * m.width, m.keys + i * m.key_stride, m.values + i * m.value_stride,
                     m.mask + i * m.mask_stride, static_cast<int>(m.sources),
                     static_cast<int>(m.heads), static_cast<int>(m.width / m.heads), scores,
                     context + r * m.width, weights + r * m.sources);
    }
  };
  if (rows <= ALONE / 4)
    some(0, rows);
  else
    shared_out(rows, some);
}

// The best of each row's logits, [rows, count] each, and where it is not null the normaliser.
struct Choice {
  int64_t count;
  float* values;
  int64_t* tokens;
  float* normaliser;
};

inline void spoil(const Quantized& q, int64_t row, const Choice& choice) {
  if (q.scale[row] != q.scale[row])
    std::fill(choice.values + row * choice.count, choice.values + (row + 1) * choice.count,
              std::numeric_limits<float>::quiet_NaN());
}

inline void best_of(const Quantized& q, const Weights& w, const Choice& choice) {
  const int64_t count = choice.count, rows = q.rows;
  const bool normalised = choice.normaliser != nullptr;
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
      choice.values[r * count + k] = lists[from * kept + r * count + at[from]];
      choice.tokens[r * count + k] = names[from * kept + r * count + at[from]];
      ++at[from];
    }
    if (normalised)
      choice.normaliser[r] =
          kernels.normaliser(maxima + r * w.groups, sums + r * w.groups, w.groups);
    spoil(q, r, choice);
  }
}

// The channels of each sentence: `common`, and its own among `candidates`, up to the first zero.
// Both ascend and have none in common.
struct Lists {
  const int8_t* rows;  // [channels, depth]: the weights channel by channel
  int64_t channels;
  const int32_t* common;
  int64_t shared;
  const int32_t* candidates;  // [sentences, most], of `stride`
  int64_t sentences, most, stride;
};

inline Lists lists_of(const at::Tensor& rows, const Weights& w, const at::Tensor& candidates,
                      const at::Tensor& common, int64_t total) {
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
  const Lists lists{rows.const_data_ptr<int8_t>(), rows.size(0), common.const_data_ptr<int32_t>(),
                    common.numel(), candidates.const_data_ptr<int32_t>(), candidates.size(0),
                    candidates.size(1) * candidates.size(2), candidates.stride(0)};
  const auto valid = [&](int32_t id) { return 0 < id && id < lists.channels; };
  TORCH_CHECK(std::all_of(lists.common, lists.common + lists.shared, valid),
              "listed: common names no channel");
  for (int64_t i = 0; i < lists.sentences; ++i) {
    const int32_t* first = lists.candidates + i * lists.stride;
    TORCH_CHECK(std::all_of(first, std::find(first, first + lists.most, 0), valid),
                "listed: a candidate is no channel of ", lists.channels);
  }
  return lists;
}

// As `best_of`, over the channels of each row's sentence; equally many rows for each.
inline void listed_of(const Quantized& q, const Weights& w, const Lists& lists,
                      const Choice& choice) {
  const int64_t k = q.rows / lists.sentences, count = choice.count;
  const bool normalised = choice.normaliser != nullptr;
  const Kernels& kernels = fastest();
  std::fill(choice.values, choice.values + q.rows * count,
            -std::numeric_limits<float>::infinity());
  std::fill(choice.tokens, choice.tokens + q.rows * count, 0);
  const auto some = [&](int64_t from, int64_t to) {
    int32_t* list = scratch<int32_t>(lists.shared + lists.most);
    const int64_t widest = (lists.shared + lists.most + WIDTH - 1) / WIDTH;
    float* maxima = normalised ? scratch<float>(2 * k * widest, 2) : nullptr;
    for (int64_t i = from; i < to; ++i) {
      const int32_t *first = lists.candidates + i * lists.stride,
                    *last = std::find(first, first + lists.most, 0);
      std::merge(lists.common, lists.common + lists.shared, first, last, list);
      const int listed = static_cast<int>(lists.shared + (last - first));
      Weights part = w;
      part.groups = (listed + WIDTH - 1) / WIDTH;
      float* sums = normalised ? maxima + k * part.groups : nullptr;
      const int64_t at = i * k;
      const Quantized rows_of{q.bytes + at * w.depth, q.scale + at, static_cast<int>(k)};
      const Best best{static_cast<int>(count), choice.values + at * count,
                      choice.tokens + at * count, maxima, sums};
      for (int group = 0; group < part.groups; ++group)
        kernels.listed(rows_of, part, {lists.rows, list, listed}, group, best);
      for (int64_t r = 0; r < k; ++r) {
        for (int64_t c = (at + r) * count; c < (at + r + 1) * count; ++c)
          choice.tokens[c] = list[choice.tokens[c]];
        if (normalised)
          choice.normaliser[at + r] = kernels.normaliser(maxima + r * part.groups,
                                                         sums + r * part.groups, part.groups);
        spoil(q, at + r, choice);
      }
    }
  };
  shared_out(lists.sentences, some);
}

}  // namespace seq2serve
