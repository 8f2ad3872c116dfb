// The kernels of a decoding step on a GPU, which handler/decoding/kernels.py compiles and launches,
// with search.cu behind; what they compute is said there. They are CUDA C++ without any header, as
// NVRTC may find none.
//
// A row is reduced in an order that its own size decides: neither the rows beside it nor padding
// behind its sentence changes a bit of it. Every argument but `Tables` is a pointer or a long long.

constexpr int THREADS = 512;  // of a block of `attend` and `choose`
constexpr int WARPS = THREADS / 32;
constexpr int MOST_STEPS = 4096;  // source tokens that `attend` keeps the weights of
constexpr int MOST_TABLES = 64;   // of one `gather_rows`
constexpr int MOST_NEVER = 8;     // ids that `choose` may be forbidden
constexpr int AHEAD = 8;          // logits that a thread has on their way to it
constexpr int FEW = 6;            // so many greatest are found one by one sooner than by sorting
constexpr int KEPT = 1024;        // keys that `choose` sorts at once

struct Half {
  unsigned short bits;
};
struct Brain {  // bfloat16: the upper half of a float
  unsigned short bits;
};

// What is summed up in: float, but for double.
template <typename T>
struct Wide {
  typedef float type;
};
template <>
struct Wide<double> {
  typedef double type;
};

