// One way to launch: typed arguments, a given stream, an exception where it fails.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "stream.h"

namespace gmc::cuda {

// How many blocks a launch has: in a row, and rows.
struct Grid {
  int64_t x, y;

  Grid(int64_t x, int64_t y = 1) : x(x), y(y) {}
};

template <class... Parameters, class... Arguments>
cudaError_t launch_with(cudaLaunchAttribute* attribute, size_t shared,
                        void (*kernel)(Parameters...), const Grid& grid, int threads,
                        const Stream& stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream.stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, int threads, const Stream& stream,
            const Arguments&... arguments) {
  check(launch_with(nullptr, 0, kernel, grid, threads, stream, arguments...));
}

// Launches a kernel that takes so many bytes of dynamic shared memory, which may be more than a
// kernel can have as static memory.
template <class... Parameters, class... Arguments>
void launch_dynamic(void (*kernel)(Parameters...), const Grid& grid, int threads, size_t shared,
                    const Stream& stream, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)));
  check(launch_with(nullptr, shared, kernel, grid, threads, stream, arguments...));
}

// Whether the current device, and the code that runs there, can start kernels early; none is with
// GMC_NO_EARLY_START=1 in the environment. It is remembered, because to find out costs as much as a
// launch. The code of all kernels is of one kind.
enum class Early : uint8_t { kUnknown, kNo, kYes };
constexpr int kKnownDevices = 64;
inline std::atomic<Early> early_on_device[kKnownDevices];

inline int current_device() {
  int device;
  check(cudaGetDevice(&device));
  return device;
}

inline bool can_start_early(int device, const void* kernel) {
  Early known = device < kKnownDevices ? early_on_device[device].load() : Early::kUnknown;
  if (known == Early::kUnknown) {
    cudaFuncAttributes compiled;
    check(cudaFuncGetAttributes(&compiled, kernel));
    const char* const off = std::getenv("GMC_NO_EARLY_START");
    const bool wanted = !off || *off == '\0' || *off == '0';
    known = wanted && compiled.ptxVersion >= 90 ? Early::kYes : Early::kNo;
    if (device < kKnownDevices) early_on_device[device].store(known);
  }
  return known == Early::kYes;
}

// Launches a kernel that may start while the kernel before it on the stream still runs, as soon as
// all blocks of that kernel have called start_next(). It must call wait_for_previous() before it
// touches anything that an earlier kernel writes, or writes what an earlier kernel reads.
//
// Devices before sm_90 cannot do so, nor can code that was compiled for them: there the kernel is
// launched as usual, and both calls do nothing. A device that refuses the attribute all the same is
// not asked again.
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), const Grid& grid, int threads,
                  const Stream& stream, const Arguments&... arguments) {
  const int device = current_device();
  if (can_start_early(device, reinterpret_cast<const void*>(kernel))) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    const auto status = launch_with(&early, 0, kernel, grid, threads, stream, arguments...);
    if (status != cudaErrorNotSupported && status != cudaErrorInvalidValue) return check(status);
    (void)cudaGetLastError();  // or a later call takes it for its own
    if (device < kKnownDevices) early_on_device[device].store(Early::kNo);
  }
  launch(kernel, grid, threads, stream, arguments...);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void wait_for_previous() { cudaGridDependencySynchronize(); }
__device__ __forceinline__ void start_next() { cudaTriggerProgrammaticLaunchCompletion(); }
#else
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void start_next() {}
#endif

// The number of multiprocessors of the current device.
inline int multiprocessors() {
  int count;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()));
  return count;
}

}  // namespace gmc::cuda
