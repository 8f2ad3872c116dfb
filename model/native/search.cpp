#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace seq2serve {
namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr float EVER = std::numeric_limits<float>::infinity();

// Whether a comes before b: NaN before all; of equals none does.
template <typename Float>
bool before(Float a, Float b) {
  return b != b ? false : a != a || a > b;
}

// The next choice of a row, from `at` on, that may be taken; EOS may not where it is left out.
int64_t next(const int64_t* tokens, int64_t at, int64_t choices, bool left_out, int64_t eos) {
  while (left_out && at < choices && tokens[at] == eos) ++at;
  return at;
}

bool one(const Board& b, int64_t n, const Offer& offer, int64_t eos) {
  const int64_t *tokens = offer.tokens + n * offer.choices, have = b.made[n];
  const int64_t at = next(tokens, 0, offer.choices, is_short(b, n), eos);
  const bool none = at == offer.choices;
  const float value = none ? NEVER : offer.values[n * offer.choices + at];
  const int64_t token = none ? eos : tokens[at];
  const float total =
      offer.normaliser == nullptr ? value : b.scores[n] - offer.normaliser[n] + value;
  b.said[n * b.room + std::min(have, b.room - 1)] = token;
  b.previous[n] = token;
  b.scores[n] = total;
  b.made[n] = have + 1;
  return token == eos || !std::isfinite(total) || have + 1 >= b.longest[n];
}

// The best 2K continuations of a sentence, best first; of equals the earlier hypothesis, then the
// earlier choice. Each row's are in order, so the next best is always one of K.
int64_t candidates(const Board& b, int64_t n, const Offer& offer, int64_t eos, Search& s) {
  const int64_t k = b.beams, first = n * k;
  const bool left_out = is_short(b, n);
  const auto place = [&](int64_t row) { return (first + row) * offer.choices; };
  const auto total = [&](int64_t row) {
    if (s.heads[row] >= offer.choices) return NEVER;
    const float score = b.scores[first + row];
    // What is not there stays so, whatever the model makes of its row.
    const float offset = score == NEVER ? NEVER : score - offer.normaliser[first + row];
    return offer.values[place(row) + s.heads[row]] + offset;
  };
  s.heads.assign(k, 0);
  s.sums.resize(k);  // of each row's next choice
  s.totals.clear(), s.parents.clear(), s.tokens.clear();
  const auto go_to = [&](int64_t row, int64_t at) {
    s.heads[row] = next(offer.tokens + place(row), at, offer.choices, left_out, eos);
    s.sums[row] = total(row);
  };
  for (int64_t row = 0; row < k; ++row) go_to(row, 0);
  while (static_cast<int64_t>(s.totals.size()) < 2 * k) {
    int64_t best = -1;
    for (int64_t row = 0; row < k; ++row)
      if (s.heads[row] < offer.choices && (best < 0 || before(s.sums[row], s.sums[best])))
        best = row;
    if (best < 0) break;
    s.totals.push_back(s.sums[best]);
    s.parents.push_back(best);
    s.tokens.push_back(offer.tokens[place(best) + s.heads[best]]);
    go_to(best, s.heads[best] + 1);
  }
  return static_cast<int64_t>(s.totals.size());
}

// Rows `from` one after another in `to`, the first `count` tokens of each; what lies there may be
// among them.
void gather(Search& s, int64_t* to, int64_t count, int64_t room) {
  const auto& from = s.from;
  auto& moved = s.moved;
  const int64_t rows = static_cast<int64_t>(from.size());
  moved.resize(rows * count);
  for (int64_t i = 0; i < rows; ++i)
    if (from[i] != to + i * room) std::copy(from[i], from[i] + count, moved.data() + i * count);
  for (int64_t i = 0; i < rows; ++i)
    if (from[i] != to + i * room)
      std::copy(moved.data() + i * count, moved.data() + (i + 1) * count, to + i * room);
}

