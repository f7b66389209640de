// Shared memory of the one block that runs: all `static __shared__` variables of the program, and
// the array dynamic_shared, of which the address sanitizer lets a block touch the requested bytes
// only. A block that has stopped gets its contents back when it goes on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "random.h"

namespace emulator {

constexpr size_t shared_capacity = 227 << 10;  // bytes per block, of sm_90
constexpr size_t shared_default = 48 << 10;    // without cudaFuncSetAttribute

struct Block;
using Line = uint64_t __attribute__((vector_size(16)));  // what moves at once

void begin_shared_memory(Block& block, Random& random);
void resume_shared_memory(Block& block);
void end_shared_memory();

// Fills memory with a byte that makes a bad number of every type.
void fill_with_junk(void* memory, size_t bytes, Random& random);

}  // namespace emulator
