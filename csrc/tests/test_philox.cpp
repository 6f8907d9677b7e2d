// Philox4x32-10 against the known answers that its authors publish with the Random123 library (kat_vectors).

#include "philox.h"

#include <array>
#include <cstdint>
#include <cstdio>

namespace {

using Four = std::array<uint32_t, 4>;

struct KnownAnswer {
  const char* what;
  std::array<uint32_t, 2> key;
  Four counter, words;
};

constexpr KnownAnswer kKnownAnswers[] = {
    {"zeros", {0, 0}, {0, 0, 0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {"ones",
     {0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {"digits of pi",
     {0xa4093822, 0x299f31d0},
     {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

// A stream's name is the key and the counter's upper half; the number of the block is its lower half.
Four words_of(const KnownAnswer& known) {
  const dgpo_fast::StreamName name{known.key[0], known.key[1], known.counter[2], known.counter[3]};
  const dgpo_fast::Words block = philox_block(name, uint64_t{known.counter[1]} << 32 | known.counter[0]);
  return {block.w0, block.w1, block.w2, block.w3};
}

}  // namespace

int main() {
  int failures = 0;
  for (const KnownAnswer& known : kKnownAnswers) {
    const Four words = words_of(known);
    if (words == known.words) continue;
    std::printf("%s: %08x %08x %08x %08x\n", known.what, words[0], words[1], words[2], words[3]);
    ++failures;
  }
  return failures;
}
