// loops.h, compiled for three instruction sets. Results do not depend on which one runs: every
// operation is rounded on its own (-ffp-contract=off), and none is reordered.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GMC_X86_DISPATCH
#include <immintrin.h>
#endif

#include <cstdlib>
#include <string>

#include "loops_table.h"
#include "shared/rule.h"

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

#ifdef GMC_X86_DISPATCH
// The best of the three instruction sets that this processor has, or a smaller one if
// ATEN_CPU_CAPABILITY (default, avx2, avx512) says so, which torch's own kernels follow too.
Loops choose_loops() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string asked = value ? value : "";
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (asked == "default") return baseline::table();
  if (has_avx512 && asked != "avx2") return avx512::table();
  return has_avx2 ? avx2::table() : baseline::table();
}
#else
Loops choose_loops() { return baseline::table(); }
#endif

const Loops& loops() {
  static const Loops table = choose_loops();
  return table;
}

}  // namespace gmc::cpu
