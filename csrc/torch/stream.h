// Work on a CUDA tensor's device: on torch's current stream there, with memory of torch's caching
// allocator.
#pragma once

#include <functional>

#include "tensor.h"

namespace gmc::cuda {

struct Stream;

// Calls function(stream) while the device is current. An error of CUDA becomes a RuntimeError that
// says what to do about it. Nothing here waits for the device.
void on_stream(Device device, const std::function<void(const Stream&)>& function);

}  // namespace gmc::cuda
