// loops.h, compiled for three instruction sets. Results do not depend on which one runs: every
// operation is rounded on its own (-ffp-contract=off), and none is reordered.
#include <ATen/Version.h>
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GMC_X86_DISPATCH
#include <immintrin.h>
#endif

#include <string>

#include "../numbers.h"
#include "loops_table.h"

namespace gmc::cpu {

namespace baseline {
#define GMC_TARGET
#include "loops.h"
#undef GMC_TARGET
}  // namespace baseline

#ifdef GMC_X86_DISPATCH
namespace avx2 {
#define GMC_AVX2
#define GMC_TARGET __attribute__((target("avx2")))
#include "loops.h"
#undef GMC_TARGET
#undef GMC_AVX2
}  // namespace avx2

namespace avx512 {
#define GMC_AVX512
#define GMC_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt,prefer-vector-width=512")))
#include "loops.h"
#undef GMC_TARGET
#undef GMC_AVX512
}  // namespace avx512
#endif

// Follows torch's own choice, and so its ATEN_CPU_CAPABILITY.
const Loops& loops() {
  static const Loops table = [] {
#ifdef GMC_X86_DISPATCH
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) return avx512::table();
    if (capability == "AVX2") return avx2::table();
#endif
    return baseline::table();
  }();
  return table;
}

}  // namespace gmc::cpu
