// Products of a warp: its rows of the weights, which stay in registers and shared memory, with a few columns that come anew every step.
//
// K is split into blocks of 64 bytes, in which lane t of a group of four reads bytes [16 t, 16 t + 16): one wide load gives the operands of
// two matrix instructions. Which k an instruction takes for its first is nobody's concern as long as both operands agree, so the weights
// are dealt out in the same order.
#pragma once
#include "device.cuh"
#include "recurrence_plan.h"

namespace s2s::persistent {

template <Operand operand>
struct OperandType {
  using Element = float;
};
template <>
struct OperandType<Operand::bfloat16> {
  using Element = device::bfloat16;
};
template <>
struct OperandType<Operand::float16> {
  using Element = device::float16;
};

// An element as it lies in registers and in the exchange.
template <Operand operand>
__device__ typename OperandType<operand>::Element as_operand(float value) {
  using Element = typename OperandType<operand>::Element;
  if constexpr (operand == Operand::tf32)
    return device::rounded_to_tf32(value);
  else
    return device::rounded<Element>(value);
}

// Up to 16 bytes of a row of the weights, from some k on: `count` elements, and zeros after them.
template <class Element>
struct WeightRun {
  const Element* data;
  int64_t step;
  int count;
};

// Of what other blocks write: out of shared memory, or out of L2.
template <bool cluster>
__device__ device::Words exchanged(const unsigned char* from) {
  if constexpr (cluster)
    return *reinterpret_cast<const device::Words*>(from);
  else
    return device::load_coherent(from);
}

template <Operand operand, bool cluster, int tiles, int held_blocks>
class WarpProduct {
  using Element = typename OperandType<operand>::Element;
  using Words = device::Words;
  static constexpr int column_tiles = columns / tile_n, each = 4 / static_cast<int>(sizeof(Element));
  static constexpr bool exact = operand == Operand::float32;

 public:
  // weight(row, k): a WeightRun of the block's rows of the weights. rest: the warp's own part of shared memory.
  template <class Weight>
  __device__ WarpProduct(const Weight& weight, int first_row, int first_block, int blocks, Words* rest)
      : first_block_(first_block), blocks_(blocks), rest_(rest) {
#pragma unroll
    for (int i = 0; i < held_blocks; ++i)
#pragma unroll
      for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          held_[i][m][half] = i < blocks ? fragment(weight, first_row + m * tile_m + half * 8, first_block + i) : Words{};
    for (int i = held_blocks; i < blocks; ++i)
#pragma unroll
      for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *rest_at(i, m, half, lane()) = fragment(weight, first_row + m * tile_m + half * 8, first_block + i);
  }

  // sums[row][column] of the warp's K, for the first `here` of the columns and some more.
  __device__ void run(const unsigned char* rows, int row_bytes, int here, float* sums) const {
    float sum[tiles][column_tiles][4] = {};
    const bool both = here > tile_n;
    if constexpr (exact)
      run_exact(rows, row_bytes, both, sum);
    else
      run_matrix(rows, row_bytes, both, sum);
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int n = 0; n < column_tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[(m * tile_m + lane() / 4 + i / 2 * 8) * partial_row + n * tile_n + lane() % 4 * 2 + i % 2] = sum[m][n][i];
  }

 private:
  __device__ static int lane() { return threadIdx.x % warp; }
  __device__ Words* rest_at(int block, int m, int half, int lane) const {
    return rest_ + (((block - held_blocks) * tiles + m) * 2 + half) * warp + lane;
  }

  template <class Weight>
  __device__ static Words fragment(const Weight& weight, int row, int block) {
    const WeightRun<Element> run = weight(row + lane() / 4, (block * 16 + lane() % 4 * 4) * each);
    Words words;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words.at[w] = 0;
#pragma unroll
      for (int e = w * each; e < (w + 1) * each; ++e) {
        if (e >= run.count) continue;
        Element value = run.data[e * run.step];
        if constexpr (operand == Operand::tf32) value = as_operand<operand>(value);
        words.at[w] |= static_cast<uint32_t>(device::bits_of(value)) << (e % each * 16);
      }
    }
    return words;
  }

