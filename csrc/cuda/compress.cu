#include "compress.h"

namespace gmc::cuda {

cudaError_t compress_launch(const CompressArgs& args, cudaStream_t stream) {
  const RuleArgs& rule = args.rule;
  const SelectArgs select{
      rule.memory, {rule.numel, args.k, args.wire}, rule.found_inf, args.payload, args.workspace};
  cudaError_t status = pass_launch(args, stream);
  if (status == cudaSuccess) status = repair_launch(select, stream);
  if (status == cudaSuccess) status = select_launch(select, stream);
  return status;
}

}  // namespace gmc::cuda
