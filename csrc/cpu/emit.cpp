#include "emit.h"

#include <algorithm>

namespace gmc::cpu {
namespace {

// Sets bits at ascending places of an array of zeros. Another part may share the words at its ends.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* array) : words_(reinterpret_cast<uint64_t*>(array)) {}
  BitWriter(const BitWriter&) = delete;
  ~BitWriter() { flush(); }

  // The bits must not extend over a multiple of 64.
  void set(int64_t place, uint64_t bits) {
    if (place >> 6 != word_) {
      flush();
      word_ = place >> 6;
    }
    bits_ |= bits << (place & 63);
  }

 private:
  void flush() {
    if (bits_ != 0) __atomic_fetch_or(words_ + word_, bits_, __ATOMIC_RELAXED);
    bits_ = 0;
  }

  uint64_t* const words_;
  int64_t word_ = 0;
  uint64_t bits_ = 0;
};

}  // namespace

Emitter::Emitter(const PayloadShape& shape, int scale, uint8_t* payload, const Collector& collector,
                 const Selection& selection, int64_t part, int64_t first_tile)
    : out_(payload, PayloadLayout(shape)),
      wire_(shape.wire),
      scale_(scale),
      collector_(collector),
      threshold_(selection.threshold),
      ties_(selection.ties[part]),
      position_(selection.position[part]),
      next_tile_(first_tile) {}

void Emitter::emit(Candidates* candidates) {
  collector_.put_back(separate(candidates));
  collector_.take_out_again(*candidates, scale_);
  with_wire_type(wire_, [&](auto format) { write<decltype(format)>(*candidates); });
}

void Emitter::start_tiles(int64_t end) {
  for (; next_tile_ < end; ++next_tile_) out_.starts[next_tile_] = static_cast<uint32_t>(position_);
}

// Keeps the selected and returns the others. The loop has no branches, because whether a candidate
// is selected cannot be predicted.
Candidates Emitter::separate(Candidates* candidates) {
  uint32_t* index = candidates->index.get();
  uint32_t* bits = candidates->bits.get();
  Candidates others;
  others.reserve(candidates->count);
  int64_t selected = 0;
  for (int64_t i = 0; i < candidates->count; ++i) {
    const uint32_t this_index = index[i], this_bits = bits[i];
    const uint32_t key = this_bits & kKeyMask;
    const bool tie = key == threshold_;
    const bool take = (key > threshold_) | (tie & (ties_ > 0));
    ties_ -= tie;
    others.index[others.count] = this_index;
    others.bits[others.count] = this_bits;
    others.count += !take;
    index[selected] = this_index;
    bits[selected] = this_bits;
    selected += take;
  }
  candidates->count = selected;
  return others;
}

template <class Format>
void Emitter::write(const Candidates& selected) {
  BitWriter bitmap(out_.bitmap), halves(out_.values);
  for (int64_t i = 0; i < selected.count; ++i, ++position_) {
    const uint32_t index = selected.index[i];
    start_tiles(index / kTile + 1);
    out_.low[position_] = static_cast<uint8_t>(index % kBlock);
    bitmap.set(position_ + index / kBlock, 1);
    const uint32_t code = Format::encode(bits_float(selected.bits[i]), scale_);
    if constexpr (Format::kBits < 8) {
      halves.set(position_ * Format::kBits, code);
    } else {
      store_code<Format>(out_.values, position_, code);
    }
  }
}

void write_frame(const PayloadShape& shape, int scale, uint32_t tag, uint8_t* payload) {
  const PayloadLayout layout(shape);
  const auto clear = [=](int64_t begin, int64_t end) {
    std::fill(payload + begin, payload + end, uint8_t{0});
  };
  layout.for_each_gap(clear);
  clear(layout.bitmap, layout.bitmap_end);
  if (shape.wire == WireType::kFloat4) clear(layout.values, layout.values_end);
  *PayloadView(payload, layout).header = make_header(shape, 0, scale, tag);
}

}  // namespace gmc::cpu
