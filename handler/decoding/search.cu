// The search of one step, in place: `advance` of handler/decoding/static_search.py, which says what
// it is. Compiled behind kernels.cu.

constexpr int MOST_BEAM = 64;
constexpr int ROOM = MOST_BEAM * MOST_BEAM;  // keys of the lists of `advance_beam`, or tokens

enum Fact {  // as in columns.py
  BEGAN, MAY_END, N_BEST, SOURCE, SHIFT, SCALE, PENALTY, COVERAGE, MAX_NORMALISER, HOPELESS, FACTS
};

// K = 1. A thread for each sentence.
__global__ void advance_one(const float* values, const long long* tokens, const float* normaliser,
                            long long eos, const double* facts, const long long* longest,
                            long long* made, bool* over, long long* previous, float* scores,
                            long long* said, long long sentences, long long choices,
                            long long room) {
  const long long n = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (n >= sentences || over[n]) return;
  const long long have = made[n];
  const bool left_out = facts[n * FACTS + MAY_END] > have && tokens[n * choices] == eos;
  const long long token = tokens[n * choices + left_out];
  const float total = scores[n] - normaliser[n] + values[n * choices + left_out];
  said[n * room + (have < room ? have : room - 1)] = token;
  previous[n] = token, scores[n] = total, made[n] = have + 1;
  const bool finite = total < infinity() && total > -infinity();
  over[n] = token == eos || !finite || have + 1 >= longest[n];
}

// The first `count` tokens of rows `from`, one after another in `to`; what lies there may be among
// them. `some` has place for ROOM.
__device__ inline void gather_tokens(const long long* const* from, long long* to, int rows,
                                     int count, long long room, long long* some) {
  const int most = ROOM / rows;
  for (int first = 0; first < count; first += most) {
    const int columns = most < count - first ? most : count - first;
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
      const int row = i / columns;
      if (from[row] != to + row * room) some[i] = from[row][first + i % columns];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
      const int row = i / columns;
      if (from[row] != to + row * room) to[row * room + first + i % columns] = some[i];
    }
    __syncthreads();
  }
}

// Whether score a stays before b, which is from behind it: NaN comes before all, and equals stay.
__device__ inline bool stays(double a, double b) { return a != a || a >= b; }

