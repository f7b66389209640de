// compress: what its kernels take, and its parts.
#pragma once

#include "aggregate.cuh"
#include "args.h"
#include "workspace.h"

namespace gmc::cuda {

// The grid of each kernel has a row of blocks for each range of the bucket, blockIdx.y, so that one
// chain of launches compresses them all.
struct CompressArgs {
  RuleArgs rule;
  AggregateSource aggregate;
  Ranges ranges;
  Workspaces workspaces;
  bool fresh;  // the workspaces hold anything, not yet zeros
};
static_assert(sizeof(CompressArgs) <= kParameterLimit, "kernel parameters");

// The range that a block works on.
struct OwnRange {
  uint32_t begin, numel, k;
  Workspace workspace;

  __device__ explicit OwnRange(const CompressArgs& args)
      : begin(blockIdx.y * static_cast<uint32_t>(args.ranges.width())),
        numel(static_cast<uint32_t>(args.ranges.shape(blockIdx.y).numel)),
        k(static_cast<uint32_t>(args.ranges.shape(blockIdx.y).k)),
        workspace(args.workspaces.of_range(blockIdx.y)) {}
};

// What the selection needs. The layout of payloads is computed on the host: as part of a kernel's
// parameters it takes no registers.
struct SelectArgs {
  float* memory;
  Scalar found_inf;
  uint8_t* payloads;
  uint32_t ranges, tag;
  PayloadShape shapes[2];  // of a full range and of the last
  PayloadLayout layouts[2];
  Workspaces workspaces;

  SelectArgs(const CompressArgs& args, uint8_t* payloads, uint32_t tag)
      : memory(args.rule.memory),
        found_inf(args.rule.found_inf),
        payloads(payloads),
        ranges(static_cast<uint32_t>(args.ranges.count)),
        tag(tag),
        shapes{args.ranges.full, args.ranges.last},
        layouts{PayloadLayout(shapes[0]), PayloadLayout(shapes[1])},
        workspaces(args.workspaces) {}
};

// What of it belongs to the range that a block works on.
struct OwnSelection {
  float* memory;
  PayloadShape shape;
  const PayloadLayout& layout;
  uint8_t* payload;
  PayloadView<uint8_t> out;
  Workspace workspace;

  __device__ explicit OwnSelection(const SelectArgs& args)
      : memory(args.memory + blockIdx.y * args.shapes[0].numel),
        shape(args.shapes[blockIdx.y + 1 == args.ranges]),
        layout(args.layouts[blockIdx.y + 1 == args.ranges]),
        payload(args.payloads + blockIdx.y * args.layouts[0].nbytes),
        out(payload, layout),
        workspace(args.workspaces.of_range(blockIdx.y)) {}
};

// The parts of compress, in order.
void look(const CompressArgs& args, const Stream& stream);
void pass(const CompressArgs& args, const Stream& stream);
void repair(const SelectArgs& args, const Stream& stream);
void select(const SelectArgs& args, const Stream& stream);

}  // namespace gmc::cuda