#ifdef __CUDACC__
__device__ inline float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ inline float wide(float x) { return x; }
__device__ inline double wide(double x) { return x; }
__device__ inline float wide(Half x) { return half_to_float(x.bits); }
__device__ inline float wide(Brain x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(double* to, double x) { *to = x; }
__device__ inline void put(Half* to, float x) { to->bits = float_to_half(x); }
__device__ inline void put(Brain* to, float x) {  // to the nearest, from half way to the even one
  const unsigned bits = __float_as_uint(x);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float tangent(float x) { return tanhf(x); }
__device__ inline double tangent(double x) { return tanh(x); }
template <typename S>
__device__ S sigmoid(S x) {
  return S(1) / (S(1) + exponential(-x));
}
__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

// W values that are read at once.
template <typename T, int W>
struct __align__(W * sizeof(T)) Pack {
  T at[W];
};

// `merge` over a warp, then over the warps of a block in their order; the same for every thread.
template <typename S, typename Merge>
__device__ S over_warp(S x, Merge merge) {
  for (int apart = 16; apart > 0; apart /= 2) x = merge(x, __shfl_xor_sync(0xffffffffu, x, apart));
  return x;
}
template <typename S, typename Merge>
__device__ S over_block(S x, S* of_warps, Merge merge) {
  x = over_warp(x, merge);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warps[0];
  for (int i = 1; i < WARPS; ++i) x = merge(x, of_warps[i]);
  __syncthreads();  // before anything else is put there
  return x;
}
struct Plus {
  template <typename S>
  __device__ S operator()(S a, S b) const {
    return a + b;
  }
};
struct Greater {
  template <typename S>
  __device__ S operator()(S a, S b) const {
    return a < b ? b : a;
  }
};

// gates, more [R, 4H], bias [4H] or null, c [R, H] -> h, c [R, H]; gates are i, f, o, g.
// A thread for each unit: grid (R, H / block).
template <typename T>
__global__ void lstm_pointwise(const T* gates, const T* more, const T* bias, const T* c, T* h_next,
                               T* c_next, long long size) {
  typedef typename Wide<T>::type S;
  const long long row = blockIdx.x, unit = blockIdx.y * (long long)blockDim.x + threadIdx.x;
  if (unit >= size) return;
  S gate[4];
  for (int i = 0; i < 4; ++i) {
    const long long at = row * 4 * size + i * size + unit;
    gate[i] = wide(gates[at]) + wide(more[at]);
    if (bias != nullptr) gate[i] += wide(bias[i * size + unit]);
  }
  const long long at = row * size + unit;
  const S next = sigmoid(gate[1]) * wide(c[at]) + sigmoid(gate[0]) * tangent(gate[3]);
  put(c_next + at, next);
  put(h_next + at, sigmoid(gate[2]) * tangent(next));
}

struct Tables {
  const char* from[MOST_TABLES];
  char* to[MOST_TABLES];
  long long bytes[MOST_TABLES];  // of a row
};

template <typename Unit>
__device__ void copy(const char* from, char* to, long long bytes) {
  for (long long i = threadIdx.x; i < bytes / (long long)sizeof(Unit); i += blockDim.x)
    reinterpret_cast<Unit*>(to)[i] = reinterpret_cast<const Unit*>(from)[i];
}

// Rows `origin` of each table, one after another. A block for each row: grid (rows, tables).
__global__ void gather_rows(const Tables tables, const long long* origin) {
  const long long bytes = tables.bytes[blockIdx.y];
  const char* from = tables.from[blockIdx.y] + origin[blockIdx.x] * bytes;
  char* to = tables.to[blockIdx.y] + blockIdx.x * bytes;
  const unsigned long long all = reinterpret_cast<unsigned long long>(from) |
                                 reinterpret_cast<unsigned long long>(to) | bytes;
  if (all % 16 == 0)
    copy<Pack<unsigned, 4>>(from, to, bytes);
  else if (all % 4 == 0)
    copy<unsigned>(from, to, bytes);
  else
    copy<char>(from, to, bytes);
}

// query [N*K, A], keys and values [N, S, A], mask [N, S] -> context [N*K, A], weights [N*K, S].
// `..._n` and `..._s`: elements from one sentence, or source token, to the next. W elements are
// read at once: A / heads, addresses and strides are multiples of it. A block for each hypothesis.
template <typename T, int W>
__global__ void __launch_bounds__(THREADS)
    attend(const T* query, const T* keys, const T* values, const bool* mask, T* context,
           typename Wide<T>::type* weights, long long beams, long long steps, long long width,
           long long heads, long long keys_n, long long keys_s, long long values_n,
           long long values_s, long long mask_n, long long mask_s) {
  typedef typename Wide<T>::type S;
  typedef Pack<T, W> Packed;
  __shared__ S shares[MOST_STEPS];
  __shared__ S of_warps[WARPS];
  __shared__ S parts[THREADS * W];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const long long row = blockIdx.x, n = row / beams;
  const int head = static_cast<int>(width / heads);
  query += row * width, context += row * width, weights += row * steps;
  keys += n * keys_n, values += n * values_n, mask += n * mask_n;

  // What is masked at the end is not there. Small whole numbers are exact in S.
  S last = 0;
  for (int s = thread; s < steps; s += THREADS) {
    weights[s] = 0;
    if (mask[s * mask_s]) last = s + 1;
  }
  const int length = static_cast<int>(over_block(last, of_warps, Greater()));

  // Threads side by side take a head's elements, and groups of such threads every so many tokens.
  const int across = (head + W - 1) / W < THREADS ? (head + W - 1) / W : THREADS;
  const int groups = THREADS / across, group = thread / across, place = thread % across;

  for (int h = 0; h < heads; ++h) {
    const T* q = query + h * head;
    for (int s = warp; s < length; s += WARPS) {
      S score = -infinity();
      if (mask[s * mask_s]) {
        const T* key = keys + s * keys_s + h * head;
        score = 0;
#pragma unroll 4
        for (int d = lane * W; d < head; d += 32 * W) {
          const Packed a = *reinterpret_cast<const Packed*>(q + d);
          const Packed b = *reinterpret_cast<const Packed*>(key + d);
          for (int i = 0; i < W; ++i) score += wide(a.at[i]) * wide(b.at[i]);
        }
        score = over_warp(score, Plus());
      }
      if (lane == 0) shares[s] = score;
    }
    __syncthreads();
    S top = -infinity(), sum = 0;
    for (int s = thread; s < length; s += THREADS) top = Greater()(top, shares[s]);
    top = over_block(top, of_warps, Greater());
    for (int s = thread; s < length; s += THREADS) {
      shares[s] = mask[s * mask_s] ? exponential(shares[s] - top) : S(0);
      sum += shares[s];
    }
    sum = over_block(sum, of_warps, Plus());
    for (int s = thread; s < length; s += THREADS) {
      shares[s] /= sum;
      weights[s] += shares[s];  // which no other thread touches
    }
    __syncthreads();
    for (int first = 0; first * W < head; first += across) {
      const int d = (first + place) * W;
      S total[W] = {};
      if (group < groups && d < head) {
#pragma unroll 4
        for (int s = group; s < length; s += groups) {
          const Packed v = *reinterpret_cast<const Packed*>(values + s * values_s + h * head + d);
          for (int i = 0; i < W; ++i) total[i] += shares[s] * wide(v.at[i]);
        }
      }
      for (int i = 0; i < W; ++i) parts[thread * W + i] = total[i];
      __syncthreads();
      if (group == 0 && d < head) {
        for (int i = 0; i < W; ++i) {
          S sum_of_groups = 0;
          for (int g = 0; g < groups; ++g) sum_of_groups += parts[(g * across + place) * W + i];
          put(context + h * head + d + i, sum_of_groups);
        }
      }
      // No meeting: there are either several groups or several turns, and in those a thread reads
      // only its own parts; the next head has meetings before it writes any.
    }
  }
  for (int s = thread; s < length; s += THREADS) weights[s] /= heads;
}

// A logit and its id as one number, greater for what is chosen first: NaN before all, equals by id.
// Never 0.
__device__ inline unsigned long long ranked(float x, unsigned id) {
  const unsigned bits = __float_as_uint(x);
  unsigned order = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  if (x != x) order = 0xffffffffu;
  return static_cast<unsigned long long>(order) << 32 | (0xffffffffu - id);
}

typedef unsigned long long Key;

// To the front what is greater.
__device__ inline void exchange(Key& front, Key& back) {
  const Key a = front, b = back;
  if (a < b) front = b, back = a;
}

// Sort lists side by side, the greatest first, each of which falls and then rises or the reverse;
// `size` keys in all. It is half of a bitonic sort. `size` and `length` are powers of 2.
__device__ inline void descend(Key* keys, int size, int length) {
  for (int apart = length / 2; apart > 0; apart /= 2) {
    for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
      const int at = i / apart * 2 * apart + i % apart;
      exchange(keys[at], keys[at + apart]);
    }
    __syncthreads();
  }
}

__device__ inline void sort(Key* keys, int size) {
  for (int run = 1; run < size; run *= 2) {
    for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
      const int first = i / run * 2 * run, place = i % run;
      exchange(keys[first + place], keys[first + 2 * run - 1 - place]);
    }
    __syncthreads();
    descend(keys, size, run);
  }
}

