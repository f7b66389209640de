// What a case chooses; set before it runs.
#pragma once

#include <cstdint>

#include "random.h"

namespace emulator {

struct Settings {
  uint64_t seed = 0;             // 0: blocks and threads in index order, no early switches
  double watchdog_seconds = 10;  // of processor time, for one block; 0: no limit
  bool float_atomics = false;    // allowed?
  int multiprocessors = 3;       // what cudaDeviceGetAttribute reports
};

extern Settings settings;
extern Random dice_of_case;  // seeded anew for each case

}  // namespace emulator
