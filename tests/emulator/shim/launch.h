// cudaLaunchKernelEx, the only way to launch here: <<<>>> is not C++.
#pragma once

#include <memory>
#include <tuple>
#include <utility>

#include "host_api.h"
#include "vector_types.h"

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
  cudaLaunchAttributePriority = 8,
};
union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
  int programmaticStreamSerializationAllowed;
  int priority;
  struct {
    unsigned int x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned int numAttrs;
};

namespace emulator {
// Queues a launch that runs body(closure) as every thread of the grid.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
                   std::shared_ptr<const void> closure);

template <class... Parameters, size_t... Index>
void call(void (*kernel)(Parameters...), const std::tuple<Parameters...>& arguments,
          std::index_sequence<Index...>) {
  kernel(std::get<Index>(arguments)...);
}
}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((0 + ... + sizeof(Parameters)) <= 32764, "CUDA's limit for kernel arguments");
  struct Closure {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const auto closure =
      std::make_shared<const Closure>(Closure{kernel, {std::forward<Arguments>(arguments)...}});
  const auto body = [](const void* opaque) {
    const Closure& call = *static_cast<const Closure*>(opaque);
    emulator::call(call.kernel, call.arguments, std::index_sequence_for<Parameters...>{});
  };
  return emulator::launch(*config, reinterpret_cast<const void*>(kernel), body, closure);
}
