// The tile instructions in plain C++, for a processor that has none: what model/native/amx.cpp calls,
// with what the processor would refuse (Intel's manual, volume 2, LDTILECFG and TDPBUSD) as an abort,
// and every byte read where a sanitizer sees it. Included before amx.cpp, which must not have -mamx-*.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64] = {};
};

inline thread_local bool configured = false;
inline thread_local Tile tiles[8];

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline Tile& tile(int number) {
  demand(configured, "a tile before ldtilecfg, or after tilerelease");
  demand(0 <= number && number < 8 && tiles[number].rows > 0, "a tile without a shape");
  return tiles[number];
}

inline void configure(const void* shape) {
  const uint8_t* config = static_cast<const uint8_t*>(shape);
  demand(config[0] == 1 && config[1] == 0, "palette is not 1, or start row not 0");
  for (int i = 2; i < 16; ++i) demand(config[i] == 0, "reserved bytes are not 0");
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, 2);
    demand(bytes <= 64 && config[48 + i] <= 16, "a tile is larger than 16 rows of 64 bytes");
    tiles[i] = Tile();
    tiles[i].bytes = bytes, tiles[i].rows = config[48 + i];
  }
  configured = true;
}

inline void load(int number, const void* base, size_t stride) {
  Tile& t = tile(number);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const uint8_t*>(base) + r * stride, t.bytes);
}

inline void store(int number, void* base, size_t stride) {
  const Tile& t = tile(number);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, t.data[r], t.bytes);
}

inline void clear(int number) {
  Tile& t = tile(number);
  std::memset(t.data, 0, sizeof t.data);
}

// c [M, N] of int32 += a [M, 4K] of uint8 times b [K, 4N] of int8.
inline void multiply(int c_number, int a_number, int b_number) {
  Tile& c = tile(c_number);
  const Tile &a = tile(a_number), &b = tile(b_number);
  demand(c_number != a_number && a_number != b_number && c_number != b_number, "one tile twice");
  demand(a.rows == c.rows && b.bytes == c.bytes && a.bytes == 4 * b.rows, "shapes do not fit");
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < 4; ++i)
          sum += a.data[m][4 * k + i] * static_cast<int8_t>(b.data[k][4 * n + i]);
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig(shape) emulated::configure(shape)
#define _tile_release() (emulated::configured = false)
#define _tile_zero(t) emulated::clear(t)
#define _tile_loadd(t, base, stride) emulated::load(t, base, stride)
#define _tile_stored(t, base, stride) emulated::store(t, base, stride)
#define _tile_dpbusd(c, a, b) emulated::multiply(c, a, b)
