// The grid: checks a launch as the CUDA runtime does, then runs block after block in seeded order.
#include "../shim/launch.h"

#include <signal.h>
#include <sys/time.h>

#include <cerrno>
#include <cmath>
#include <ctime>
#include <map>

#include "block.h"
#include "happens_before.h"
#include "report.h"
#include "settings.h"
#include "shared_memory.h"

namespace emulator {

Settings settings;
Random dice_of_case(0);

namespace {

cudaError_t last_error = cudaSuccess;
std::map<const void*, size_t> shared_limits;  // set by cudaFuncSetAttribute
double block_deadline;
unsigned atomics_since_check;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

double processor_seconds() { return double(clock()) / CLOCKS_PER_SEC; }

[[noreturn]] void block_spins() {
  fail(
      "watchdog: one block has run for %g s of processor time; does it wait for another block, or "
      "for a thread without a barrier?",
      settings.watchdog_seconds);
}

// A loop without atomics is ended by a signal. The thread sanitizer holds signal handlers back, so
// there the signal's default action ends the process, and program.py says what it means.
void start_watchdog() {
  if (settings.watchdog_seconds == 0) return;
#if !defined(EXECUTOR_THREAD)
  static const auto handler = signal(SIGVTALRM, [](int) { block_spins(); });
  (void)handler;
#endif
  itimerval timer{};
  const double seconds = settings.watchdog_seconds;
  timer.it_value.tv_sec = time_t(seconds);
  timer.it_value.tv_usec = suseconds_t((seconds - std::floor(seconds)) * 1e6);
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  block_deadline = processor_seconds() + 0.9 * seconds;
}

void stop_watchdog() {
  if (settings.watchdog_seconds == 0) return;
  itimerval timer{};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3& grid = config.gridDim;
  const dim3& block = config.blockDim;
  if (uint64_t(block.x) * block.y * block.z > 1024 || block.z > 64)
    return cudaErrorInvalidConfiguration;
  if (block.x * block.y * block.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const auto limit = shared_limits.find(kernel);
  if (config.dynamicSmemBytes > (limit == shared_limits.end() ? shared_default : limit->second))
    return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeCooperative ||
        config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      return cudaErrorNotSupported;
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
                   const void* closure) {
  const cudaError_t error = check(config, kernel);
  if (error != cudaSuccess) return remember(error);
  current_kernel = kernel;
  early_launch = false;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      early_launch = config.attrs[i].val.programmaticStreamSerializationAllowed != 0;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const bool in_order = settings.seed == 0;
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  if (blocks > 0x7fffffff)
    fail("a grid of %llu blocks is too large to run here", static_cast<unsigned long long>(blocks));
  for (const int number : dice_of_case.order(int(blocks), !in_order)) {
    const unsigned n = unsigned(number);
    blockIdx = {n % gridDim.x, n / gridDim.x % gridDim.y, n / gridDim.x / gridDim.y};
    reset_shared_memory(config.dynamicSmemBytes, dice_of_case);
    start_watchdog();
    run_block(body, closure, dice_of_case, in_order);
  }
  stop_watchdog();
  happens_before::launch_ended();
  current_kernel = nullptr;
  return cudaSuccess;
}

void before_atomic(void* address) {
  if (++atomics_since_check % 4096 == 0 && settings.watchdog_seconds != 0 &&
      processor_seconds() > block_deadline)
    block_spins();
  if (settings.seed != 0 && dice_of_case.below(4) == 0) yield();
  happens_before::before_atomic(address);
}

void float_atomic(Site site) {
  if (!settings.float_atomics)
    fail(
        "float atomic: %s on a floating-point number at %s:%d, whose result depends on the "
        "schedule",
        site.what, site.file, site.line);
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > shared_capacity) return remember(cudaErrorInvalidValue);
  shared_limits[kernel] = size_t(value) > shared_default ? size_t(value) : shared_default;
  return cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return emulator::last_error; }
