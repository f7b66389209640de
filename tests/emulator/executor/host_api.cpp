// Device memory, copies and queries. "Device" memory is the host's heap, so that the address
// sanitizer guards it.
#include "../shim/host_api.h"

#include <cstdlib>
#include <cstring>

#include "happens_before.h"
#include "settings.h"
#include "shared_memory.h"
#include "streams.h"

namespace emulator {

cudaError_t allocate(void** memory, size_t bytes) {
  const happens_before::Unseen here;
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(memory, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  fill_with_junk(*memory, bytes, dice_of_case);
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, int block_size, size_t dynamic_bytes) {
  if (block_size < 1 || block_size > 1024) return cudaErrorInvalidValue;
  const size_t by_shared = dynamic_bytes == 0 ? 2 : shared_capacity / dynamic_bytes;
  *blocks = int(by_shared < 2 ? by_shared : 2);
  return cudaSuccess;
}

struct Copy {
  void* to;
  const void* from;  // null: every byte becomes `byte`
  int byte;
  size_t bytes;
};

void copy(const void* closure) {
  const Copy& wanted = *static_cast<const Copy*>(closure);
  if (wanted.from == nullptr)
    memset(wanted.to, wanted.byte, wanted.bytes);
  else
    memmove(wanted.to, wanted.from, wanted.bytes);
}

void append_copy(cudaStream_t stream, const Copy& wanted) {
  append_work(stream, reinterpret_cast<const void*>(&copy), copy,
              std::make_shared<const Copy>(wanted));
}

struct Description {
  cudaError_t error;
  const char *name, *text;
};

Description described(cudaError_t error) {
  static constexpr Description known[] = {
      {cudaSuccess, "cudaSuccess", "no error"},
      {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
      {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
      {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
       "invalid configuration argument"},
      {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
  };
  for (const Description& description : known)
    if (description.error == error) return description;
  return {error, "unrecognized error code", "unrecognized error code"};
}

}  // namespace emulator

const char* cudaGetErrorName(cudaError_t error) { return emulator::described(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return emulator::described(error).text; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = int(emulator::shared_default);
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::settings.multiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(emulator::shared_capacity);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  emulator::append_copy(stream, {to, from, 0, bytes});
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream) {
  emulator::append_copy(stream, {to, nullptr, byte, bytes});
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int byte, size_t bytes) {
  return cudaMemsetAsync(to, byte, bytes, nullptr);
}

cudaError_t cudaFree(void* memory) {
  const cudaError_t error = cudaDeviceSynchronize();
  free(memory);
  return error;
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  const cudaError_t error = cudaStreamSynchronize(stream);
  free(memory);
  return error;
}
