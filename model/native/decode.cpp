// Several steps of a lane of an int8 model in one call: the network, the choice of tokens and the
// search, until a sentence has ended or the time is over. Each step is `best` of
// model/quantized.py, by the same kernels, and `advance` of search.h.
#include <torch/library.h>

#include <chrono>
#include <tuple>
#include <vector>

#include "boards.h"
#include "compute.h"

namespace {

using namespace seq2serve;
using at::Tensor;

// One LSTM layer. Where it is folded, a token's part of the gates is a row of `table`.
struct Layer {
  Weights gates;
  const float* table;
  int64_t vocabulary, inputs, size;
  bool residual;
};

// What `QuantizedModel.parts` tells.
struct Network {
  std::vector<Layer> layers;
  const int8_t* embedding = nullptr;  // [V, E]; null where nothing reads it beside the table
  const float* embedding_scale = nullptr;
  int64_t words = 0, embedded = 0;
  bool attends = false, listed = false;
  Weights query{}, readout{}, generator{};
  int64_t heads = 0, features = 0, vocabulary = 0;
  Memory memory{};
  Lists lists{};
};

// Takes what a network is made of, one after the other.
struct Taking {
  at::TensorList tensors;
  at::IntArrayRef numbers;
  size_t tensor = 0, number = 0;

  const Tensor& next() {
    TORCH_CHECK(tensor < tensors.size(), "decode: too few parts of a network");
    return tensors[tensor++];
  }
  int64_t count() {
    TORCH_CHECK(number < numbers.size(), "decode: too few numbers of a network");
    return numbers[number++];
  }
  Weights packed(int64_t inputs, const char* name) {
    TORCH_CHECK(tensor + 4 <= tensors.size(), "decode: too few parts of a network");
    tensor += 4;
    return weights(tensors.slice(tensor - 4, 4), inputs, name);
  }
};

Network network_of(at::TensorList parts, at::IntArrayRef numbers, at::TensorList state,
                   at::TensorList attended, int64_t sentences, int64_t beams) {
  Taking take{parts, numbers};
  Network net;
  const int64_t layers = take.count();
  TORCH_CHECK(layers > 0 && state.size() == 2 * static_cast<size_t>(layers),
              "decode: state of ", state.size(), " tables for ", layers, " layers");
  if (take.count()) {
    const Tensor &rows = take.next(), &scale = take.next();
    TORCH_CHECK(rows.scalar_type() == at::kChar && rows.is_contiguous() && rows.dim() == 2,
                "decode: embedding");
    net.words = rows.size(0), net.embedded = rows.size(1);
    net.embedding = rows.const_data_ptr<int8_t>();
    net.embedding_scale = floats(scale, "embedding", {net.words});
  }
  int64_t width = net.embedded;
  for (int64_t i = 0; i < layers; ++i) {
    Layer layer{};
    layer.residual = take.count() != 0;
    layer.size = state[i].size(1);
    const Tensor& table = take.next();
    const bool folded = table.numel() > 0;
    TORCH_CHECK(folded || width > 0, "decode: nothing for layer ", i, " to read");
    TORCH_CHECK(!layer.residual || width == layer.size, "decode: residual layer ", i);
    layer.inputs = folded ? 0 : width;
    layer.gates = take.packed(layer.inputs + layer.size, "layer");
    TORCH_CHECK((layer.size + 15) / 16 == layer.gates.groups, "decode: state of layer ", i);
    layer.vocabulary = folded ? table.size(0) : 0;
    layer.table = folded ? floats(table, "table", {table.size(0), layer.gates.groups * WIDTH})
                         : nullptr;
    net.layers.push_back(layer);
    width = layer.size;
  }
  net.heads = take.count();
  net.features = width;
  if (net.heads > 0) {
    TORCH_CHECK(attended.size() >= 3 && attended[0].size(0) == sentences, "decode: memory");
    net.attends = true;
    net.memory = memory_of(attended[0], attended[1], attended[2], net.heads, beams);
    net.query = take.packed(width, "query");
    net.readout = take.packed(width + net.memory.width, "readout");
    net.features = take.count();
    for (const auto& [w, size] : {std::pair{net.query, net.memory.width},
                                  std::pair{net.readout, net.features}})
      TORCH_CHECK(0 < size && size <= w.groups * WIDTH && w.groups * WIDTH - size < WIDTH,
                  "decode: ", size, " outputs of ", w.groups, " groups");
  }
  net.vocabulary = take.count();
  net.generator = take.packed(net.features, "generator");
  TORCH_CHECK(0 < net.vocabulary && net.vocabulary <= net.generator.groups * WIDTH,
              "decode: vocabulary of ", net.vocabulary);
  net.listed = take.count() != 0;
  if (net.listed) {
    const Tensor &rows = take.next(), &common = take.next();
    TORCH_CHECK(!attended.empty() && attended.back().size(0) == sentences, "decode: candidates");
    net.lists = lists_of(rows, net.generator, attended.back(), common, sentences * beams);
  }
  TORCH_CHECK(take.tensor == parts.size() && take.number == numbers.size(),
              "decode: more parts than a network has");
  return net;
}

// Floats of this thread, kept from call to call, that `fit` gives one after the other.
struct Arena {
  std::vector<float> kept;
  size_t used = 0;

