#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fused_resnet {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Isa best = avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  const Isa best = Isa::baseline;
#endif
  const char* wanted = std::getenv("FUSED_RESNET_CPU_ISA");
  const std::string limit = wanted ? wanted : "";
  const Isa cap = limit == "none" ? Isa::baseline : limit == "avx2" ? Isa::avx2 : Isa::avx512;
  return best < cap ? best : cap;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fused_resnet
