// Ends a block that runs for too long: it waits for something that comes after it.
#pragma once

namespace emulator {

void start_watchdog();  // at the beginning of a block, and when it goes on
void stop_watchdog();

}  // namespace emulator
