#pragma once

// Marks a function that the host and CUDA kernels share: one source of the maths, tested on the host.
#if defined(__CUDACC__)
#define DGPO_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DGPO_FAST_HOST_DEVICE inline
#endif
