// What torch gives as the tables of `Board`, checked.
#pragma once
#include <ATen/ATen.h>

#include "search.h"

namespace seq2serve {

template <typename T>
T* table(const at::Tensor& t, at::ScalarType type, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == type && t.is_cpu() && t.is_contiguous() && t.sizes() == shape,
              "board: got a table of ", t.scalar_type(), " ", t.sizes(), ", expected ", type, " ",
              shape);
  return t.mutable_data_ptr<T>();
}

// In the order of `Board.tables`.
inline Board board_of(at::TensorList t) {
  TORCH_CHECK((t.size() == 8 || t.size() == 12) && t[7].dim() == 3,
              "board: expected 8 tables, or 12 of beams");
  const int64_t n = t[7].size(0), k = t[7].size(1), room = t[7].size(2);
  TORCH_CHECK(k > 0 && room > 0 && (k == 1) == (t.size() == 8), "board: got ", k,
              " hypotheses in ", t.size(), " tables");
  Board b{k, room, table<double>(t[0], at::kDouble, {n, FACTS}),
          table<int64_t>(t[1], at::kLong, {n}), table<int64_t>(t[2], at::kLong, {n}),
          table<bool>(t[3], at::kBool, {n}), table<int64_t>(t[4], at::kLong, {n, k}),
          table<float>(t[5], at::kFloat, {n, k}), table<int64_t>(t[6], at::kLong, {n, k}),
          table<int64_t>(t[7], at::kLong, {n, k, room}), nullptr, nullptr, nullptr, nullptr};
  if (k > 1) {
    b.ended_scores = table<double>(t[8], at::kDouble, {n, k});
    b.ended_sums = table<float>(t[9], at::kFloat, {n, k});
    b.ended_made = table<int64_t>(t[10], at::kLong, {n, k});
    b.ended_said = table<int64_t>(t[11], at::kLong, {n, k, room});
  }
  return b;
}

inline int64_t places_of(at::TensorList board) { return board[7].size(0); }

// This thread's, kept from call to call.
inline Search& search_scratch() {
  static thread_local Search kept;
  return kept;
}

}  // namespace seq2serve
