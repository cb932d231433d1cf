#include "cpu/isa.h"

#include <cstdlib>
#include <string>

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
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string capability = value ? value : "";
  const Isa cap = capability == "default" ? Isa::baseline
                  : capability == "avx2"  ? Isa::avx2
                                          : Isa::avx512;
  return best < cap ? best : cap;
}

std::string cpu_isa_op() {
  return isa_name(cpu_isa());
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace fused_resnet
