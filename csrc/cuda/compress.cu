// compress: the payload of a bucket, in four parts of one to three kernels.
#include "compress.h"

namespace gmc::cuda {

int64_t state_nbytes(int64_t numel, int64_t k) { return workspace_nbytes(numel, k); }

// States must be zero or as the last call left them. A workspace without state holds anything.
void run(const CompressCall& call, const Stream& stream) {
  const Ranges& ranges = call.ranges;
  const int64_t nbytes =
      call.state_nbytes ? call.state_nbytes : workspace_nbytes(ranges.width(), ranges.full.k);
  void* const first = call.states ? call.states : stream.allocate(ranges.count * nbytes);
  const CompressArgs args{RuleArgs(call.rule, stream),
                          AggregateSource(call.aggregate, call.rule.numel),
                          ranges,
                          {make_workspace(first, nbytes, ranges.width()), nbytes},
                          !call.states};
  const SelectArgs selection(args, call.payloads, call.tag);
  look(args, stream);
  pass(args, stream);
  repair(selection, stream);
  select(selection, stream);
}

}  // namespace gmc::cuda