// Those with EOS among the first K end. Of what has ended the K best stay, equals in order.
void finish(const Board& b, int64_t n, Search& s) {
  const int64_t k = b.beams, first = n * k, have = b.made[n];
  double* facts = b.facts + n * FACTS;
  const double length = static_cast<double>(std::max<int64_t>(have + 1, 1));
  const double divisor = std::pow((facts[SHIFT] + length) / facts[SCALE], facts[PENALTY]);
  s.scores.resize(2 * k), s.sums.resize(2 * k), s.lengths.resize(2 * k), s.order.resize(2 * k);
  for (int64_t i = 0; i < k; ++i) {
    s.scores[i] = b.ended_scores[first + i];
    s.sums[i] = b.ended_sums[first + i];
    s.lengths[i] = b.ended_made[first + i];
    s.sums[k + i] = s.ends[i] ? s.totals[i] : NEVER;
    s.scores[k + i] = static_cast<double>(s.sums[k + i]) / divisor;
    s.lengths[k + i] = have;
  }
  for (int64_t i = 0; i < 2 * k; ++i) s.order[i] = i;
  std::stable_sort(s.order.begin(), s.order.end(),
                   [&](int64_t i, int64_t j) { return before(s.scores[i], s.scores[j]); });
  auto& from = s.from;
  from.resize(k);
  int64_t most = 0;
  for (int64_t rank = 0; rank < k; ++rank) {
    const int64_t i = s.order[rank];
    b.ended_scores[first + rank] = s.scores[i];
    b.ended_sums[first + rank] = s.sums[i];
    b.ended_made[first + rank] = s.lengths[i];
    from[rank] = i < k ? b.ended_said + (first + i) * b.room
                       : b.said + (first + s.parents[i - k]) * b.room;
    if (s.scores[i] > NEVER) most = std::max(most, s.lengths[i]);
  }
  gather(s, b.ended_said + first * b.room, std::min(most, b.room), b.room);
  // A log probability only falls, lp only grows, so the best score that a hypothesis of log
  // probability s <= 0 can reach is s / lp(max_length + 1).
  const int64_t last = static_cast<int64_t>(facts[N_BEST]) - 1;
  facts[HOPELESS] = b.ended_scores[first + std::clamp<int64_t>(last, 0, k - 1)] *
                    facts[MAX_NORMALISER];
}

bool many(const Board& b, int64_t n, const Offer& offer, int64_t eos, Search& s) {
  const int64_t k = b.beams, first = n * k, have = b.made[n];
  const int64_t found = candidates(b, n, offer, eos, s);
  bool any = false;
  s.ends.assign(std::max(found, k), 0);
  for (int64_t i = 0; i < found; ++i) {
    s.ends[i] = s.tokens[i] == eos && s.totals[i] > NEVER;
    any = any || (i < k && s.ends[i]);
  }
  s.totals.resize(std::max(found, k), NEVER);
  s.parents.resize(s.totals.size(), 0);
  s.tokens.resize(s.totals.size(), eos);
  if (any) finish(b, n, s);

  // The first K of the others go on. At most K end, one of each hypothesis. A sentence whose best
  // continuation is not finite has no second one.
  const float best = s.totals[0];
  auto& from = s.from;
  from.resize(k);
  int64_t rank = 0;
  bool moves = false;
  for (int64_t i = 0; i < found && rank < k; ++i) {
    if (s.ends[i]) continue;
    b.scores[first + rank] = rank == 0 && !(best < EVER) ? best : s.totals[i];
    b.parents[first + rank] = s.parents[i];
    b.previous[first + rank] = s.tokens[i];
    from[rank] = b.said + (first + s.parents[i]) * b.room;
    moves = moves || s.parents[i] != rank;
    ++rank;
  }
  for (; rank < k; ++rank) {  // a vocabulary of fewer tokens than there are hypotheses
    b.scores[first + rank] = rank == 0 && !(best < EVER) ? best : NEVER;
    b.parents[first + rank] = rank;
    b.previous[first + rank] = eos;
    from[rank] = b.said + (first + rank) * b.room;
  }
  if (moves) gather(s, b.said + first * b.room, std::min(have, b.room), b.room);
  for (int64_t i = 0; i < k; ++i)
    b.said[(first + i) * b.room + std::min(have, b.room - 1)] = b.previous[first + i];
  b.made[n] = have + 1;
  const float now = b.scores[first];
  const bool going = now > b.facts[n * FACTS + HOPELESS] && now < EVER;
  return !going || have + 1 >= b.longest[n];
}

}  // namespace

bool is_short(const Board& board, int64_t place) {
  return board.facts[place * FACTS + MAY_END] > static_cast<double>(board.made[place]);
}

bool advance(const Board& board, int64_t place, const Offer& offer, int64_t eos, Search& search) {
  if (board.over[place]) {
    for (int64_t i = 0; i < board.beams; ++i) board.parents[place * board.beams + i] = i;
    return true;
  }
  const bool ended = board.beams == 1 ? one(board, place, offer, eos)
                                      : many(board, place, offer, eos, search);
  board.over[place] = ended;
  return ended;
}

}  // namespace seq2serve
