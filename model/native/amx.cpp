// AMX: Sapphire Rapids and later.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace seq2serve {
namespace {

constexpr int BLOCK = 16;  // rows of a tile

struct alignas(64) Shape {  // what ldtilecfg reads
  uint8_t palette = 1;
  uint8_t start = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3 are the sums of four panels, 4 the inputs, 5 the weights. They are configured and
// given back for each product: oneDNN, in the same thread, has its own.
void product(const uint8_t* a, size_t stride, int rows, const int8_t* w, int depth, int32_t* c) {
  Shape shape;
  for (int tile = 0; tile < 6; ++tile) {
    shape.bytes[tile] = 64;
    shape.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows : 16);
  }
  _tile_loadconfig(&shape);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < depth; k += 64, w += 16 * 256) {
    _tile_loadd(4, a + k, stride);
    _tile_loadd(5, w, 256);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(5, w + 64, 256);
    _tile_dpbusd(1, 4, 5);
    _tile_loadd(5, w + 128, 256);
    _tile_dpbusd(2, 4, 5);
    _tile_loadd(5, w + 192, 256);
    _tile_dpbusd(3, 4, 5);
  }
  _tile_stored(0, c, 256);
  _tile_stored(1, c + 16, 256);
  _tile_stored(2, c + 32, 256);
  _tile_stored(3, c + 48, 256);
  _tile_release();
}

}  // namespace
}  // namespace seq2serve

#include "dots512.h"

#include "body.h"

const seq2serve::Kernels seq2serve::amx = {"amx", quantise, cell,       linear,
                                           best,  listed,   normaliser, attend};
