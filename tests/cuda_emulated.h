// Blocks of threads in plain C++, for a machine without a GPU: what handler/decoding/kernels.cu
// uses of CUDA. The threads of a block are fibers: one warp after another, the first or the last
// one first, comes as far as it can until the whole block has to meet. So a kernel that leaves out
// a meeting gives something else in one of the orders. Where not all come that have to, it is an
// abort. Included before kernels.cu.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(threads)

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr int WARP = 32;
constexpr size_t STACK = 1 << 15;

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "CUDA: %s\n", what);
  std::abort();
}

enum State { GOING, AT_WARP, AT_BLOCK, ENDED };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state = GOING;
  unsigned long long given = 0;  // to the other threads of its warp
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t home;
inline int current = 0;
inline bool backwards = false;
inline const std::function<void()>* body = nullptr;
inline const void* home_stack = nullptr;
inline size_t home_size = 0;

// What AddressSanitizer has to know of a change of stacks.
inline void leave(void** kept, const void* stack, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(kept, stack, size);
#endif
}
inline void arrive(void* kept, const void** stack, size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(kept, stack, size);
#endif
}

inline void wait(State where) {
  Fiber& mine = *fibers[current];
  mine.state = where;
  void* kept = nullptr;
  leave(&kept, home_stack, home_size);
  swapcontext(&mine.context, &home);
  arrive(kept, &home_stack, &home_size);
}

inline void entry() {
  arrive(nullptr, &home_stack, &home_size);
  (*body)();
  fibers[current]->state = ENDED;
  leave(nullptr, home_stack, home_size);  // and never comes back
}

inline void resume(int thread) {
  Fiber& one = *fibers[thread];
  current = thread;
  threadIdx.x = thread;
  void* kept = nullptr;
  leave(&kept, one.stack.get(), STACK);
  swapcontext(&home, &one.context);
  arrive(kept, nullptr, nullptr);
}

// Let those go on who wait `where` with everybody else of from..to; whether there were any.
inline bool released(int from, int to, State where) {
  for (int i = from; i < to; ++i)
    if (fibers[i]->state != where) return false;
  for (int i = from; i < to; ++i) fibers[i]->state = GOING;
  return true;
}

inline void block(int threads) {
  while (static_cast<int>(fibers.size()) < threads) fibers.emplace_back(new Fiber);
  for (int i = 0; i < threads; ++i) {
    Fiber& one = *fibers[i];
    one.state = GOING;
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.get();
    one.context.uc_stack.ss_size = STACK;
    one.context.uc_link = &home;
    makecontext(&one.context, entry, 0);
  }
  int ended = 0;
  do {
    // Each warp as far as it comes without the others.
    for (int i = 0; i < threads; i += WARP) {
      const int warp = backwards ? threads - WARP - i : i;
      do {
        for (int lane = 0; lane < WARP; ++lane) {
          const int thread = warp + (backwards ? WARP - 1 - lane : lane);
          if (fibers[thread]->state != GOING) continue;
          resume(thread);
          ended += fibers[thread]->state == ENDED;
        }
      } while (released(warp, warp + WARP, AT_WARP));
    }
    demand(ended == threads || released(0, threads, AT_BLOCK),
           "threads wait for others that do not come");
  } while (ended < threads);
}

using Kernel = std::function<void(void**)>;
inline std::map<std::string, Kernel> kernels;

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}

template <typename... A>
void add(const char* name, void (*kernel)(A...)) {
  kernels[name] = [kernel](void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
  };
}

inline void launch(const Kernel& kernel, Index grid, int threads, void** arguments) {
  demand(threads > 0 && threads <= 1024 && threads % WARP == 0, "a block of odd size");
  demand(grid.x > 0 && grid.y > 0 && grid.y <= 65535, "a grid of odd size");
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  const std::function<void()> once = [&] { kernel(arguments); };
  body = &once;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) block(threads);
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::AT_BLOCK); }

inline int atomicAdd(int* to, int more) { return std::exchange(*to, *to + more); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int apart) {
  static_assert(sizeof(T) <= 8);
  auto& all = emulated::fibers;
  std::memcpy(&all[emulated::current]->given, &value, sizeof value);
  emulated::wait(emulated::AT_WARP);
  std::memcpy(&value, &all[emulated::current ^ apart]->given, sizeof value);
  emulated::wait(emulated::AT_WARP);  // until all have read
  return value;
}

template <typename To, typename From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float half_to_float(unsigned short bits) { return same_bits<_Float16>(bits); }
inline unsigned short float_to_half(float x) {
  return same_bits<unsigned short>(static_cast<_Float16>(x));
}
