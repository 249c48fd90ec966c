// The six instructions of the tile unit that the kernels use, emulated: eight tiles of 16 rows of 64 bytes. Compilers are made to include
// this before everything else (`make tiles`), so that kernels for the tile unit run on every processor that has the vectors beside it.
#pragma once
#ifdef __cplusplus
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define S2S_EMULATED_TILES

namespace emulated_tiles {

inline thread_local float tiles[8][16][16];

inline void load(int tile, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(tiles[tile][i], static_cast<const char*>(from) + i * stride, 64);
}
inline void store(int tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles[tile][i], 64);
}
inline float half(const float* word, bool odd) {
  uint32_t bits;
  std::memcpy(&bits, word, 4);
  bits = odd ? bits & 0xffff0000u : bits << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// As the manual of TDPBF16PS has it: even and odd products are summed from 0, then both sums are added.
inline void multiply(int sum, int left, int right) {
  for (int i = 0; i < 16; ++i) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      const float first = half(&tiles[left][i][k], false), second = half(&tiles[left][i][k], true);
      for (int j = 0; j < 16; ++j) even[j] += first * half(&tiles[right][k][j], false), odd[j] += second * half(&tiles[right][k][j], true);
    }
    for (int j = 0; j < 16; ++j) tiles[sum][i][j] += even[j] + odd[j];
  }
}

}  // namespace emulated_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) ((void)(shapes))
#define _tile_release() ((void)0)
#define _tile_loadd(tile, from, stride) ::emulated_tiles::load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::emulated_tiles::store(tile, to, stride)
#define _tile_zero(tile) std::memset(::emulated_tiles::tiles[tile], 0, sizeof ::emulated_tiles::tiles[tile])
#define _tile_dpbf16ps(sum, left, right) ::emulated_tiles::multiply(sum, left, right)
#endif
