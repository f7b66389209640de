#include "report.h"

#include <unistd.h>

#include <cstdio>

#include "block.h"

#if defined(EXECUTOR_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#endif

// From the linker: where the program, or the library, begins.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start;

namespace emulator {
namespace {

// Grows without a heap: the watchdog reports from a signal handler.
struct Text {
  char text[2048];
  size_t used = 0;

  void add(const char* format, va_list arguments) {
    const int length = vsnprintf(text + used, sizeof text - used, format, arguments);
    if (length > 0) used += size_t(length);
    if (used > sizeof text - 1) used = sizeof text - 1;
  }
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    add(format, arguments);
    va_end(arguments);
  }
  // The kernel is named by its offset into the program, which program.py replaces by its name.
  void add_place() {
    if (current_block == nullptr) return;
    const char* kernel = static_cast<const char*>(current_block->launch->kernel);
    add("\n  kernel <0x%zx>, block (%u, %u, %u)", size_t(kernel - &__ehdr_start), blockIdx.x,
        blockIdx.y, blockIdx.z);
    if (current_thread != nullptr)
      add(", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
  }
  bool print() const { return write(STDERR_FILENO, text, used) == ssize_t(used); }
};

#if defined(EXECUTOR_ADDRESS)
const bool registered = [] {
  __sanitizer_set_death_callback([] {
    Text place;
    place.add_place();
    place.print();
  });
  return true;
}();
#endif

}  // namespace

void fail(const char* format, ...) {
  Text report;
  report.add("emulator: ");
  va_list arguments;
  va_start(arguments, format);
  report.add(format, arguments);
  va_end(arguments);
  report.add_place();
  report.add("\n");
  _exit(report.print() ? fault_exit_code : fault_exit_code + 1);
}

void trap(Site site) { fail("%s called at %s:%d", site.what, site.file, site.line); }

}  // namespace emulator
