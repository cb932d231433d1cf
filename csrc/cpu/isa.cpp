#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  // From asm/prctl.h of Linux 5.16: the registers are mapped for a process that asks for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return cpu_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

TileUnit detect_tile_unit() {
  const char* wanted = std::getenv("FUSED_RESNET_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  if (name == "amx_emulated") return TileUnit::emulated;
  return (name.empty() || name == "amx") && has_amx() ? TileUnit::amx : TileUnit::none;
}

}  // namespace

TileUnit tile_unit() {
  static const TileUnit unit = detect_tile_unit();
  return unit;
}

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