// logits [R, V], never [forbidden] -> values and tokens [R, count], normaliser [R] or null; `count`
// is at most THREADS. A block for each row.
//
// Each thread looks through every so many logits for its best. The last of the `count` greatest of
// those bounds what is chosen, and only threads whose best is not below it have any of that. Their
// logits are looked through again, and what is not below the bound is sorted. Where that is more
// than has room, the sorted part gives a higher bound.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    choose(const T* logits, const long long* never, float* values, long long* tokens,
           float* normaliser, long long vocabulary, long long forbidden, long long count) {
  __shared__ Key best_of_threads[THREADS];
  __shared__ Key kept[KEPT];
  __shared__ Key of_warps[WARPS];
  __shared__ float scratch[WARPS];
  __shared__ int counted;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const long long row = blockIdx.x;
  const unsigned size = static_cast<unsigned>(vocabulary);
  logits += row * vocabulary, values += row * count, tokens += row * count;
  unsigned banned[MOST_NEVER];
  for (int i = 0; i < MOST_NEVER; ++i)
    banned[i] = i < forbidden ? static_cast<unsigned>(never[i]) : 0xffffffffu;
  const auto logit = [&](unsigned id) {
    float x = wide(logits[id]);
    for (int i = 0; i < MOST_NEVER; ++i)
      if (id == banned[i]) x = -infinity();
    return x;
  };

  Key mine = 0;
  float top = -infinity(), sum = 0;  // of exp(x - top)
  for (unsigned first = thread; first < size; first += AHEAD * THREADS) {
    float ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const unsigned id = first + i * THREADS;
      ahead[i] = id < size ? logit(id) : -infinity();
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const unsigned id = first + i * THREADS;
      const float x = ahead[i];
      if (id < size) mine = Greater()(mine, ranked(x, id));
      if (x > top)
        sum = sum * expf(top - x) + 1, top = x;
      else if (x != -infinity())
        sum += x == top ? 1.0f : expf(x - top);  // infinity - infinity would be NaN
    }
  }
  if (normaliser != nullptr) {
    const float greatest = over_block(top, scratch, Greater());
    sum = over_block(top == greatest ? sum : sum * expf(top - greatest), scratch, Plus());
    if (thread == 0) normaliser[row] = greatest + logf(sum);
  }

  Key bound = ~Key(0);
  if (count <= FEW) {
    for (long long i = 0; i < count; ++i) {
      bound = over_block(mine < bound ? mine : Key(0), of_warps, Greater());
      if (thread == 0) best_of_threads[i] = bound;
    }
  } else {
    best_of_threads[thread] = mine;
    __syncthreads();
    sort(best_of_threads, THREADS);
    bound = best_of_threads[count - 1];
  }
  int found;
  do {
    if (thread == 0) counted = 0;
    __syncthreads();
    for (long long i = warp; i < count; i += WARPS) {
      const unsigned owner = (0xffffffffu - static_cast<unsigned>(best_of_threads[i])) % THREADS;
      for (unsigned id = owner + lane * THREADS; id < size; id += 32 * THREADS) {
        const Key key = ranked(logit(id), id);
        if (key < bound) continue;
        const int at = atomicAdd(&counted, 1);  // in any order: they are sorted below
        if (at < KEPT) kept[at] = key;
      }
    }
    __syncthreads();
    found = counted;
    int room = 1;
    while (room < found && room < KEPT) room *= 2;
    for (int i = found + thread; i < room; i += THREADS) kept[i] = 0;
    __syncthreads();
    sort(kept, room);
    bound = kept[count - 1];
  } while (found > KEPT);
  for (long long i = thread; i < count; i += THREADS) {
    const unsigned id = 0xffffffffu - static_cast<unsigned>(kept[i]);
    values[i] = logit(id), tokens[i] = id;
  }
}
