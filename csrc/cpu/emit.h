// Writing the selected entries of one part after another into a payload.
#pragma once

#include "candidates.h"
#include "select.h"

namespace gmc::cpu {

class Emitter {
 public:
  Emitter(const PayloadShape& shape, int scale, uint8_t* payload, const Collector& collector,
          const Selection& selection, int64_t part, int64_t first_tile);

  // Writes the selected among the candidates and puts the others back.
  void emit(Candidates* candidates);

  // Tiles before `end` that have not begun yet begin after all entries written so far.
  void start_tiles(int64_t end);

 private:
  Candidates separate(Candidates* candidates);
  template <class Format>
  void write(const Candidates& selected);

  const PayloadView<uint8_t> out_;
  const WireType wire_;
  const int scale_;
  const Collector& collector_;
  const uint32_t threshold_;
  int64_t ties_, position_, next_tile_;
};

// Writes padding and header, the parts that do not depend on entries, and zeros where emitters set
// bits. The header counts no non-finite values yet.
void write_frame(const PayloadShape& shape, int scale, uint32_t tag, uint8_t* payload);

}  // namespace gmc::cpu
