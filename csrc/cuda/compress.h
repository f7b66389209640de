// compress: what its kernels take, and its parts.
#pragma once

#include "aggregate.cuh"
#include "args.h"
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
static_assert(sizeof(CompressArgs) <= kParameterLimit, "kernel parameters");

// What the selection needs of CompressArgs. The payload's layout is computed on the host: as part
// of a kernel's parameters it takes no registers.
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

// The parts of compress, in order.
void look(const CompressArgs& args, const Stream& stream);
void pass(const CompressArgs& args, const Stream& stream);
void repair(const SelectArgs& args, const Stream& stream);
void select(const SelectArgs& args, const Stream& stream);

}  // namespace gmc::cuda
