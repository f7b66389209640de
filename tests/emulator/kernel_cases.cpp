// Calls the launchers of csrc/cuda from Python; kernel_ops.py is the other end.
#include <algorithm>

#include "case.h"
#include "cuda/compress.h"
#include "cuda/kernels.h"
#include "cuda/segment_table.h"
#include "rule.h"

using namespace gmc;
using namespace gmc::cuda;
using emulator::Case;

namespace {

// A number by value, or in an array, which stands for device memory: float32 as such, float64.
Scalar number(Case& in, const char* name, float otherwise) {
  const std::string array = std::string(name) + "_array";
  if (in.has(array.c_str())) return {in.array<double>(array.c_str()), ScalarType::kFloat64, 0.0f};
  return scalar(in.has(name) ? static_cast<float>(in.number(name)) : otherwise);
}

// Arrays <prefix>0, <prefix>1, ... whose element counts and dtype codes (-1: None) are listed.
std::vector<Segment> segments(Case& in, const std::string& prefix) {
  std::vector<Segment> list;
  const std::string sizes = prefix + "_sizes", dtypes = prefix + "_dtypes";
  if (!in.has(sizes.c_str())) return list;
  int64_t begin = 0;
  for (int64_t i = 0; i < in.count(sizes.c_str()); ++i) {
    const int64_t numel = in.array<int64_t>(sizes.c_str())[i];
    const int64_t dtype = in.array<int64_t>(dtypes.c_str())[i];
    const std::string name = prefix + std::to_string(i);
    void* data = nullptr;
    if (dtype == 0) data = in.array<float>(name.c_str());
    if (dtype > 0) data = in.array<uint16_t>(name.c_str());
    list.push_back({data, begin, numel, static_cast<DType>(std::max<int64_t>(dtype, 0))});
    begin += numel;
  }
  return list;
}

SegmentList place(const std::vector<Segment>& list, SegmentPiece* own, int* used) {
  const auto allocate = [](int64_t nbytes) {
    void* memory = nullptr;
    require(cudaMalloc(&memory, nbytes));
    return memory;
  };
  SegmentList placed;
  require(place_segments(list, own, used, allocate, nullptr, &placed));
  return placed;
}

void release(const SegmentList& list) {
  if (list.stored) require(cudaFree(const_cast<TableSegment*>(list.stored)));
}

Payload payload(Case& in, const char* name) {
  return {in.array<uint8_t>(name),
          {in.integer("numel"), in.integer("k"), static_cast<WireType>(in.integer("wire"))}};
}

Aggregate aggregate(Case& in) {
  if (!in.has("aggregate")) return {nullptr, 0};
  return {in.array<uint8_t>("aggregate"), in.count("aggregate")};
}

const int32_t* skip(Case& in) { return in.has("skip") ? in.array<int32_t>("skip") : nullptr; }

void fill_rule(Case& in, RuleArgs* args) {
  args->memory = in.array<float>("memory");
  if (in.has("momentum_buffer")) args->momentum_buffer = in.array<float>("momentum_buffer");
  int used = 0;
  args->grads = place(segments(in, "grad"), &args->own, &used);
  args->params = place(segments(in, "param"), &args->own, &used);
  args->numel = in.count("memory");
  args->momentum = number(in, "momentum", 0.0f);
  args->grad_scale = number(in, "grad_scale", 1.0f);
  args->found_inf = number(in, "found_inf", 0.0f);
  args->weight_decay = static_cast<float>(in.number("weight_decay"));
  args->memory_decay = static_cast<float>(in.number("memory_decay"));
  args->maximize = in.integer("maximize") != 0;
  args->nesterov = in.integer("nesterov") != 0;
}

void fill_move(Case& in, MoveArgs* args) {
  args->lr = number(in, "lr", 0.0f);
  args->skip = skip(in);
  if (in.has("skipped_steps")) args->skipped_steps = in.array<int64_t>("skipped_steps");
  if (in.has("flags")) args->flags = in.array<uint32_t>("flags");
  int used = 0;
  args->params = place(segments(in, "param"), &args->own, &used);
}

void release(const RuleArgs& args) {
  release(args.grads);
  release(args.params);
}

}  // namespace

CUDA_CASE(state_nbytes) {
  *in.output<int64_t>("nbytes", 1) = workspace_nbytes(in.integer("numel"), in.integer("k"));
}

CUDA_CASE(compress) {
  CompressArgs args = {};
  fill_rule(in, &args.rule);
  args.k = in.integer("k");
  args.aggregate = aggregate(in);
  args.wire = static_cast<WireType>(in.integer("wire"));
  args.tag = static_cast<uint32_t>(in.integer("tag"));
  args.workspace = make_workspace(in.array<uint8_t>("state"), in.count("state"), args.rule.numel);
  args.fresh = in.integer("fresh") != 0;
  const PayloadLayout layout({args.rule.numel, args.k, args.wire});
  args.payload = in.output<uint8_t>("payload", layout.nbytes);
  require(compress_launch(args, nullptr));
  release(args.rule);
  const Control& control = *args.workspace.control;
  *in.output<int64_t>("repairs", 1) = static_cast<int64_t>(control.guess.repairs);
  *in.output<int64_t>("outcome", 1) = control.outcome;
  *in.output<int64_t>("from_memory", 1) = control.from_memory;
}

