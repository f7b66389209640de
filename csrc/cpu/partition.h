// How a bucket is divided between threads: whole tiles, contiguous, in ascending order; and the
// chunks that a thread works on.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>

#include "shared/payload.h"

namespace gmc::cpu {

// Elements worked on at a time: a few buffers of them, and what is fetched ahead, fit in half of
// L1.
constexpr int64_t kChunk = 1024;

inline int64_t part_count(int64_t numel) {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads)) throw std::runtime_error("torch_get_num_threads failed");
  return std::min<int64_t>(tile_count(numel), threads);
}

// The first tile of a part; part == parts gives the end.
inline int64_t first_tile(int64_t part, int64_t parts, int64_t numel) {
  return tile_count(numel) * part / parts;
}

// The first element of a part; part == parts gives numel.
inline int64_t first_element(int64_t part, int64_t parts, int64_t numel) {
  return std::min(first_tile(part, parts, numel) * kTile, numel);
}

// Calls function(part) for every part, on torch's threads. An exception does not get through
// torch's C interface, so the first one is carried past it.
template <class Function>
void for_each_part(int64_t parts, const Function& function) {
  struct Context {
    const Function& function;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;
  } context{function};
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    auto& context = *static_cast<Context*>(opaque);
    try {
      for (int64_t part = begin; part < end; ++part) context.function(part);
    } catch (...) {
      if (!context.failed.test_and_set()) context.error = std::current_exception();
    }
  };
  if (torch_parallel_for(0, parts, 1, run, &context))
    throw std::runtime_error("torch_parallel_for failed");
  if (context.error) std::rethrow_exception(context.error);
}

// Calls function(tile, scratch) for every tile, with one Scratch for all tiles of a part.
template <class Scratch, class Function>
void for_each_tile_with(int64_t numel, const Function& function) {
  const int64_t parts = part_count(numel);
  for_each_part(parts, [&](int64_t part) {
    Scratch scratch;
    const int64_t end = first_tile(part + 1, parts, numel);
    for (int64_t tile = first_tile(part, parts, numel); tile < end; ++tile)
      function(tile, &scratch);
  });
}

template <class Function>
void for_each_tile(int64_t numel, const Function& function) {
  struct None {};
  for_each_tile_with<None>(numel, [&](int64_t tile, None*) { function(tile); });
}

}  // namespace gmc::cpu
