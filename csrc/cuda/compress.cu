#include "compress.h"

namespace gmc::cuda {

cudaError_t compress_launch(const CompressArgs& args, cudaStream_t stream) {
  const SelectArgs select(args);
  cudaError_t status = look_launch(args, stream);
  if (status == cudaSuccess) status = pass_launch(args, stream);
  if (status == cudaSuccess) status = repair_launch(select, stream);
  if (status == cudaSuccess) status = select_launch(select, stream);
  return status;
}

}  // namespace gmc::cuda
