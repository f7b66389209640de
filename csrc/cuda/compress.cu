// compress: the payload of a bucket, in four parts of one to three kernels.
#include "compress.h"

namespace gmc::cuda {

int64_t state_nbytes(int64_t numel, int64_t k) { return workspace_nbytes(numel, k); }

// The state must be zero or as the last call left it. A workspace without state holds anything.
void run(const CompressCall& call, const Stream& stream) {
  const PayloadShape& shape = call.shape;
  const int64_t nbytes = call.state ? call.state_nbytes : workspace_nbytes(shape.numel, shape.k);
  void* const workspace = call.state ? call.state : stream.allocate(nbytes);
  const CompressArgs args{RuleArgs(call.rule, stream),
                          call.aggregate,
                          shape.k,
                          shape.wire,
                          call.tag,
                          call.payload,
                          make_workspace(workspace, nbytes, shape.numel),
                          !call.state};
  const SelectArgs selection(args);
  look(args, stream);
  pass(args, stream);
  repair(selection, stream);
  select(selection, stream);
}

}  // namespace gmc::cuda
