// In place of csrc/torch/stream.cpp: the work of an operator on CPU tensors, run by the executor.
#include <cstdlib>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch/stream.h"

// Last: its macros change what headers of the standard library say.
#include "cuda/stream.h"
#include "settings.h"

namespace gmc::cuda {
namespace {

using emulator::settings;

// Device memory that is freed when the work is done.
class Temporaries {
 public:
  void* allocate(int64_t nbytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, static_cast<size_t>(nbytes)));
    allocated_.push_back(memory);
    return memory;
  }
  ~Temporaries() {
    (void)cudaDeviceSynchronize();  // an error came before the end: nothing may run later
    for (void* memory : allocated_) (void)cudaFree(memory);
  }

 private:
  std::vector<void*> allocated_;
};

void choose_schedule() {
  static const bool chosen = [] {
    const char* const seed = std::getenv("GMC_EMULATOR_SEED");
    settings.seed = seed ? std::strtoull(seed, nullptr, 10) : 1;
    settings.watchdog_seconds = 0;  // its signals would reach Python
    emulator::dice_of_case = emulator::Random(settings.seed);
    return true;
  }();
  (void)chosen;
}

}  // namespace

void on_stream(Device, const std::function<void(const Stream&)>& function) {
  static std::mutex one_at_a_time;  // autograd and the user may call from threads of their own
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  choose_schedule();
  Temporaries temporaries;
  try {
    function({nullptr, [&](int64_t nbytes) { return temporaries.allocate(nbytes); }});
    check(cudaDeviceSynchronize());
  } catch (const CudaError& error) {
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error.status));
  }
}

}  // namespace gmc::cuda