  static Arena& own(size_t count) {
    static thread_local Arena arena;
    if (arena.kept.size() < count) arena.kept.resize(count);
    arena.used = 0;
    return arena;
  }
  float* fit(size_t count) { return kept.data() + (used += count) - count; }
};

// Where a step puts what it makes.
struct Made {
  float *embedded, *added, *query, *context, *weights, *features, *values, *normaliser;
  std::vector<int64_t> tokens, origin;
};

using Tables = std::vector<float*>;

// One step of the network: what it offers, [rows, count]; `state` -> `next`.
void step(const Network& net, const Board& board, const Tables& state, const Tables& next,
          int64_t rows, int64_t count, bool normalised, Made& made) {
  const int64_t layers = net.layers.size(), k = board.beams;
  for (int64_t r = 0; r < rows; ++r) made.origin[r] = r / k * k + board.parents[r];
  const float* x = nullptr;
  if (net.embedding != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = board.previous[r];
      TORCH_CHECK(0 <= token && token < net.words, "token ", token, " is not in a vocabulary of ",
                  net.words);
      const int8_t* row = net.embedding + token * net.embedded;
      for (int64_t i = 0; i < net.embedded; ++i)
        made.embedded[r * net.embedded + i] =
            static_cast<float>(row[i]) * net.embedding_scale[token];
    }
    x = made.embedded;
  }
  for (int64_t l = 0; l < layers; ++l) {
    const Layer& layer = net.layers[l];
    const int64_t size = layer.size, width = layer.gates.groups * WIDTH;
    const float *h = state[l], *c = state[layers + l];
    float *h_next = next[l], *c_next = next[layers + l];
    CellRow* row = scratch<CellRow>(rows);
    for (int64_t r = 0; r < rows; ++r)
      row[r] = {layer.table == nullptr
                    ? layer.gates.bias
                    : row_of(layer.table, board.previous[r], layer.vocabulary, width),
                c + made.origin[r] * size, h_next + r * size, c_next + r * size};
    const Quantized q = quantised(rows, layer.gates, [&](int64_t r) {
      return Parts{x + r * layer.inputs, static_cast<int>(layer.inputs),
                   h + made.origin[r] * size, static_cast<int>(size)};
    });
    cell_of(q, layer.gates, size, row);
    if (layer.residual)
      for (int64_t i = 0; i < rows * size; ++i) made.added[i] = h_next[i] + x[i];
    x = layer.residual ? made.added : h_next;
  }
  int64_t width = net.layers.back().size;
  if (net.attends) {
    const int64_t asked = net.memory.width;
    linear_of(quantised(x, width, nullptr, 0, rows, net.query), net.query, asked, false,
              made.query);
    attend_to(net.memory, made.query, rows, made.context, made.weights);
    linear_of(quantised(x, width, made.context, asked, rows, net.readout), net.readout,
              net.features, true, made.features);
    x = made.features, width = net.features;
  }
  const Quantized q = quantised(x, width, nullptr, 0, rows, net.generator);
  const Choice choice{count, made.values, made.tokens.data(),
                      normalised ? made.normaliser : nullptr};
  if (net.listed)
    listed_of(q, net.generator, net.lists, choice);
  else
    best_of(q, net.generator, choice);
}

