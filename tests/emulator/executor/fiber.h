// A context with its own stack, resumed by one scheduler on one operating-system thread.
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace emulator {

class Fiber {
 public:
  explicit Fiber(void (*body)());  // body runs once per renew()
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the fiber ready to run its body from the start. For the thread sanitizer it becomes the
  // given new thread (see happens_before.h), on a stack that nobody used before.
  void renew(void* sanitizer_thread);
  void resume();          // from the scheduler: returns when the body suspends or ends
  static void suspend();  // from the body: back to the scheduler

 private:
  static void entry();
  void (*body_)();
  void* stack_;
  bool started_ = false;
  void* jump_[5];  // __builtin_setjmp's buffer
  ucontext_t context_;
  void* sanitizer_ =
      nullptr;  // the thread sanitizer's fiber, or the address sanitizer's fake stack
};

}  // namespace emulator
