#include "report.h"

#include <unistd.h>

#include <cstdio>

#include "block.h"

extern "C" char __executable_start;  // from the linker

namespace cuda_on_cpu {

void fail(const char* format, ...) {
  char text[2048];
  size_t used = 0;
  const auto add = [&](int written) {
    if (written > 0) used = used + size_t(written) < sizeof text ? used + written : sizeof text - 1;
  };
  add(snprintf(text, sizeof text, "cuda_on_cpu: "));
  va_list arguments;
  va_start(arguments, format);
  add(vsnprintf(text + used, sizeof text - used, format, arguments));
  va_end(arguments);
  if (current_kernel != nullptr) {
    // The offset into the program: program.py replaces it by the kernel's name.
    add(snprintf(text + used, sizeof text - used, "\n  kernel <0x%zx>, block (%u, %u, %u)",
                 size_t(static_cast<const char*>(current_kernel) - &__executable_start), blockIdx.x,
                 blockIdx.y, blockIdx.z));
    if (current_thread != nullptr)
      add(snprintf(text + used, sizeof text - used, ", thread (%u, %u, %u)", threadIdx.x,
                   threadIdx.y, threadIdx.z));
  }
  text[used++] = '\n';
  // write and _exit alone: the watchdog calls this from a signal handler.
  if (write(STDERR_FILENO, text, used) < 0) _exit(fault_exit_code + 1);
  _exit(fault_exit_code);
}

void trap(Site site) { fail("%s called at %s:%d", site.what, site.file, site.line); }

}  // namespace cuda_on_cpu
