#pragma once

#include <cstdint>

#include "host_device.h"

namespace dgpo_fast {

// The name of a random stream as four words; dgpo_fast/rng.py says where they come from.
struct StreamName {
  uint32_t w0, w1, w2, w3;
};

struct Words {
  uint32_t w0, w1, w2, w3;
};

// Block `i` of a stream: Philox4x32-10 with key (w0, w1) and counter (i mod 2^32, i div 2^32, w2, w3).
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
DGPO_FAST_HOST_DEVICE Words philox_block(const StreamName& name, uint64_t i) {
  uint32_t c0 = static_cast<uint32_t>(i), c1 = static_cast<uint32_t>(i >> 32), c2 = name.w2, c3 = name.w3;
  uint32_t k0 = name.w0, k1 = name.w1;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

}  // namespace dgpo_fast
