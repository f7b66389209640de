// What runs next: the launches that are queued wait until the host needs their results. Then their
// blocks run one at a time, in an order that the streams, events and early starts allow.
#pragma once

#include <memory>

#include "launch.h"

namespace emulator {

void enqueue(std::shared_ptr<Launch> launch);

// Runs until the host may go on that waits for these; others may run meanwhile.
void synchronize(const Ends& ends);
void synchronize_all();

// Whether a block that just let the next launch start stops there, so that the next one does start.
bool pauses_after_trigger(const Launch& launch);

}  // namespace emulator
