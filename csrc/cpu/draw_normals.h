#pragma once

#include <algorithm>
#include <cstdint>

#include "multiversion.h"
#include "normal.h"
#include "philox.h"

namespace dgpo_fast::cpu {

// Elements `first`, `first` + 1, ... of a stream's normal numbers; `first` is a multiple of 4.
DGPO_FAST_MULTIVERSION inline void draw_normals(const StreamName& name, int64_t first, float* normals, int64_t n) {
  constexpr int kBlocks = 16;  // as arrays of one word each, so that the compiler fills its vectors
  for (int64_t begin = 0; begin < n; begin += 4 * kBlocks) {
    uint32_t words[4][kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
      const Words block = philox_block(name, (first + begin) / 4 + i);
      words[0][i] = block.w0, words[1][i] = block.w1, words[2][i] = block.w2, words[3][i] = block.w3;
    }
    float drawn[4][kBlocks];
    for (int pair = 0; pair < 2; ++pair)
      for (int i = 0; i < kBlocks; ++i) {
        const NormalPair two = box_muller(words[2 * pair][i], words[2 * pair + 1][i]);
        drawn[2 * pair][i] = two.first, drawn[2 * pair + 1][i] = two.second;
      }
    const int64_t count = std::min<int64_t>(4 * kBlocks, n - begin);
    for (int64_t i = 0; i < count; ++i) normals[begin + i] = drawn[i % 4][i / 4];
  }
}

// The stream whose four words begin at `words`.
inline StreamName stream_name(const int64_t* words) {
  return {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[2]),
          static_cast<uint32_t>(words[3])};
}

}  // namespace dgpo_fast::cpu
