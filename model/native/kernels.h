// What one thread does to a part of the rows or of the columns, for each kind of processor.
//
// Weights are int8, one scale for each output channel; activations are 8 bits with one scale for
// each row, so that no row depends on another. Products are exact integers, and everything in
// floating point is done in one order (vector.h): every processor gives the same bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace seq2serve {

constexpr int WIDTH = 64;  // output channels of a group: four panels of sixteen
constexpr int DEPTH = 64;  // inputs are filled up to a multiple of it

// A matrix [groups * 64, depth], packed by model/quantized.py: [groups, depth / 4, 4, 16, 4].
struct Weights {
  const int8_t* packed;
  const int32_t* compensation;  // [groups * 64]: -128 * the sum of each channel's weights
  const float* scale;           // [groups * 64]
  const float* bias;            // [groups * 64]
  int groups;
  int depth;
};

// Rows of bytes: activation / scale, rounded, plus 128.
struct Quantized {
  const uint8_t* bytes;  // [rows, depth]
  const float* scale;    // [rows]; not finite where the row was not
  int rows;
};

// Up to two vectors that stand one behind the other as one input.
struct Parts {
  const float* first;
  int first_size;
  const float* second;
  int second_size;
};

// For each row: what is added to its product, and where its states are.
struct CellRow {
  const float* added;  // [groups * 64]: a bias, a row of a table or an input's product
  const float* c;
  float* h_next;
  float* c_next;
};

struct Best {
  int count;
  float* values;   // [rows, count], greatest first; all -inf at first
  int64_t* tokens;  // [rows, count]
  float* maxima;   // [rows, groups] of each group's logits; null where nobody needs a normaliser
  float* sums;     // [rows, groups] of exp(logit - maximum)
};

// Some channels of a matrix whose weights also lie channel by channel.
struct List {
  const int8_t* rows;  // [channels, depth]
  const int32_t* ids;  // of channels, `count` of them
  int count;
};

struct Kernels {
  const char* name;
  // One row -> its bytes, filled up to `depth`, and its scale.
  float (*quantise)(const Parts& parts, uint8_t* bytes, int depth);
  // Group g: 16 units of an LSTM layer, whose gates i, f, o, g are the group's four panels.
  void (*cell)(const Quantized& x, const Weights& w, int group, int size, const CellRow* rows);
  // Group g of y = x W^T + b [rows, size], or its tanh.
  void (*linear)(const Quantized& x, const Weights& w, int group, int size, bool tanh, float* y);
  // Group g of logits, of which only the best are kept; a channel with a bias of -inf never is.
  void (*best)(const Quantized& x, const Weights& w, int group, const Best& best);
  // Group g of the logits of a list, as `best`; tokens are places in the list. `w.groups` and the
  // groups of `best` are those of the list: 64 channels each.
  void (*listed)(const Quantized& x, const Weights& w, const List& list, int group,
                 const Best& best);
  // log sum exp of a row, of the groups' maxima and sums.
  float (*normaliser)(const float* maxima, const float* sums, int groups);
  // One query [heads * size] over n keys and values: context [heads * size], mean weights [n].
  void (*attend)(const float* query, const float* keys, const float* values, const bool* mask,
                 int n, int heads, int size, float* scratch, float* context, float* weights);
};

// The fastest that this processor has, or null. `named` asks for one of them.
const Kernels* kernels(const char* named = nullptr);

extern const Kernels avx2, avx512, amx;

}  // namespace seq2serve
