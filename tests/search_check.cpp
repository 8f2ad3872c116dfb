// Searches of random offers, NaN, infinity and equals among them, in tables of exactly the size that
// they may touch: built with sanitizers by tests/test_native_lane.py, which wants the exit code 0.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "../model/native/search.h"

using namespace seq2serve;

uint32_t seed = 7;
int draw(int most) { return static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 16) % most; }

constexpr float EVER = std::numeric_limits<float>::infinity();
constexpr int64_t EOS = 3;

float odd() {
  const float some[] = {EVER, -EVER, -EVER, std::nanf(""), 0.0f, 1.0f};
  return some[draw(6)];
}

int check(int round) {
  const int64_t n = 1 + draw(3), k = 1 + draw(round % 10 == 0 ? 64 : 7), room = 1 + draw(12);
  const int64_t choices = 1 + draw(static_cast<int>(2 * k + 2));
  std::vector<double> facts(n * FACTS, 0.0), ended_scores(n * k, -EVER);
  std::vector<int64_t> longest(n), made(n), previous(n * k), parents(n * k), said(n * k * room),
      ended_made(n * k), ended_said(n * k * room);
  std::vector<float> scores(n * k, -EVER), ended_sums(n * k);
  bool over[3] = {false, false, false};
  for (int64_t i = 0; i < n; ++i) {
    double* fact = &facts[i * FACTS];
    fact[MAY_END] = draw(5), fact[N_BEST] = draw(static_cast<int>(k) + 2), fact[SCALE] = 1.0;
    fact[PENALTY] = draw(3), fact[MAX_NORMALISER] = 1.0, fact[HOPELESS] = -EVER;
    longest[i] = 1 + draw(static_cast<int>(room)), scores[i * k] = 0.0f, over[i] = draw(9) == 0;
  }
  const Board board{k, room, facts.data(), longest.data(), made.data(), over, previous.data(),
                    scores.data(), parents.data(), said.data(),
                    k > 1 ? ended_scores.data() : nullptr, k > 1 ? ended_sums.data() : nullptr,
                    k > 1 ? ended_made.data() : nullptr, k > 1 ? ended_said.data() : nullptr};
  Search search;
  for (int step = 0; step < 15; ++step) {
    std::vector<float> values(n * k * choices), normaliser(n * k);
    std::vector<int64_t> tokens(n * k * choices);
    for (int64_t r = 0; r < n * k; ++r) {
      float value = static_cast<float>(draw(5));
      normaliser[r] = draw(40) ? value + 1.0f : odd();
      for (int64_t c = 0; c < choices; ++c) {
        values[r * choices + c] = draw(40) ? value : odd();
        tokens[r * choices + c] = draw(9);
        value -= static_cast<float>(draw(2));
      }
    }
    const bool scored = k > 1 || draw(2);
    const Offer offer{values.data(), tokens.data(), scored ? normaliser.data() : nullptr, choices};
    for (int64_t i = 0; i < n; ++i) {
      const bool before = over[i];
      const int64_t have = made[i];
      const bool short_of = is_short(board, i);
      if (advance(board, i, offer, EOS, search) != over[i]) return 1;
      if (before && (made[i] != have || !over[i])) return 2;
      if (!before && made[i] != have + 1) return 3;
      if (!before && made[i] >= longest[i] && !over[i]) return 4;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t row = i * k + j;
        if (parents[row] < 0 || parents[row] >= k) return 5;
        if (!before && said[row * room + std::min(have, room - 1)] != previous[row]) return 6;
        if (!before && short_of && previous[row] == EOS && scores[row] > -EVER) return 7;
        if (k > 1 && ended_scores[row] > -EVER && ended_made[row] > have) return 8;
        if (k > 1 && j > 0 && ended_scores[row] > ended_scores[row - 1]) return 9;
      }
    }
  }
  return 0;
}

int main() {
  for (int round = 0; round < 3000; ++round)
    if (const int wrong = check(round)) {
      std::printf("round %d: %d\n", round, wrong);
      return wrong;
    }
  return 0;
}
