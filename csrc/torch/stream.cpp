#include "stream.h"

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#include "cuda/error.h"
#include "cuda/stream.h"

// Absent from builds of torch without CUDA, in which this library must load all the same.
#pragma weak aoti_torch_get_current_cuda_stream

namespace gmc::cuda {

void on_stream(Device device, const std::function<void(const Stream&)>& function) {
  const torch::stable::accelerator::DeviceGuard guard(device.index);
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &current));
  TensorList temporaries;  // freed memory is used again by later work on the same stream only
  const auto allocate = [&](int64_t nbytes) -> void* {
    temporaries.push_back(empty({nbytes}, ScalarType::Byte, device));
    return mutable_data<uint8_t>(temporaries.back());
  };
  try {
    function({static_cast<cudaStream_t>(current), allocate});
  } catch (const CudaError& error) {
    throw std::runtime_error("CUDA error: " + explain(error.status));
  }
}

}  // namespace gmc::cuda