  __device__ void run_matrix(const unsigned char* rows, int row_bytes, bool both, float (&sum)[tiles][column_tiles][4]) const {
    const unsigned char* const from = rows + lane() / 4 * row_bytes + first_block_ * block_bytes + lane() % 4 * 16;
    constexpr int group = 4;  // so many loads are under way before the first is waited for
#pragma unroll
    for (int begin = 0; begin < held_blocks; begin += group) {
      if (begin > 0) device::warp_sync();  // no load of this group moves up to those before: registers are short
      Words b[group][column_tiles] = {};
#pragma unroll
      for (int i = 0; i < group; ++i) {
        if (begin + i >= held_blocks || begin + i >= blocks_) continue;
        b[i][0] = exchanged<cluster>(from + (begin + i) * block_bytes);
        if (both) b[i][1] = exchanged<cluster>(from + (begin + i) * block_bytes + tile_n * row_bytes);
      }
#pragma unroll
      for (int i = 0; i < group; ++i) {
        if (begin + i >= held_blocks || begin + i >= blocks_) continue;
#pragma unroll
        for (int m = 0; m < tiles; ++m) multiply(held_[begin + i][m][0], held_[begin + i][m][1], b[i], both, sum[m]);
      }
    }
#pragma unroll 1
    for (int i = held_blocks; i < blocks_; ++i) {
      Words b_rest[column_tiles] = {};
      b_rest[0] = exchanged<cluster>(from + i * block_bytes);
      if (both) b_rest[1] = exchanged<cluster>(from + i * block_bytes + tile_n * row_bytes);
#pragma unroll
      for (int m = 0; m < tiles; ++m) multiply(*rest_at(i, m, 0, lane()), *rest_at(i, m, 1, lane()), b_rest, both, sum[m]);
    }
  }

  // top, bottom: of rows lane / 4 and lane / 4 + 8 of a tile.
  __device__ static void multiply(const Words& top, const Words& bottom, const Words (&b)[column_tiles], bool both,
                                  float (&sum)[column_tiles][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a[4] = {top.at[2 * half], bottom.at[2 * half], top.at[2 * half + 1], bottom.at[2 * half + 1]};
#pragma unroll
      for (int n = 0; n < column_tiles; ++n)
        if (n == 0 || both) device::multiply(Element{}, sum[n], a, {b[n].at[2 * half], b[n].at[2 * half + 1]});
    }
  }

  // The same sums in the same lanes, by multipliers: a lane reads whole blocks of its two rows and its columns.
  __device__ void run_exact(const unsigned char* rows, int row_bytes, bool both, float (&sum)[tiles][column_tiles][4]) const {
    const unsigned char* const from = rows + lane() % 4 * 2 * row_bytes + first_block_ * block_bytes;
#pragma unroll 1
    for (int i = 0; i < blocks_; ++i)
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        Words b[column_tiles][2] = {};
#pragma unroll
        for (int n = 0; n < column_tiles; ++n)
#pragma unroll
          for (int side = 0; side < 2; ++side)
            if (n == 0 || both) b[n][side] = exchanged<cluster>(from + (n * tile_n + side) * row_bytes + i * block_bytes + quarter * 16);
#pragma unroll
        for (int m = 0; m < tiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Words a = *rest_at(i, m, half, lane() / 4 * 4 + quarter);
#pragma unroll
            for (int w = 0; w < 4; ++w)
#pragma unroll
              for (int n = 0; n < column_tiles; ++n)
#pragma unroll
                for (int side = 0; side < 2; ++side)
                  sum[m][n][half * 2 + side] =
                      fmaf(device::float_of(a.at[w]), device::float_of(b[n][side].at[w]), sum[m][n][half * 2 + side]);
          }
      }
  }

  const int first_block_, blocks_;
  Words* const rest_;
  Words held_[held_blocks > 0 ? held_blocks : 1][tiles][2];
};

}  // namespace s2s::persistent