Tables tables_of(at::TensorList state, int64_t rows, const Network& net) {
  Tables found;
  for (size_t i = 0; i < state.size(); ++i) {
    floats(state[i], "state", {rows, net.layers[i % net.layers.size()].size});
    found.push_back(state[i].mutable_data_ptr<float>());
  }
  return found;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Up to `steps` steps of the first `count` sentences, fewer where one ends or the steady clock
// comes to `until`, in seconds. How many were made, and the places of who ended. Steps write the
// new state into `spare` and `state` in turns: after an odd number it is in `spare`.
std::tuple<int64_t, c10::List<int64_t>> decode(
    at::TensorList tables, at::TensorList state, at::TensorList spare, at::TensorList attended,
    at::TensorList parts, at::IntArrayRef numbers, int64_t eos, int64_t count, bool normalised,
    int64_t steps, double until) {
  const Board board = board_of(tables);
  const int64_t k = board.beams, rows = count * k;
  TORCH_CHECK(0 < count && count <= places_of(tables), "decode: ", count, " sentences");
  TORCH_CHECK(normalised || k == 1, "decode: beams need scores");
  TORCH_CHECK(spare.size() == state.size(), "decode: spare state");
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK(0 <= board.parents[i] && board.parents[i] < k, "decode: parent ",
                board.parents[i]);
  for (const Tensor& t : state) TORCH_CHECK(t.dim() == 2, "decode: state ", t.sizes());
  const Network net = network_of(parts, numbers, state, attended, count, k);
  Tables current = tables_of(state, rows, net), next = tables_of(spare, rows, net);

  const int64_t most = std::min(k == 1 ? 2 : 2 * k + 1, net.vocabulary);
  const int64_t widest = net.layers.back().size, asked = net.memory.width;
  const int64_t each[] = {net.embedded, 0, asked, asked, net.memory.sources, net.features, most, 1};
  int64_t added = 0;
  for (const Layer& layer : net.layers) added = std::max(added, layer.residual ? layer.size : 0);
  size_t needed = added + widest;
  for (int64_t one : each) needed += one;
  Arena& arena = Arena::own(needed * rows);
  Made made{};
  float** const places[] = {&made.embedded, &made.added,    &made.query,  &made.context,
                            &made.weights,  &made.features, &made.values, &made.normaliser};
  for (size_t i = 0; i < 8; ++i) *places[i] = arena.fit((i == 1 ? added : each[i]) * rows);
  made.tokens.resize(rows * most);
  made.origin.resize(rows);

  c10::List<int64_t> ended;
  int64_t done = 0;
  while (done < steps && ended.empty()) {
    bool left_out = false;  // whether EOS is for anybody
    for (int64_t n = 0; n < count && !left_out; ++n) left_out = is_short(board, n);
    const int64_t choices = std::min((k == 1 ? 1 : 2 * k) + (left_out ? 1 : 0), net.vocabulary);
    step(net, board, current, next, rows, choices, normalised, made);
    std::swap(current, next);
    const Offer offer{made.values, made.tokens.data(), normalised ? made.normaliser : nullptr,
                      choices};
    for (int64_t n = 0; n < count; ++n)
      if (advance(board, n, offer, eos, search_scratch())) ended.push_back(n);
    ++done;
    if (now() >= until) break;
  }
  return {done, ended};
}

}  // namespace

TORCH_LIBRARY_IMPL(seq2serve, CompositeExplicitAutograd, m) { m.impl("decode", decode); }
