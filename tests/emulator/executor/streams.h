// Streams and events: what comes after what.
#pragma once

#include <memory>

#include "launch.h"

namespace emulator {

// The null stream is one more stream: it waits for no other, and no other waits for it.
void append(cudaStream_t stream, std::shared_ptr<Launch> launch);

// A launch of one thread, body(closure), for what is no kernel. `name` stands for it in reports.
void append_work(cudaStream_t stream, const void* name, void (*body)(const void*),
                 std::shared_ptr<const void> closure);

}  // namespace emulator
