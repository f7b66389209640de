// Launchers of the sample kernels. Each sample is correct; -DBUG_... breaks it in one way.
#pragma once

#include <cuda_runtime.h>

// total[0] = sum of x[0..n-1], negative numbers counted in total[1].
cudaError_t sum_launch(const int* x, int n, unsigned* total, int blocks, cudaStream_t stream);

// out[i] = x[0] + ... + x[i], with one block; n is at most 65536.
cudaError_t scan_launch(const unsigned* x, int n, unsigned* out, cudaStream_t stream);

// The positive elements of x in order, and how many they are. x may have any alignment.
cudaError_t compact_launch(const float* x, int n, float* out, unsigned* count, cudaStream_t stream);

// out[0] = the largest of x, by the block that finishes last. partial has one element per block;
// ticket is zero before and after.
cudaError_t last_block_launch(const int* x, int n, int* partial, unsigned* ticket, int* out,
                              int blocks, cudaStream_t stream);

// Row l of out: what lane l of one warp got from each warp function (intrinsics.cu lists them).
constexpr int warp_results = 16;
cudaError_t warp_launch(const unsigned* x, unsigned* out, cudaStream_t stream);

// Row t of out: bit functions of x[t] and x[t + 1]; x has 64 elements.
constexpr int bits_results = 8;
cudaError_t bits_launch(const unsigned* x, unsigned* out, cudaStream_t stream);

// All 192 elements of x by different atomics into the ten elements of out.
cudaError_t atomics_launch(const unsigned* x, unsigned* out, cudaStream_t stream);

// out[t] = 63 - t, by threads that wait for each other; turn is zero before.
cudaError_t turns_launch(unsigned* turn, unsigned* out, cudaStream_t stream);

// out[i] = 6 x[i] + y[n - 1 - i], then x is zero; a and b hold n elements meanwhile.
cudaError_t early_launch(int* x, const int* y, int n, int* a, int* b, int* out,
                         cudaStream_t stream);

// out[i] = 3 x[n - 1 - i], which the host may read afterwards; made holds n elements meanwhile.
cudaError_t streams_launch(const int* x, int n, int* made, int* out, cudaStream_t making,
                           cudaStream_t using_it, cudaEvent_t event);
