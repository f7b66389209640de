// How the executor says that a kernel is wrong: one line on standard error, then the process ends
// (fibers that wait for each other cannot be unwound).
#pragma once

#include <cstdarg>

#include "executor.h"

namespace emulator {

constexpr int fault_exit_code = 86;  // program.py knows it

// Adds kernel, block and thread to the message where they are known.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

}  // namespace emulator
