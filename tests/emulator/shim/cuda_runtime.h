// The part of CUDA that the kernels of this project use, for a plain C++ compiler. ../README.md
// says what is checked and which rules a kernel has to keep.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>

#include "vector_types.h"

#define EMULATOR 1

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition) ((void)0)

// Each shared variable goes into a section of its own name, which the linker script gathers into
// one range: the executor fills it with junk before every block. A variable without `static` or
// `extern` would be private to each thread; the section attribute makes that a compile error.
#define EMULATOR_STRING_(x) #x
#define EMULATOR_STRING(x) EMULATOR_STRING_(x)
#define __shared__ __attribute__((section("cuda_shared." EMULATOR_STRING(__COUNTER__))))

// Set by the scheduler whenever it resumes a thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "arithmetic.h"
#include "atomics.h"
#include "host_api.h"
#include "launch.h"
#include "memory_access.h"
#include "sync.h"
#include "warp.h"
