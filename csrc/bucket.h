// The tensors of a bucket and what was sent for it, as plain pointers and sizes: what the kernels
// of every backend take.
#pragma once

#include "payload.h"

namespace gmc {

// One tensor of a bucket. data == nullptr stands for zeros.
struct Segment {
  void* data;
  int64_t begin, numel;  // place in the bucket's index space
  DType dtype;
};

// One rank's payload, or those of several ranks one behind the other.
struct Payload {
  const uint8_t* data;
  PayloadShape shape;
};

}  // namespace gmc
