// What one thread does to a group of columns of a float32 model, for each kind of processor.
//
// Every sum goes over its inputs in their order, one fused multiply-add after the other, and each
// output has a sum of its own: what a row comes to depends on that row alone, to the last bit, and
// is the same on every processor.
#pragma once
#include <cstddef>

namespace seq2serve {

// A matrix [groups * 64, depth], packed by model/projection.py: [groups, depth, 64].
struct FloatWeights {
  const float* packed;
  const float* bias;  // [groups * 64]
  int groups;
  int depth;
};

// Row r begins at x + r * stride.
struct FloatRows {
  const float* x;
  size_t stride;
  int rows;
};

// For each row of a layer: what is added to its product, and where its states are.
struct FloatCellRow {
  const float* added;  // [groups * 64]
  const float* c;
  float* h_next;
  float* c_next;
};

struct FloatKernels {
  const char* name;
  // Group g of y = x W^T + b [rows, size], or its tanh.
  void (*linear)(const FloatRows& x, const FloatWeights& w, int group, int size, bool tanh,
                 float* y);
  // Group g: 16 units of an LSTM layer, whose gates i, f, o, g are the group's four panels.
  void (*cell)(const FloatRows& x, const FloatWeights& w, int group, int size,
               const FloatCellRow* rows);
  // One query [heads * size] over n keys and values: context [heads * size], mean weights [n].
  // Scores are v . tanh(query + key), v [heads * size]; or query . key where v is null.
  void (*attend)(const float* query, const float* keys, const float* values, const bool* mask,
                 const float* v, int n, int heads, int size, float* scratch, float* context,
                 float* weights);
};

extern const FloatKernels float_avx2, float_avx512;

}  // namespace seq2serve
