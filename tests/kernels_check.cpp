// handler/decoding/kernels.cu and search.cu without a GPU, see cuda_emulated.h. As a library it stands in for
// CUDA's driver, and tests/test_kernels.py compares what comes out with plain torch. As a program,
// built with sanitizers, it runs every kernel on random shapes in buffers of exactly the size that
// it may touch, with its threads in both orders, which have to agree to the last bit.
#include "cuda_emulated.h"
// After it:
#include "../handler/decoding/kernels.cu"
#include "../handler/decoding/search.cu"

namespace {

template <typename T, int W>
void of_type(const std::string& name) {
  const std::string wide = std::to_string(W);
  emulated::add(("lstm_pointwise<" + name + ">").c_str(), lstm_pointwise<T>);
  emulated::add(("attend<" + name + ", 1>").c_str(), attend<T, 1>);
  emulated::add(("attend<" + name + ", " + wide + ">").c_str(), attend<T, W>);
}

const bool known = [] {
  of_type<float, 4>("float");
  of_type<Half, 8>("Half");
  of_type<Brain, 8>("Brain");
  of_type<double, 2>("double");
  emulated::add("choose<float>", choose<float>);
  emulated::add("choose<Half>", choose<Half>);
  emulated::add("choose<Brain>", choose<Brain>);
  emulated::add("gather_rows", gather_rows);
  emulated::add("advance_one", advance_one);
  emulated::add("advance_beam", advance_beam);
  return true;
}();

uint32_t seed = 7;
int draw(int most) { return static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 16) % most; }

void fill(float& x) { x = static_cast<float>(draw(2001) - 1000) / 500.0f; }
void fill(double& x) { x = (draw(2001) - 1000) / 500.0; }
void fill(Half& x) { x.bits = float_to_half(static_cast<float>(draw(2001) - 1000) / 500.0f); }
void fill(Brain& x) { put(&x, static_cast<float>(draw(2001) - 1000) / 500.0f); }

void fill(long long& x) { x = 0; }
void fill(bool& x) { x = draw(4) > 0; }
void fill(char& x) { x = static_cast<char>(draw(256)); }

template <typename T>
struct Buffer {
  explicit Buffer(long long size) : size(size), all(new T[size]), pointer(all.get()) {
    for (long long i = 0; i < size; ++i) fill(all[i]);
  }
  std::vector<char> bytes() const {
    const char* first = reinterpret_cast<const char*>(all.get());
    return {first, first + size * sizeof(T)};
  }
  void set(const std::vector<char>& bytes) { std::memcpy(all.get(), bytes.data(), bytes.size()); }
  long long size;
  std::unique_ptr<T[]> all;
  T* pointer;
};

// Run a kernel twice on what is in `outputs`; whether it leaves the same in all of them.
template <typename... Out>
bool agrees(const std::string& name, Index grid, int threads, std::vector<void*> arguments,
            Buffer<Out>&... outputs) {
  std::vector<std::vector<char>> before, left[2];
  (before.push_back(outputs.bytes()), ...);
  for (const bool backwards : {false, true}) {
    auto one = before.begin();
    (outputs.set(*one++), ...);
    emulated::backwards = backwards;
    emulated::launch(emulated::kernels.at(name), grid, threads, arguments.data());
    (left[backwards].push_back(outputs.bytes()), ...);
  }
  if (left[0] == left[1]) return true;
  std::fprintf(stderr, "%s: other results where its threads run backwards\n", name.c_str());
  return false;
}

