#pragma once

#include <cstdlib>  // defines __GLIBC__ where the C library is glibc

// Marks a function of which the compiler makes one copy per instruction set; the loader picks the best that the
// machine has. A wheel built without -march=native then runs on every x86-64 machine and still at the speed of AVX2 or
// AVX-512 (solver step, float32, K = 2, 4096 elements in cache, one Zen 4 core, 2026-11: 38 GB/s without the copies,
// 94 with them). Copies need GCC and glibc's ifunc. Sanitizers instrument the resolver, which runs before their
// runtime is ready, so they get the plain function.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define DGPO_FAST_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DGPO_FAST_MULTIVERSION
#endif