// K > 1. A block for each sentence.
//
// The candidates of a hypothesis are a list, best first, of which 2K are enough. Pairs of lists
// become one, the greater half of both, until there is one: the best 2K, equals in the order of
// hypotheses and, within one, of its list.
__global__ void __launch_bounds__(THREADS)
    advance_beam(const float* values, const long long* tokens, const float* normaliser,
                 long long eos, double* facts, const long long* longest, long long* made,
                 bool* over, long long* previous, float* scores, long long* parents,
                 long long* said, double* ended_scores, float* ended_sums, long long* ended_made,
                 long long* ended_said, long long beams, long long choices, long long room) {
  __shared__ union {
    Key keys[ROOM];
    long long tokens[ROOM];
  } scratch;
  // Of the best 2K:
  __shared__ float total[2 * MOST_BEAM];
  __shared__ long long token[2 * MOST_BEAM];
  __shared__ int parent[2 * MOST_BEAM];
  __shared__ bool ends[2 * MOST_BEAM];
  // Of K that have ended before and K that may end now:
  __shared__ double score[2 * MOST_BEAM];
  __shared__ float sum[2 * MOST_BEAM];
  __shared__ long long length[2 * MOST_BEAM];

  __shared__ int left_out[MOST_BEAM];  // the place of EOS, or none
  __shared__ const long long* from[MOST_BEAM];
  __shared__ double hopeless;
  const int thread = threadIdx.x, threads = blockDim.x, k = static_cast<int>(beams);
  const int offered = static_cast<int>(choices) - 1;
  const long long n = blockIdx.x;
  values += n * k * choices, tokens += n * k * choices, normaliser += n * k;
  facts += n * FACTS, previous += n * k, scores += n * k, parents += n * k, said += n * k * room;
  ended_scores += n * k, ended_sums += n * k, ended_made += n * k, ended_said += n * k * room;
  if (over[n]) {
    for (int i = thread; i < k; i += threads) parents[i] = i;
    return;
  }
  const long long have = made[n];
  const int written = static_cast<int>(have < room ? have : room);

  for (int i = thread; i < k; i += threads) left_out[i] = offered + 1;
  if (thread == 0) hopeless = facts[HOPELESS];
  __syncthreads();
  if (facts[MAY_END] > have) {
    for (int i = thread; i < k * (offered + 1); i += threads)
      if (tokens[i] == eos) left_out[i / (offered + 1)] = i % (offered + 1);
  }
  __syncthreads();
  const auto place_of = [&](int row, int i) {  // of candidate i of a hypothesis, in what is given
    return row * (offered + 1) + i + (i >= left_out[row]);
  };
  const auto total_of = [&](int row, int i) {
    const float before = scores[row];  // what is not there stays so
    return values[place_of(row, i)] +
           (before == -infinity() ? before : before - normaliser[row]);
  };
  const auto key_of = [&](int row, int i) {
    return row < k && i < offered ? ranked(total_of(row, i), row * offered + i) : Key(0);
  };

  int lists = 1, size = 2;
  while (2 * lists < k) lists *= 2;
  while (size < 2 * k) size *= 2;
  Key* keys = scratch.keys;
  for (int i = thread; i < lists * size; i += threads)
    keys[i] = Greater()(key_of(i / size, i % size), key_of(i / size + lists, size - 1 - i % size));
  __syncthreads();
  for (descend(keys, lists * size, size); lists > 1; descend(keys, lists * size, size)) {
    lists /= 2;
    for (int i = thread; i < lists * size; i += threads)
      keys[i] = Greater()(keys[i], keys[(i / size + lists) * size + size - 1 - i % size]);
    __syncthreads();
  }
  for (int i = thread; i < 2 * k; i += threads) {
    const int place = static_cast<int>(0xffffffffu - static_cast<unsigned>(keys[i]));
    parent[i] = place / offered;
    total[i] = total_of(parent[i], place % offered);
    token[i] = tokens[place_of(parent[i], place % offered)];
    ends[i] = token[i] == eos && total[i] > -infinity();
  }
  __syncthreads();

  // Those with EOS among the first K end; what ended stays in order.
  bool any = false;
  for (int i = 0; i < k; ++i) any = any || ends[i];
  if (any) {
    const double counted = have + 1 > 1 ? have + 1 : 1;
    const double divisor = pow((facts[SHIFT] + counted) / facts[SCALE], facts[PENALTY]);
    for (int i = thread; i < 2 * k; i += threads) {
      if (i < k) {
        score[i] = ended_scores[i], sum[i] = ended_sums[i], length[i] = ended_made[i];
      } else {
        sum[i] = ends[i - k] ? total[i - k] : -infinity();
        score[i] = sum[i] / divisor, length[i] = have;
      }
    }
    __syncthreads();
    for (int i = thread; i < 2 * k; i += threads) {
      int rank = 0;
      for (int j = 0; j < 2 * k; ++j)
        rank += j < i ? stays(score[j], score[i]) : !stays(score[i], score[j]);
      if (rank >= k) continue;
      from[rank] = i < k ? ended_said + i * room : said + parent[i - k] * room;
      ended_scores[rank] = score[i], ended_sums[rank] = sum[i], ended_made[rank] = length[i];
      if (rank + 1 == static_cast<int>(facts[N_BEST])) hopeless = score[i] * facts[MAX_NORMALISER];
    }
    __syncthreads();
    gather_tokens(from, ended_said, k, written, room, scratch.tokens);
  }

  // The first K of the others go on. At most K end, one of each hypothesis.
  for (int i = thread; i < 2 * k; i += threads) {
    int rank = 0;
    for (int j = 0; j < i; ++j) rank += !ends[j];
    if (ends[i] || rank >= k) continue;
    // A sentence whose best continuation is not finite has no second one.
    const bool last = rank == 0 && !(total[0] < infinity());
    scores[rank] = last ? total[0] : total[i];
    parents[rank] = parent[i], previous[rank] = token[i];
    from[rank] = said + parent[i] * room;
  }
  __syncthreads();
  gather_tokens(from, said, k, written, room, scratch.tokens);
  for (int i = thread; i < k; i += threads)
    said[i * room + (have < room ? have : room - 1)] = previous[i];
  if (thread == 0) {
    const float best = scores[0];
    facts[HOPELESS] = hopeless;
    made[n] = have + 1;
    over[n] = !(best > hopeless && best < infinity()) || have + 1 >= longest[n];
  }
}
