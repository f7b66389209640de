// Calls the samples from Python.
#include "case.h"
#include "samples.h"

CUDA_CASE(sum) {
  require(sum_launch(in.array<int>("x"), int(in.count("x")), in.output<unsigned>("total", 2),
                     int(in.integer("blocks")), nullptr));
}

CUDA_CASE(scan) {
  const int64_t n = in.count("x");
  require(scan_launch(in.array<unsigned>("x"), int(n), in.output<unsigned>("out", n), nullptr));
}

CUDA_CASE(compact) {
  const int64_t n = in.count("x");
  require(compact_launch(in.array<float>("x"), int(n), in.output<float>("out", n),
                         in.output<unsigned>("count", 1), nullptr));
}

CUDA_CASE(last_block) {
  const int blocks = int(in.integer("blocks"));
  require(last_block_launch(in.array<int>("x"), int(in.count("x")),
                            in.output<int>("partial", blocks), in.array<unsigned>("ticket"),
                            in.output<int>("out", 1), blocks, nullptr));
}

CUDA_CASE(warp) {
  require(
      warp_launch(in.array<unsigned>("x"), in.output<unsigned>("out", 32 * warp_results), nullptr));
}

CUDA_CASE(bits) {
  require(
      bits_launch(in.array<unsigned>("x"), in.output<unsigned>("out", 64 * bits_results), nullptr));
}

CUDA_CASE(atomics) {
  require(atomics_launch(in.array<unsigned>("x"), in.array<unsigned>("out"), nullptr));
}

CUDA_CASE(turns) {
  require(turns_launch(in.array<unsigned>("turn"), in.output<unsigned>("out", 64), nullptr));
}

CUDA_CASE(early) {
  const int64_t n = in.count("x");
  int *a, *b;
  require(cudaMalloc(&a, n * sizeof(int)));
  require(cudaMalloc(&b, n * sizeof(int)));
  int* out = in.output<int>("out", n);
  require(early_launch(in.array<int>("x"), in.array<int>("y"), int(n), a, b, out, nullptr));
  require(cudaFree(a));
  require(cudaFree(b));
}

CUDA_CASE(streams) {
  const int64_t n = in.count("x");
  int* out = in.output<int>("out", n);
  cudaStream_t making, using_it;
  cudaEvent_t event;
  require(cudaStreamCreate(&making));
  require(cudaStreamCreate(&using_it));
  require(cudaEventCreate(&event));
  require(streams_launch(in.array<int>("x"), int(n), in.output<int>("made", n), out, making,
                         using_it, event));
  unsigned sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += unsigned(out[i]);
  *in.output<unsigned>("sum", 1) = sum;
  require(cudaEventDestroy(event));
  require(cudaStreamDestroy(making));
  require(cudaStreamDestroy(using_it));
}
