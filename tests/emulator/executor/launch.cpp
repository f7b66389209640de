// Checks a launch as the CUDA runtime does, then appends it to its stream.
#include "launch.h"

#include <map>
#include <utility>

#include "../shim/launch.h"
#include "report.h"
#include "settings.h"
#include "shared_memory.h"
#include "streams.h"

namespace emulator {

Settings settings;
Random dice_of_case(0);

namespace {

cudaError_t last_error = cudaSuccess;
std::map<const void*, size_t> shared_limits;  // set by cudaFuncSetAttribute

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
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
                   std::shared_ptr<const void> closure) {
  const cudaError_t error = check(config, kernel);
  if (error != cudaSuccess) return remember(error);
  auto launch = std::make_shared<Launch>();
  launch->kernel = kernel;
  launch->grid = config.gridDim;
  launch->block = config.blockDim;
  launch->dynamic_bytes = config.dynamicSmemBytes;
  launch->body = body;
  launch->closure = std::move(closure);
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch->must_wait = config.attrs[i].val.programmaticStreamSerializationAllowed != 0;
  if (launch->blocks() > 0x7fffffff)
    fail("a grid of %zu blocks is too large to run here", launch->blocks());
  append(config.stream, std::move(launch));
  return cudaSuccess;
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