template <typename T, int W>
bool check(const std::string& name) {
  typedef typename Wide<T>::type S;
  for (int round = 0; round < 3; ++round) {
    long long rows = 1 + draw(4), size = 1 + draw(300);
    Buffer<T> gates(rows * 4 * size), more(rows * 4 * size), bias(4 * size), c(rows * size),
        h_next(rows * size), c_next(rows * size);
    if (round % 2) bias.pointer = nullptr;
    if (!agrees("lstm_pointwise<" + name + ">",
                {static_cast<unsigned>(rows), static_cast<unsigned>(size + 255) / 256}, 256,
                {&gates.pointer, &more.pointer, &bias.pointer, &c.pointer, &h_next.pointer,
                 &c_next.pointer, &size}, h_next, c_next))
      return false;

    long long n = 1 + draw(2), beams = 1 + draw(2), steps = 1 + draw(round == 0 ? 700 : 40),
              heads = 1 + draw(3),
              head = round % 2 ? W * (1 + draw(12)) : draw(70) + (round ? THREADS : 1),
              width = heads * head, along = steps * width, one = 1;
    Buffer<T> query(n * beams * width), keys(n * along), values(n * along),
        context(n * beams * width);
    Buffer<bool> mask(n * steps);
    for (long long i = 0; i < n; ++i) mask.pointer[i * steps] = true;
    Buffer<S> weights(n * beams * steps);
    if (!agrees("attend<" + name + ", " + std::to_string(round % 2 ? W : 1) + ">",
                {static_cast<unsigned>(n * beams), 1}, THREADS,
                {&query.pointer, &keys.pointer, &values.pointer, &mask.pointer, &context.pointer,
                 &weights.pointer, &beams, &steps, &width, &heads, &along, &width, &along, &width,
                 &steps, &one}, context, weights))
      return false;
    for (long long r = 0; r < n * beams; ++r) {
      double sum = 0;
      for (long long s = 0; s < steps; ++s) sum += weights.pointer[r * steps + s];
      if (!(std::fabs(sum - 1) < 1e-4)) return std::fprintf(stderr, "weights: %g\n", sum), false;
    }
  }
  return true;
}

template <typename T>
bool check_choose(const std::string& name) {
  for (int round = 0; round < 4; ++round) {
    long long rows = 1 + draw(2), vocabulary = 1 + draw(round % 2 ? 9000 : 600);
    long long count = 1 + draw(static_cast<int>(vocabulary < 20 ? vocabulary : 20));
    long long forbidden = draw(4);
    Buffer<T> logits(rows * vocabulary);
    if (round == 3) {  // more in the way of a few threads than is sorted at once
      vocabulary = 60 * THREADS, count = 20, rows = 1;
      logits = Buffer<T>(vocabulary);
      for (long long i = 0; i < vocabulary; ++i)
        if (i % THREADS < 19) put(logits.pointer + i, 3.0f);
    }
    Buffer<long long> never(forbidden), tokens(rows * count);
    Buffer<float> values(rows * count), normaliser(rows);
    if (!agrees("choose<" + name + ">", {static_cast<unsigned>(rows), 1}, THREADS,
                {&logits.pointer, &never.pointer, &values.pointer, &tokens.pointer,
                 &normaliser.pointer, &vocabulary, &forbidden, &count}, values, tokens, normaliser))
      return false;
    for (long long i = 0; i < rows * count; ++i)
      if (tokens.pointer[i] < 0 || tokens.pointer[i] >= vocabulary ||
          (i % count && values.pointer[i] > values.pointer[i - 1]))
        return std::fprintf(stderr, "choose: not in order\n"), false;
  }
  return true;
}

bool check_gather() {
  for (int round = 0; round < 9; ++round) {
    const long long rows = 1 + draw(5), taken = 1 + draw(7), count = 1 + draw(3);
    Tables tables = {};
    std::vector<Buffer<char>> from, to;
    for (long long i = 0; i < count; ++i) {
      tables.bytes[i] = 1 + draw(round % 3 == 0 ? 40 : 3000);
      if (round % 3) tables.bytes[i] *= round % 3 == 1 ? 16 : 4;
      from.emplace_back(rows * tables.bytes[i]), to.emplace_back(taken * tables.bytes[i]);
      tables.from[i] = from.back().pointer, tables.to[i] = to.back().pointer;
    }
    Buffer<long long> origin(taken);
    for (long long i = 0; i < taken; ++i) origin.pointer[i] = draw(static_cast<int>(rows));
    if (!agrees("gather_rows", {static_cast<unsigned>(taken), static_cast<unsigned>(count)}, 128,
                {&tables, &origin.pointer}, to[0]))
      return false;
    for (long long i = 0; i < count; ++i)
      for (long long r = 0; r < taken; ++r)
        if (std::memcmp(tables.to[i] + r * tables.bytes[i],
                        tables.from[i] + origin.pointer[r] * tables.bytes[i], tables.bytes[i]))
          return std::fprintf(stderr, "gather_rows: another row\n"), false;
  }
  return true;
}

