// What is done with payloads themselves: unpack, the verdict over their headers, giving a skipped
// step's payload back to memory, and DGC's momentum factor masking.
#include "kernels.h"
#include "partition.h"
#include "payload_reader.h"

namespace gmc::cpu {
namespace {

// Calls function(position, index, value) for each entry, tiles shared out between threads.
template <class Function>
void for_each_entry(const PayloadArgs& payload, const Function& function) {
  const PayloadReader reader(payload, 0);
  const int64_t parts = part_count(payload.numel);
  for_each_part(parts, [&](int64_t part) {
    const int64_t end = first_tile(part + 1, parts, payload.numel);
    for (int64_t tile = first_tile(part, parts, payload.numel); tile < end; ++tile) {
      const PayloadEntries entries = reader.tile(tile);
      for (int64_t i = 0; i < entries.count; ++i)
        function(entries.start + i, tile * kTile + entries.indices[i], reader.value(entries, i));
    }
  });
}

// A damaged payload must be found before anything was changed.
void check(const PayloadArgs& payload) {
  for_each_entry(payload, [](int64_t, int64_t, float) {});
}

}  // namespace

void unpack(const PayloadArgs& payload, int64_t* indices, float* values, int64_t* nonfinite) {
  *nonfinite = PayloadReader(payload, 0).nonfinite();
  for_each_entry(payload, [=](int64_t position, int64_t index, float value) {
    indices[position] = index;
    values[position] = value;
  });
}

uint32_t verdict(const uint8_t* payloads, int64_t ranks, int64_t nbytes) {
  uint32_t flags = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const auto* header = reinterpret_cast<const PayloadHeader*>(payloads + rank * nbytes);
    const auto wire = static_cast<DType>((header->tag >> 24) & 0xfu);
    const bool sound = wire <= DType::kFloat16 && header->tag == payload_tag(wire) &&
                       header->k >= 1 && header->k <= header->numel &&
                       PayloadLayout(header->numel, header->k, wire).nbytes == nbytes;
    if (!sound) flags |= kDamaged;
    if (header->nonfinite) flags |= kNonfinite;
  }
  return flags;
}

void restore(float* memory, const PayloadArgs& payload) {
  check(payload);
  for_each_entry(payload, [=](int64_t, int64_t index, float value) { memory[index] += value; });
}

void mask(float* momentum_buffer, const PayloadArgs& payload) {
  check(payload);
  for_each_entry(payload, [=](int64_t, int64_t index, float value) {
    if (value != 0.0f) momentum_buffer[index] = 0.0f;
  });
}

}  // namespace gmc::cpu