CUDA_CASE(accumulate) {
  AccumulateArgs args = {};
  fill_rule(in, &args.rule);
  if (in.has("aggregate")) args.aggregate = in.array<float>("aggregate");
  args.rank = in.integer("rank");
  args.ranks = in.integer("ranks");
  args.total = in.output<float>("total", args.rule.numel + args.ranks);
  require(accumulate_launch(args, nullptr));
  release(args.rule);
}

CUDA_CASE(apply_dense) {
  ApplyDenseArgs args = {};
  args.memory = in.array<float>("memory");
  args.numel = in.count("memory");
  args.total = in.array<float>("total");
  args.factor = mean_factor(in.count("total") - args.numel);
  fill_move(in, &args.move);
  require(apply_dense_launch(args, nullptr));
  release(args.move.params);
}

CUDA_CASE(verdict) {
  std::vector<Gathered> buckets;
  for (int64_t b = 0; b < in.integer("buckets"); ++b) {
    const std::string name = "payloads" + std::to_string(b);
    const int64_t ranks = in.array<int64_t>("ranks")[b];
    buckets.push_back({in.array<uint8_t>(name.c_str()), ranks, in.count(name.c_str()) / ranks});
  }
  for (int64_t b = 0; b < in.integer("dense"); ++b) {
    const std::string name = "counts" + std::to_string(b);
    const auto* counts = in.array<float>(name.c_str());
    buckets.push_back({reinterpret_cast<const uint8_t*>(counts), in.count(name.c_str()) / 2, 0});
  }
  require(verdict_launch(buckets.data(), static_cast<int>(buckets.size()),
                         in.output<uint32_t>("flags", 1), nullptr));
}

CUDA_CASE(payload_nonfinite) {
  const int64_t ranks = in.integer("ranks");
  const Gathered payloads{in.array<uint8_t>("payloads"), ranks, in.count("payloads") / ranks};
  require(payload_nonfinite_launch(payloads, in.output<int64_t>("nonfinite", ranks), nullptr));
}

CUDA_CASE(aggregate_flags) {
  std::vector<const uint8_t*> aggregates;
  for (int64_t i = 0; i < in.integer("count"); ++i)
    aggregates.push_back(in.array<uint8_t>(("aggregate" + std::to_string(i)).c_str()));
  const int count = static_cast<int>(aggregates.size());
  require(aggregate_flags_launch(aggregates.data(), count, in.output<int32_t>("flags", count),
                                 nullptr));
}

CUDA_CASE(fingerprint) {
  const auto dtype = static_cast<DType>(in.integer("dtype"));
  require(fingerprint_launch(in.array<uint8_t>("data"), dtype, in.integer("numel"),
                             in.output<unsigned long long>("print", 1), nullptr));
}

CUDA_CASE(merge) {
  const Payload payloads = payload(in, "payloads");
  const int64_t numel = payloads.shape.numel, ranks = in.integer("ranks");
  const int64_t capacity = aggregate_capacity(numel, payloads.shape.k, ranks);
  auto* out = in.output<uint8_t>("aggregate", AggregateLayout(numel, capacity).nbytes);
  require(merge_launch(payloads, ranks, skip(in), out, nullptr));
}

CUDA_CASE(apply) {
  ApplyArgs args = {};
  args.aggregate = aggregate(in);
  args.numel = in.integer("numel");
  fill_move(in, &args.move);
  if (in.has("memory")) {
    args.memory = in.array<float>("memory");
    args.payload = payload(in, "payload");
  }
  require(apply_launch(args, nullptr));
  release(args.move.params);
}

CUDA_CASE(restore) {
  require(restore_launch(in.array<float>("memory"), payload(in, "payload"), skip(in), nullptr));
}

CUDA_CASE(mask) {
  require(
      mask_launch(in.array<float>("momentum_buffer"), payload(in, "payload"), skip(in), nullptr));
}

CUDA_CASE(unpack) {
  const Payload from = payload(in, "payload");
  const int64_t k = from.shape.k;
  auto* indices = in.output<int64_t>("indices", k);
  auto* values = in.output<float>("values", k);
  std::fill_n(indices, k, int64_t{-1});
  std::fill_n(values, k, 0.0f);
  require(unpack_launch(from, indices, values, in.output<int64_t>("nonfinite", 1), nullptr));
}

CUDA_CASE(sparsify) {
  const int64_t numel = in.count("dense");
  auto* out = in.output<uint8_t>("aggregate", AggregateLayout(numel, numel).nbytes);
  require(sparsify_launch(in.array<float>("dense"), numel, out, nullptr));
}

CUDA_CASE(densify) {
  const int64_t numel = in.integer("numel");
  require(densify_launch(aggregate(in), numel, in.output<float>("dense", numel), nullptr));
}
