// Shared memory of the one block that runs: all `static __shared__` variables of the program, and
// the array dynamic_shared, of which the address sanitizer lets a block touch the requested bytes
// only.
#pragma once

#include <cstddef>

#include "random.h"

namespace emulator {

constexpr size_t shared_capacity = 227 << 10;  // bytes per block, of sm_90
constexpr size_t shared_default = 48 << 10;    // without cudaFuncSetAttribute

void reset_shared_memory(size_t dynamic_bytes, Random& random);

// Fills memory with a byte that makes a bad number of every type.
void fill_with_junk(void* memory, size_t bytes, Random& random);

}  // namespace emulator
