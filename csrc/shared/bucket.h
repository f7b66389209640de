// The tensors of a bucket, and what was sent for it, as plain pointers and sizes.
#pragma once

#include "shared/payload.h"

namespace gmc {

// One tensor of a bucket. data == nullptr stands for zeros.
struct Segment {
  void* data;
  int64_t begin, numel;  // place in the bucket's index space
  DType dtype;
};

// One rank's payload, or those of several ranks one after the other.
struct Payload {
  const uint8_t* data;
  PayloadShape shape;

  Payload of_rank(int64_t rank) const { return {data + rank * PayloadLayout(shape).nbytes, shape}; }
};

constexpr int64_t kMaxRanges = 65535;  // rows of blocks in a CUDA grid

// The ranges that a bucket is cut into, each with a payload of its own; one for a bucket that is
// not cut. All have as many elements, but for the last, which may have fewer. Their payloads lie
// one after the other, the last where one of full size would begin.
struct Ranges {
  PayloadShape full, last;
  int64_t count;

  GMC_HD int64_t width() const { return full.numel; }
  GMC_HD const PayloadShape& shape(int64_t range) const { return range + 1 < count ? full : last; }
  int64_t numel() const { return (count - 1) * width() + last.numel; }
  int64_t entries() const { return (count - 1) * full.k + last.k; }
  int64_t nbytes() const {
    return (count - 1) * PayloadLayout(full).nbytes + PayloadLayout(last).nbytes;
  }
  Payload payload(const uint8_t* first, int64_t range) const {
    return {Payload{first, full}.of_rank(range).data, shape(range)};
  }
};

inline Ranges uncut(const PayloadShape& bucket) { return {bucket, bucket, 1}; }

// The gathered payloads of a bucket of which only the size is known. Where the bucket is sent
// whole, nbytes is 0 and data is a float for each rank, its count of non-finite values, and then a
// float for each rank, its tag.
struct Gathered {
  const uint8_t* data;
  int64_t ranks, nbytes;  // nbytes: of one payload
};

struct Aggregate {
  const uint8_t* data;  // nullptr: there is none
  int64_t nbytes;
};

// A number that the host knows, or one in device memory that is read when a kernel runs.
struct Scalar {
  enum Type : uint32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

  const void* data;  // nullptr: `value` holds it
  Type type;
  float value;

  GMC_HD float load() const {
    if (!data) return value;
    if (type == kFloat64) return static_cast<float>(*static_cast<const double*>(data));
    return load_value(data, static_cast<DType>(type), 0);
  }
};

inline Scalar scalar(float value) { return {nullptr, Scalar::kFloat32, value}; }

}  // namespace gmc
