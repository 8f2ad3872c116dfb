// What a lane does with its tables (handler/decoding/native_lane.py), each in one call: sentences
// begin, move and are read, and one step of their search.
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "boards.h"

namespace {

using namespace seq2serve;
using at::Tensor;

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// One token for each of the first `count` sentences, of what a step offers: values and tokens
// [N, K, C] and the normaliser [N, K], empty where nothing is scored. The places of who ended.
c10::List<int64_t> search(const Tensor& values, const Tensor& tokens, const Tensor& normaliser,
                          int64_t eos, at::TensorList tables, int64_t count) {
  const Board board = board_of(tables);
  TORCH_CHECK(0 <= count && count <= places_of(tables), "search: ", count, " sentences");
  TORCH_CHECK(values.dim() == 3 && values.size(0) == count && values.size(1) == board.beams &&
                  values.size(2) > 0 && tokens.sizes() == values.sizes(),
              "search: got ", values.sizes(), " of ", count, " sentences");
  TORCH_CHECK(normaliser.numel() == count * board.beams ||
                  (board.beams == 1 && normaliser.numel() == 0),
              "search: got normalisers ", normaliser.sizes());
  const Tensor offered = values.contiguous(), ids = tokens.contiguous(),
               total = normaliser.contiguous();
  TORCH_CHECK(offered.scalar_type() == at::kFloat && ids.scalar_type() == at::kLong &&
                  total.scalar_type() == at::kFloat && offered.is_cpu() && ids.is_cpu() &&
                  total.is_cpu(), "search: expected float32 and int64 on the CPU");
  const Offer offer{offered.const_data_ptr<float>(), ids.const_data_ptr<int64_t>(),
                    total.numel() > 0 ? total.const_data_ptr<float>() : nullptr, values.size(2)};
  c10::List<int64_t> ended;
  for (int64_t n = 0; n < count; ++n)
    if (advance(board, n, offer, eos, search_scratch())) ended.push_back(n);
  return ended;
}

// The bytes of `rows` rows of a table.
size_t bytes_of(const Tensor& t, int64_t rows) {
  TORCH_CHECK(t.is_cpu() && t.dim() > 0 && t.is_contiguous(),
              "lane: expected contiguous tables on the CPU");
  int64_t row = t.element_size();
  for (int64_t i = 1; i < t.dim(); ++i) row *= t.size(i);
  return static_cast<size_t>(row * rows);
}

// Sentences begin at places: facts [m, FACTS], the most tokens of each, and their first state
// [m, ...], which all K rows of a sentence in `state` have.
void begin(at::TensorList tables, at::TensorList state, at::IntArrayRef places,
           at::ArrayRef<double> facts, at::IntArrayRef longest, int64_t bos,
           at::TensorList first) {
  const Board b = board_of(tables);
  const int64_t k = b.beams, all = places_of(tables);
  TORCH_CHECK(facts.size() == places.size() * FACTS && longest.size() == places.size() &&
                  first.size() == state.size(), "begin: facts of other sentences");
  for (int64_t place : places) TORCH_CHECK(0 <= place && place < all, "begin: place ", place);
  for (size_t i = 0; i < state.size(); ++i) {
    const Tensor from = first[i].contiguous();
    const size_t row = bytes_of(from, 1);
    TORCH_CHECK(bytes_of(state[i], 1) == row && from.size(0) == (int64_t)places.size() &&
                    from.scalar_type() == state[i].scalar_type(), "begin: state of other rows");
    char* to = static_cast<char*>(state[i].mutable_data_ptr());
    for (size_t j = 0; j < places.size(); ++j) {
      TORCH_CHECK((places[j] + 1) * k <= state[i].size(0), "begin: place ", places[j]);
      for (int64_t r = 0; r < k; ++r)
        std::memcpy(to + (places[j] * k + r) * row,
                    static_cast<const char*>(from.const_data_ptr()) + j * row, row);
    }
  }
  for (size_t j = 0; j < places.size(); ++j) {
    const int64_t n = places[j];
    std::copy(facts.begin() + j * FACTS, facts.begin() + (j + 1) * FACTS, b.facts + n * FACTS);
    b.longest[n] = longest[j];
    b.made[n] = 0;
    b.over[n] = false;
    for (int64_t r = 0; r < k; ++r) {
      b.previous[n * k + r] = bos;
      b.scores[n * k + r] = r == 0 ? 0.0f : NEVER;
      b.parents[n * k + r] = r;
      if (k > 1) b.ended_scores[n * k + r] = NEVER;
    }
  }
}

// In each table the `rows` rows of place origin[i] take those of target[i].
void move(at::TensorList tables, at::IntArrayRef origin, at::IntArrayRef target, int64_t rows) {
  TORCH_CHECK(origin.size() == target.size() && rows > 0, "move: ", origin, " to ", target);
  for (const Tensor& t : tables) {
    const size_t bytes = bytes_of(t, rows);
    const int64_t all = t.size(0) / rows;
    char* data = static_cast<char*>(t.mutable_data_ptr());
    for (size_t i = 0; i < origin.size(); ++i) {
      TORCH_CHECK(0 <= origin[i] && origin[i] < all && 0 <= target[i] && target[i] < all,
                  "move: ", origin[i], " to ", target[i], " of ", all);
      std::memmove(data + target[i] * bytes, data + origin[i] * bytes, bytes);
    }
  }
}

// The rows of some places, in the order of the tables; of what was said the first `most` tokens.
std::vector<Tensor> read(at::TensorList tables, at::IntArrayRef places, int64_t most) {
  board_of(tables);
  const int64_t all = places_of(tables);
  for (int64_t place : places) TORCH_CHECK(0 <= place && place < all, "read: place ", place);
  std::vector<Tensor> found;
  for (const Tensor& t : tables) {
    auto shape = t.sizes().vec();
    shape[0] = places.size();
    const int64_t parts = t.dim() == 3 ? t.size(1) : 1;
    if (t.dim() == 3) shape[2] = std::clamp<int64_t>(most, 0, t.size(2));
    Tensor some = at::empty(shape, t.options());
    const size_t from = bytes_of(t, 1), to = bytes_of(some, 1);
    const char* source = static_cast<const char*>(t.const_data_ptr());
    char* target = static_cast<char*>(some.mutable_data_ptr());
    for (size_t i = 0; i < places.size(); ++i)
      for (int64_t part = 0; part < parts; ++part)
        std::memcpy(target + i * to + part * (to / parts),
                    source + places[i] * from + part * (from / parts), to / parts);
    found.push_back(std::move(some));
  }
  return found;
}

// Rows of state in the order of the hypotheses: row k of a sentence is its row parents[n, k].
std::vector<Tensor> reorder(at::TensorList state, const Tensor& parents) {
  const int64_t n = parents.size(0), k = parents.size(1);
  const int64_t* parent = table<int64_t>(parents, at::kLong, {n, k});
  for (int64_t i = 0; i < n * k; ++i)
    TORCH_CHECK(0 <= parent[i] && parent[i] < k, "reorder: parent ", parent[i]);
  std::vector<Tensor> found;
  for (const Tensor& given : state) {
    const Tensor t = given.contiguous();
    TORCH_CHECK(t.size(0) == n * k, "reorder: ", t.size(0), " rows of ", n * k);
    Tensor next = at::empty_like(t);
    const size_t row = bytes_of(t, 1);
    const char* from = static_cast<const char*>(t.const_data_ptr());
    char* to = static_cast<char*>(next.mutable_data_ptr());
    for (int64_t i = 0; i < n * k; ++i)
      std::memcpy(to + i * row, from + (i / k * k + parent[i]) * row, row);
    found.push_back(std::move(next));
  }
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(seq2serve, CompositeExplicitAutograd, m) {
  m.impl("search", search);
  m.impl("begin", begin);
  m.impl("move", move);
  m.impl("read", read);
  m.impl("reorder", reorder);
}
