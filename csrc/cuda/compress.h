// compress, from plain pointers: what it takes and the launches it is made of.
#pragma once

#include "aggregate.cuh"
#include "rule_args.h"
#include "workspace.h"

namespace gmc::cuda {

struct CompressArgs {
  RuleArgs rule;
  Aggregate aggregate;
  int64_t k;
  WireType wire;
  uint32_t tag;
  uint8_t* payload;
  Workspace workspace;
  bool fresh;  // the workspace holds anything, not yet zeros
};
static_assert(sizeof(CompressArgs) <= 4096, "the limit for kernel parameters on older drivers");

// What the selection needs of them. The payload's layout is worked out on the host: as part of a
// kernel's parameters it takes no registers.
struct SelectArgs {
  float* memory;
  Scalar found_inf;
  uint8_t* payload;
  PayloadShape shape;
  uint32_t tag;
  PayloadLayout layout;
  PayloadView<uint8_t> out;
  Workspace workspace;

  explicit SelectArgs(const CompressArgs& args)
      : memory(args.rule.memory),
        found_inf(args.rule.found_inf),
        payload(args.payload),
        shape{args.rule.numel, args.k, args.wire},
        tag(args.tag),
        layout(shape),
        out(payload, layout),
        workspace(args.workspace) {}
};

// All of compress. The workspace must be zero or as the last call left it, unless it is fresh.
cudaError_t compress_launch(const CompressArgs& args, cudaStream_t stream);

// Its parts, in order.
cudaError_t look_launch(const CompressArgs& args, cudaStream_t stream);
cudaError_t pass_launch(const CompressArgs& args, cudaStream_t stream);
cudaError_t repair_launch(const SelectArgs& args, cudaStream_t stream);
cudaError_t select_launch(const SelectArgs& args, cudaStream_t stream);

}  // namespace gmc::cuda
