// compress: what its kernels take, and its parts.
#pragma once

#include <algorithm>

#include "aggregate.cuh"
#include "args.h"
#include "launch.h"
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

// How many blocks refine, count and emit have for each range: as many as run at once.
inline int64_t group_count(int64_t numel, int64_t ranges) {
  const int64_t processors = (multiprocessors() + ranges - 1) / ranges;
  return std::min({work_tile_count(numel), kResidentBlocks * processors, int64_t{kMaxGroups}});
}

// How the work tiles of a range are shared out between the blocks that work on it: in runs, the
// first `longer` of which have one tile more than the others.
struct Groups {
  uint32_t each, longer;

  Groups(int64_t numel, int64_t blocks)
      : each(static_cast<uint32_t>(work_tile_count(numel) / blocks)),
        longer(static_cast<uint32_t>(work_tile_count(numel) % blocks)) {}

  __device__ uint32_t first_tile(uint32_t group) const { return group * each + min(group, longer); }
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
  int64_t blocks;  // of refine, count and emit for each range
  Groups groups[2];
  Workspaces workspaces;

  SelectArgs(const CompressArgs& args, uint8_t* payloads, uint32_t tag)
      : memory(args.rule.memory),
        found_inf(args.rule.found_inf),
        payloads(payloads),
        ranges(static_cast<uint32_t>(args.ranges.count)),
        tag(tag),
        shapes{args.ranges.full, args.ranges.last},
        layouts{PayloadLayout(shapes[0]), PayloadLayout(shapes[1])},
        blocks(group_count(shapes[0].numel, ranges)),
        groups{{shapes[0].numel, blocks}, {shapes[1].numel, blocks}},
        workspaces(args.workspaces) {}
};

// What of it belongs to the range that a block works on.
struct OwnSelection {
  float* memory;
  PayloadShape shape;
  const PayloadLayout& layout;
  Groups groups;  // not a reference: emit shares it between threads
  uint8_t* payload;
  PayloadView<uint8_t> out;
  Workspace workspace;

  __device__ explicit OwnSelection(const SelectArgs& args)
      : memory(args.memory + blockIdx.y * args.shapes[0].numel),
        shape(args.shapes[blockIdx.y + 1 == args.ranges]),
        layout(args.layouts[blockIdx.y + 1 == args.ranges]),
        groups(args.groups[blockIdx.y + 1 == args.ranges]),
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
