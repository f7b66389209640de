// The Python module gmc_cuda._C: how the binary was built. The operators are registered with the
// dispatcher by a library of their own (torch/ops.cpp).
#include <pybind11/pybind11.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How gmc_cuda was compiled; its operators are torch.ops.gmc_cuda.*";
  m.def("build_config", &build_config, "What the compiler knew: Python, compiler, CUDA.");
}
