// The Python module: how the binary was built and, with CUDA, which devices it runs on.
// The operators are registered with the dispatcher by a library of their own (ops.cpp).
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#ifdef GMC_WITH_CUDA
#include "device.h"
#endif

namespace py = pybind11;

namespace {

// Only what the compiler itself knows: it stays true if the binary is copied elsewhere.
py::dict build_config() {
  py::dict config;
  config["python"] = PY_VERSION;
  config["compiler"] = __VERSION__;
  config["cplusplus"] = static_cast<long>(__cplusplus);
#ifdef GMC_WITH_CUDA
  config["with_cuda"] = true;
#else
  config["with_cuda"] = false;
#endif
  return config;
}

#ifdef GMC_WITH_CUDA
py::dict devices() {
  std::string error;
  int count = 0;
  std::vector<gmc::ProbedDevice> found;
  {
    py::gil_scoped_release unlocked;  // the first CUDA call of a process takes a second
    count = gmc::device_count(error);
    for (int i = 0; i < count; ++i) found.push_back(gmc::probe_device(i));
  }
  py::list list;
  for (const gmc::ProbedDevice& device : found) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["l2_bytes"] = device.l2_bytes;
    entry["error"] = device.error;
    list.append(entry);
  }
  py::dict result;
  result["runtime"] = gmc::runtime_version();
  result["error"] = error;
  result["devices"] = list;
  return result;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of gmc_cuda; its operators are torch.ops.gmc_cuda.*";
  m.def("build_config", &build_config, "What the compiler knew: Python, compiler, CUDA.");
#ifdef GMC_WITH_CUDA
  m.def("devices", &devices,
        "The CUDA devices: name, capability, multiprocessors, l2_bytes and error, which is empty "
        "if a kernel of this binary ran there. Without a device, `error` of the whole says why.");
#endif
}
