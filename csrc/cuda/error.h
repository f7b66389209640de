// What an error of the CUDA runtime says to a user.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace gmc {

inline std::string cuda_version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Explains an error, with the way out where this build and this machine do not fit. Clears it, so
// that no later call takes it for its own.
inline std::string explain(cudaError_t status) {
  (void)cudaGetLastError();
  std::string text = cudaGetErrorString(status);
  const std::string rebuild = " pip install --no-build-isolation --no-deps --force-reinstall .";
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion ||
      status == cudaErrorInvalidDeviceFunction) {
    int device = 0, major = 0, minor = 0;
    (void)cudaGetDevice(&device);
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string capability = std::to_string(major) + "." + std::to_string(minor);
    text += ": the device has capability " + capability + ", and gmc_cuda was built for " +
            GMC_CUDA_ARCHS + ". Build it for this device, in the folder of its sources: " +
            "TORCH_CUDA_ARCH_LIST=" + capability + rebuild;
  } else if (status == cudaErrorInsufficientDriver) {
    int driver = 0;
    (void)cudaDriverGetVersion(&driver);
    text += ": gmc_cuda was built with CUDA " + cuda_version(CUDART_VERSION) +
            ", and the driver knows CUDA " + cuda_version(driver) +
            ". Update the driver, or build gmc_cuda with an older toolkit, in the folder of its "
            "sources: CUDA_HOME=..." +
            rebuild;
  }
  return text;
}

}  // namespace gmc
