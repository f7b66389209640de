// What is done with payloads themselves: unpack, the verdict over their headers, giving a skipped
// step's payload back to memory, and DGC's momentum factor masking.
#include "kernels.h"
#include "partition.h"
#include "payload_reader.h"

namespace gmc::cpu {
namespace {

// Calls function(position, index, value) for each entry, tiles shared out between threads.
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

// A damaged payload must be found before anything was changed.
void check(const Payload& payload) {
  for_each_entry(payload, [](int64_t, int64_t, float) {});
}

}  // namespace

void unpack(const Payload& payload, int64_t* indices, float* values, int64_t* nonfinite) {
  *nonfinite = PayloadReader(payload, 0).nonfinite();
  for_each_entry(payload, [=](int64_t position, int64_t index, float value) {
    indices[position] = index;
    values[position] = value;
  });
}

uint32_t verdict(const uint8_t* payloads, int64_t ranks, int64_t nbytes) {
  BucketVerdict verdict;
  for (int64_t rank = 0; rank < ranks; ++rank)
    verdict.add(read_header(payloads + rank * nbytes), nbytes);
  return verdict.result();
}

uint32_t verdict(const float* counts, int64_t ranks) {
  BucketVerdict verdict;
  for (int64_t rank = 0; rank < ranks; ++rank) verdict.add(counts[rank], counts[ranks + rank]);
  return verdict.result();
}

void payload_nonfinite(const uint8_t* payloads, int64_t ranks, int64_t nbytes, int64_t* nonfinite) {
  for (int64_t rank = 0; rank < ranks; ++rank)
    nonfinite[rank] = read_header(payloads + rank * nbytes).nonfinite;
}

void restore(float* memory, const Payload& payload) {
  check(payload);
  for_each_entry(payload, [=](int64_t, int64_t index, float value) { memory[index] += value; });
}

void mask(float* momentum_buffer, const Payload& payload) {
  check(payload);
  for_each_entry(payload, [=](int64_t, int64_t index, float value) {
    if (value != 0.0f) momentum_buffer[index] = 0.0f;
  });
}

}  // namespace gmc::cpu
