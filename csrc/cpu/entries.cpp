// What is done with the entries of payloads: unpack, giving a skipped step's payloads back to
// memory, and DGC's momentum factor masking.
#include "partition.h"
#include "payload_reader.h"
#include "shared/calls.h"

namespace gmc::cpu {
namespace {

// Calls function(position, index, value) for each entry, with the tiles divided between threads.
template <class Function>
void for_each_entry(const Payload& payload, const Function& function) {
  const PayloadReader reader(payload, 0);
  for_each_tile_with<TileIndices>(payload.shape.numel, [&](int64_t tile, TileIndices* indices) {
    const PayloadEntries entries = reader.tile(tile, indices);
    with_wire_type(payload.shape.wire, [&](auto format) {
      for (int64_t i = 0; i < entries.count; ++i)
        function(entries.start + i, tile * kTile + entries.indices[i],
                 entries.template value<decltype(format)>(i));
    });
  });
}

// Calls function(index in the bucket, value) for each entry of the payloads of those ranges for
// which acts(range). A damaged one must be found before anything was changed, so all are read once
// without a call.
template <class Choice, class Function>
void for_each_entry(const uint8_t* payloads, const Ranges& ranges, const Choice& acts,
                    const Function& function) {
  for (int64_t range = 0; range < ranges.count; ++range)
    if (acts(range))
      for_each_entry(ranges.payload(payloads, range), [](int64_t, int64_t, float) {});
  for (int64_t range = 0; range < ranges.count; ++range)
    if (acts(range))
      for_each_entry(ranges.payload(payloads, range), [&](int64_t, int64_t index, float value) {
        function(range * ranges.width() + index, value);
      });
}

}  // namespace

void run(const UnpackCall& call) {
  *call.nonfinite = PayloadReader(call.payload, 0).nonfinite();
  for_each_entry(call.payload, [&](int64_t position, int64_t index, float value) {
    call.indices[position] = index;
    call.values[position] = value;
  });
}

void run(const RestoreCall& call) {
  const int32_t* const verdict = call.skip.verdict;
  const auto acts = [&](int64_t range) {
    return !verdict || verdict[call.by_range ? range : 0] != 0;
  };
  float* const memory = call.memory;
  for_each_entry(call.payloads, call.ranges, acts,
                 [=](int64_t index, float value) { memory[index] += value; });
}

void run(const MaskCall& call) {
  if (call.skip.skipped()) return;
  const auto acts = [](int64_t) { return true; };
  for_each_entry(call.payloads, call.ranges, acts, [&](int64_t index, float value) {
    if (value != 0.0f) call.momentum_buffer[index] = 0.0f;
  });
}

}  // namespace gmc::cpu
