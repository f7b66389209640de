// One way to launch: typed arguments, a given stream, the error handed back.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace gmc::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_with(cudaLaunchAttribute* attribute, void (*kernel)(Parameters...),
                        int64_t blocks, int threads, cudaStream_t stream,
                        const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  return launch_with(nullptr, kernel, blocks, threads, stream, arguments...);
}

// Whether the current device and the code that runs there can start kernels early, once it is
// known: asking costs as much as a launch. The code of all kernels is of one kind.
enum class Early : uint8_t { kUnknown, kNo, kYes };
constexpr int kKnownDevices = 64;
inline std::atomic<Early> early_on_device[kKnownDevices];

inline cudaError_t find_early(const void* kernel, bool* possible) {
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  Early known = device < kKnownDevices ? early_on_device[device].load() : Early::kUnknown;
  if (known == Early::kUnknown) {
    cudaFuncAttributes compiled;
    status = cudaFuncGetAttributes(&compiled, kernel);
    if (status != cudaSuccess) return status;
    known = compiled.ptxVersion >= 90 ? Early::kYes : Early::kNo;
    if (device < kKnownDevices) early_on_device[device].store(known);
  }
  *possible = known == Early::kYes;
  return cudaSuccess;
}

// The kernel starts while the one before it on the stream still runs, as soon as all blocks of that
// one have called start_next(), and calls wait_for_previous() before it touches anything that any
// earlier kernel writes, or writes what an earlier one reads.
//
// Devices before sm_90 cannot do so, nor can code that was made for them: there it is launched as
// usual, and both calls do nothing.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads,
                         cudaStream_t stream, const Arguments&... arguments) {
  bool possible;
  const cudaError_t status = find_early(reinterpret_cast<const void*>(kernel), &possible);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(possible ? &early : nullptr, kernel, blocks, threads, stream, arguments...);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void wait_for_previous() { cudaGridDependencySynchronize(); }
__device__ __forceinline__ void start_next() { cudaTriggerProgrammaticLaunchCompletion(); }
#else
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void start_next() {}
#endif

// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int* count) {
  int device;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace gmc::cuda