// A beam that goes on until everybody is over, with what is beside the offered tokens at random.
bool check_advance() {
  for (int round = 0; round < 8; ++round) {
    const bool wide = round == 3;
    long long n = wide ? 1 : 1 + draw(3), k = wide ? MOST_BEAM : 1 + draw(7), eos = 3;
    long long choices = k == 1 ? 2 : round % 2 ? 2 * k + 1 : 3 + draw(2), room = 1 + draw(90);
    Buffer<float> values(n * k * choices), normaliser(n * k), scores(n * k), ended_sums(n * k);
    Buffer<double> facts(n * FACTS), ended_scores(n * k);
    Buffer<long long> tokens(n * k * choices), longest(n), made(n), previous(n * k), parents(n * k),
        said(n * k * room), ended_made(n * k), ended_said(n * k * room);
    Buffer<bool> over(n);
    for (long long i = 0; i < n; ++i) {
      double* fact = facts.pointer + i * FACTS;
      fact[MAY_END] = draw(3), fact[N_BEST] = 1 + draw(static_cast<int>(k)), fact[HOPELESS] = -INFINITY;
      fact[SHIFT] = 5, fact[SCALE] = 6, fact[MAX_NORMALISER] = 2;
      longest.pointer[i] = room, over.pointer[i] = draw(4) == 0;
    }
    for (long long i = 0; i < n * k; ++i) {
      scores.pointer[i] = i % k ? -INFINITY : 0, ended_scores.pointer[i] = -INFINITY;
      for (long long j = 0; j < choices; ++j) tokens.pointer[i * choices + j] = j + draw(4);
      // Ids of a row differ and values fall, as `choose` leaves them.
      for (long long j = 1; j < choices; ++j) {
        long long* id = tokens.pointer + i * choices + j;
        if (*id <= id[-1]) *id = id[-1] + 1;
        float* value = values.pointer + i * choices + j;
        *value = value[-1] - draw(3) / 4.0f;
      }
    }
    for (int step = 0; step < (wide ? 3 : 20); ++step) {
      for (long long i = 0; i < n * k; ++i) fill(normaliser.pointer[i]);
      const bool right =
          k == 1 ? agrees("advance_one", {1, 1}, 128,
                          {&values.pointer, &tokens.pointer, &normaliser.pointer, &eos,
                           &facts.pointer, &longest.pointer, &made.pointer, &over.pointer,
                           &previous.pointer, &scores.pointer, &said.pointer, &n, &choices, &room},
                          made, over, previous, scores, said)
                 : agrees("advance_beam", {static_cast<unsigned>(n), 1}, wide ? 512 : 128,
                          {&values.pointer, &tokens.pointer, &normaliser.pointer, &eos,
                           &facts.pointer, &longest.pointer, &made.pointer, &over.pointer,
                           &previous.pointer, &scores.pointer, &parents.pointer, &said.pointer,
                           &ended_scores.pointer, &ended_sums.pointer, &ended_made.pointer,
                           &ended_said.pointer, &k, &choices, &room},
                          facts, made, over, previous, scores, parents, said, ended_scores,
                          ended_sums, ended_made, ended_said);
      if (!right) return false;
    }
  }
  return true;
}

}  // namespace

// What kernels.py calls of CUDA's driver.
extern "C" {
int cuModuleGetFunction(void** function, void*, const char* name) {
  const auto found = emulated::kernels.find(name);
  if (found == emulated::kernels.end()) return 500;  // CUDA_ERROR_NOT_FOUND
  *function = &found->second;
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                   unsigned, unsigned, void*, void** arguments, void**) {
  emulated::launch(*static_cast<emulated::Kernel*>(function), {x, y, z},
                   static_cast<int>(threads), arguments);
  return 0;
}
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = nullptr, 0; }
int cuGetErrorString(int, const char** text) { return *text = "an emulated error", 0; }
}

int main() {
  const bool right = known && check_advance() && check_gather() && check<float, 4>("float") &&
                     check<Half, 8>("Half") && check<Brain, 8>("Brain") &&
                     check<double, 2>("double") && check_choose<float>("float") &&
                     check_choose<Half>("Half") && check_choose<Brain>("Brain");
  return right ? 0 : 1;
}
