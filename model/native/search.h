// The search of one step for one sentence, in place: `advance` of handler/decoding/static_search.py,
// which says what it is. Knows no torch.
#pragma once
#include <cstdint>
#include <vector>

namespace seq2serve {

enum Fact {  // as in handler/decoding/columns.py
  BEGAN, MAY_END, N_BEST, SOURCE, SHIFT, SCALE, PENALTY, COVERAGE, MAX_NORMALISER, HOPELESS, FACTS
};

// Tables of places that sentences may have, K hypotheses each: `Board` there.
struct Board {
  int64_t beams, room;  // K, and tokens for which there is room
  double* facts;        // [N, FACTS]
  int64_t* longest;
  int64_t* made;
  bool* over;
  int64_t* previous;  // [N, K]
  float* scores;      // [N, K]
  int64_t* parents;   // [N, K]
  int64_t* said;      // [N, K, room]
  // Of what has ended; null where K is 1.
  double* ended_scores;  // [N, K]
  float* ended_sums;     // [N, K]
  int64_t* ended_made;   // [N, K]
  int64_t* ended_said;   // [N, K, room]
};

// What a step offers to each row: its best logits with their tokens, [N * K, choices], best first.
// One more than 2K (than 1 where K is 1) are enough where EOS must not come yet.
struct Offer {
  const float* values;
  const int64_t* tokens;
  const float* normaliser;  // [N * K], log sum exp of all; null where nothing is scored
  int64_t choices;
};

// Kept from step to step, so that nothing is allocated in one.
struct Search {
  std::vector<float> totals;
  std::vector<int64_t> heads, parents, tokens, moved;
  std::vector<double> scores;
  std::vector<float> sums;
  std::vector<int64_t> order, lengths;
  std::vector<uint8_t> ends;
  std::vector<const int64_t*> from;
};

// Whether the sentence at a place must not end with its next token.
bool is_short(const Board& board, int64_t place);

// One token for the sentence at a place, unless it is over. Whether it is over now.
bool advance(const Board& board, int64_t place, const Offer& offer, int64_t eos, Search& search);

}  // namespace seq2serve
