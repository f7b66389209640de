#include <cuda_runtime.h>

#include "cuda/error.h"
#include "device.h"

namespace gmc {
namespace {

constexpr int kThreads = 32;

__global__ void probe_kernel(int* out) { out[threadIdx.x] = static_cast<int>(threadIdx.x) + 1; }

cudaError_t probe_launch(int* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kThreads);
  return cudaLaunchKernelEx(&config, probe_kernel, out);
}

// An error of the launch (no code for this device) and one of the run are both of interest.
cudaError_t probe_current_device(bool& right) {
  int* out = nullptr;
  int host[kThreads] = {};
  cudaError_t status = cudaMalloc(&out, sizeof(host));
  if (status != cudaSuccess) return status;
  status = probe_launch(out);
  if (status == cudaSuccess) status = cudaMemcpy(host, out, sizeof(host), cudaMemcpyDeviceToHost);
  const cudaError_t freed = cudaFree(out);
  right = true;
  for (int i = 0; i < kThreads; ++i) right = right && host[i] == i + 1;
  return status != cudaSuccess ? status : freed;
}

}  // namespace

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count(std::string& error) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  (void)cudaGetLastError();  // a machine without a GPU is no error for whoever launches next
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
    error = "no NVIDIA driver is installed";  // the runtime itself calls it "insufficient"
  } else {
    error = status == cudaSuccess ? "no CUDA device is visible" : cudaGetErrorString(status);
  }
  return 0;
}

ProbedDevice probe_device(int index) {
  ProbedDevice device;
  int previous = 0;
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDevice(&previous);
  if (status == cudaSuccess) status = cudaSetDevice(index);
  if (status == cudaSuccess) status = cudaGetDeviceProperties(&properties, index);
  if (status == cudaSuccess) {
    device.name = properties.name;
    device.major = properties.major;
    device.minor = properties.minor;
    device.multiprocessors = properties.multiProcessorCount;
    device.l2_bytes = static_cast<std::size_t>(properties.l2CacheSize);
    bool right = false;
    status = probe_current_device(right);
    if (status == cudaSuccess && !right) device.error = "the probe kernel gave a wrong answer";
  }
  if (status != cudaSuccess) device.error = explain(status);
  (void)cudaSetDevice(previous);
  (void)cudaGetLastError();
  return device;
}

}  // namespace gmc
