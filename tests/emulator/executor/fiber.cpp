// ucontext makes a fiber; the compiler's own setjmp and longjmp switch between fibers. They cost a
// few nanoseconds and, unlike libc's, are neither intercepted by the sanitizers nor checked by
// _FORTIFY_SOURCE. This file is compiled without instrumentation and tells the sanitizers itself.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include "report.h"

#if defined(EXECUTOR_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(EXECUTOR_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator {
namespace {

#if defined(EXECUTOR_ADDRESS)
constexpr size_t stack_size = 256 << 10;
#else
constexpr size_t stack_size = 64 << 10;
#endif

void* scheduler[5];
Fiber* running = nullptr;

#if defined(EXECUTOR_ADDRESS)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#elif defined(EXECUTOR_THREAD)
void* scheduler_fiber = nullptr;
#endif

[[noreturn]] __attribute__((noinline)) void jump(void** to) { __builtin_longjmp(to, 1); }

void* map_stack(void* at) {
  const int fixed = at == nullptr ? 0 : MAP_FIXED;
  void* stack = mmap(at, stack_size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
  if (stack == MAP_FAILED) fail("cannot map a fiber's stack");
  mprotect(stack, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
  return stack;
}

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body), stack_(map_stack(nullptr)) {}

Fiber::~Fiber() { munmap(stack_, stack_size); }

void Fiber::renew(void* sanitizer_thread) {
#if defined(EXECUTOR_THREAD)
  map_stack(stack_);  // the sanitizer forgets who touched it
  sanitizer_ = sanitizer_thread;
#else
  (void)sanitizer_thread;
  if (started_) return;  // the body's loop in entry() goes on
#endif
  started_ = false;
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_size;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::entry, 0);
}

void Fiber::entry() {
#if defined(EXECUTOR_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  for (;;) {
    running->body_();
    suspend();
  }
}

__attribute__((noinline)) void Fiber::resume() {
  running = this;
#if defined(EXECUTOR_ADDRESS)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_, stack_size);
#elif defined(EXECUTOR_THREAD)
  scheduler_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
  if (__builtin_setjmp(scheduler) == 0) {
    if (started_) jump(jump_);
    started_ = true;
    setcontext(&context_);
  }
#if defined(EXECUTOR_ADDRESS)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

__attribute__((noinline)) void Fiber::suspend() {
  Fiber* self = running;
#if defined(EXECUTOR_ADDRESS)
  __sanitizer_start_switch_fiber(&self->sanitizer_, scheduler_stack, scheduler_stack_size);
#elif defined(EXECUTOR_THREAD)
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  if (__builtin_setjmp(self->jump_) == 0) jump(scheduler);
#if defined(EXECUTOR_ADDRESS)
  __sanitizer_finish_switch_fiber(running->sanitizer_, &scheduler_stack, &scheduler_stack_size);
#endif
}

}  // namespace emulator
