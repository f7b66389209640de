// What the CUDA runtime says about the devices, and whether this binary runs on them.
#pragma once

#include <cstddef>
#include <string>

namespace gmc {

struct ProbedDevice {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  int multiprocessors = 0;
  std::size_t l2_bytes = 0;
  std::string error;  // empty: a kernel of this binary ran on the device and gave the right answer
};

// The version that the runtime library reports, e.g. 13020 for 13.2.
int runtime_version();

// The number of visible devices. When it is 0, `error` says why.
int device_count(std::string& error);

// Describes a device and runs a kernel on it; leaves the current device as it was.
ProbedDevice probe_device(int index);

}  // namespace gmc
