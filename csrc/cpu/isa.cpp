#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_resnet {
namespace {

// The most that is used of the processor.
struct Allowed {
  const char* name;
  Isa vectors;
  PairUnit pairs;
  TileUnit tiles;
};

// What FUSED_RESNET_CPU_ISA may say.
constexpr Allowed kAllowed[] = {
    {"none", Isa::baseline, PairUnit::none, TileUnit::none},
    {"avx2", Isa::avx2, PairUnit::none, TileUnit::none},
    {"avx512", Isa::avx512, PairUnit::none, TileUnit::none},
    {"avx512bf16", Isa::avx512, PairUnit::avx512bf16, TileUnit::none},
    {"avx512bf16_emulated", Isa::avx512, PairUnit::emulated, TileUnit::none},
    {"amx", Isa::avx512, PairUnit::avx512bf16, TileUnit::amx},
    {"amx_emulated", Isa::avx512, PairUnit::none, TileUnit::emulated},
};
constexpr Allowed kEverything = {"", Isa::avx512, PairUnit::avx512bf16, TileUnit::amx};

// An unknown value is an error: a mistyped one would otherwise look like a processor that has
// everything.
Allowed allowed() {
  const char* wanted = std::getenv("FUSED_RESNET_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return kEverything;
  std::string lower = wanted, known;
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  for (const Allowed& one : kAllowed) {
    if (lower == one.name) return one;
    known += (known.empty() ? "" : ", ") + std::string(one.name);
  }
  throw std::runtime_error("FUSED_RESNET_CPU_ISA is '" + std::string(wanted) +
                           "', must be one of " + known);
}

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
  return std::min(best, allowed().vectors);
}

bool has_avx512bf16() {
#if defined(__x86_64__)
  return cpu_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  // From asm/prctl.h of Linux 5.16: the registers are mapped for a process that asks for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

TileUnit detect_tile_unit() {
  const TileUnit most = allowed().tiles;
  return most == TileUnit::amx && !has_amx() ? TileUnit::none : most;
}

// Whether the instruction makes up for being the slower one. Intel's issue one every second cycle
// (Emerald Rapids: 1.36 a nanosecond, where of vfmadd231ps there are 5.3), so half as many products
// as in float32; AMD's as often as vfmadd231ps.
bool pairs_are_fast() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

PairUnit detect_pair_unit() {
  const Allowed limit = allowed();
  const PairUnit most = limit.pairs;
  const bool asked_for = limit.name[0] != '\0';
  const bool missing =
      most == PairUnit::avx512bf16 && (!has_avx512bf16() || (!asked_for && !pairs_are_fast()));
  return missing || tile_unit() != TileUnit::none ? PairUnit::none : most;
}

std::string cpu_isa_name() {
  const Isa isa = cpu_isa();
  for (const Allowed& one : kAllowed) {
    if (one.vectors == isa) return one.name;
  }
  return "";
}

}  // namespace

TileUnit tile_unit() {
  static const TileUnit unit = detect_tile_unit();
  return unit;
}

PairUnit pair_unit() {
  static const PairUnit unit = detect_pair_unit();
  return unit;
}

bool tiles_asked_for() {
  static const bool asked = tile_unit() != TileUnit::none && allowed().name[0] != '\0';
  return asked;
}

bool has_vnni() {
#if defined(__x86_64__)
  return cpu_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_avx_vnni() {
#if defined(__x86_64__)
  // Compilers came to know its name later than the instruction. Subleaf 1 of leaf 7, EAX, bit 4:
  // Intel's Software Developer's Manual, volume 2, CPUID. All zero where there is no such subleaf.
  unsigned a = 0, b = 0, c = 0, d = 0;
  return cpu_isa() >= Isa::avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 &&
         (a >> 4 & 1) != 0;
#else
  return false;
#endif
}

bool has_int8_tiles() {
#if defined(__x86_64__)
  return tile_unit() == TileUnit::amx && __builtin_cpu_supports("amx-int8");
#else
  return false;
#endif
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

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa_name));
}

}  // namespace fused_resnet
