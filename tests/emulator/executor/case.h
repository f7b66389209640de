// A case is one call from Python: named arrays and numbers in, the same arrays (and new ones) out.
//
//   CUDA_CASE(scale) {
//     float* x = in.array<float>("x");
//     require(scale_launch(x, in.count("x"), float(in.number("factor")), nullptr));
//   }
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../shim/host_api.h"

namespace emulator {

struct Array {
  std::string name;
  char kind;       // numpy's: 'f', 'i' or 'u'
  uint8_t item;    // bytes per element
  uint8_t offset;  // bytes by which the first element misses a multiple of 256
  uint64_t bytes;
  char* base;  // ends exactly where the array ends
  char* data() const { return base + offset; }
};

class Case {
 public:
  ~Case();
  // Element type T must have numpy's item size. Without such an array: a fault.
  template <class T>
  T* array(const char* name) {
    return reinterpret_cast<T*>(find(name, sizeof(T)).data());
  }
  bool has(const char* name) const;
  int64_t count(const char* name) const;    // elements
  int64_t integer(const char* name) const;  // of a Python int
  double number(const char* name) const;    // of a Python float or int
  // A new array, filled with junk, that goes back to Python. kind as in numpy.
  template <class T>
  T* output(const char* name, int64_t count,
            char kind = T(0.5) != T(0) ? 'f'
                        : T(-1) < T(0) ? 'i'
                                       : 'u') {
    return reinterpret_cast<T*>(add(name, kind, sizeof(T), 0, uint64_t(count) * sizeof(T)).data());
  }

  Array& add(const std::string& name, char kind, uint8_t item, uint8_t offset, uint64_t bytes);
  const std::vector<Array>& arrays() const { return arrays_; }

 private:
  const Array& find(const char* name, size_t item) const;
  std::vector<Array> arrays_;
};

[[noreturn]] void case_fault(const std::string& message);

struct Registration {
  Registration(const char* name, void (*run)(Case&));
};

}  // namespace emulator

// Ends the case with the error's name when a CUDA call failed.
#define require(call)                                                           \
  do {                                                                          \
    const cudaError_t error_ = (call);                                          \
    if (error_ != cudaSuccess)                                                  \
      emulator::case_fault(std::string(#call ": ") + cudaGetErrorName(error_)); \
  } while (0)

#define CUDA_CASE(name)                                                                \
  static void cuda_case_##name(emulator::Case& in);                                    \
  static emulator::Registration cuda_case_registered_##name(#name, &cuda_case_##name); \
  static void cuda_case_##name(emulator::Case& in)
