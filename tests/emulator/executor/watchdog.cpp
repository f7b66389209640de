#include "watchdog.h"

#include <signal.h>
#include <sys/time.h>

#include <cmath>
#include <ctime>

#include "executor.h"
#include "happens_before.h"
#include "report.h"
#include "settings.h"

namespace emulator {
namespace {

double block_deadline;
unsigned atomics_since_check;

double processor_seconds() { return double(clock()) / CLOCKS_PER_SEC; }

[[noreturn]] void block_spins() {
  fail(
      "watchdog: one block has run for %g s of processor time; does it wait for another block, or "
      "for a thread without a barrier?",
      settings.watchdog_seconds);
}

}  // namespace

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

void before_atomic(void* address) {
  if (++atomics_since_check % 4096 == 0 && settings.watchdog_seconds != 0 &&
      processor_seconds() > block_deadline)
    block_spins();
  if (settings.seed != 0 && dice_of_case.below(4) == 0) yield();
  happens_before::before_atomic(address);
}

}  // namespace emulator
