#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fused_resnet {
namespace {

// What FUSED_RESNET_CPU_ISA may say, in the order of Isa.
constexpr std::pair<const char*, Isa> kNames[] = {
    {"none", Isa::baseline},
    {"avx2", Isa::avx2},
    {"avx512", Isa::avx512},
};

// The most that FUSED_RESNET_CPU_ISA allows. An unknown value is an error: a mistyped one would
// otherwise look like a processor that has everything.
Isa allowed() {
  const char* wanted = std::getenv("FUSED_RESNET_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return std::end(kNames)[-1].second;
  std::string lower = wanted, known;
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  for (const auto& [name, isa] : kNames) {
    if (lower == name) return isa;
    known += (known.empty() ? "" : ", ") + std::string(name);
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
  return std::min(best, allowed());
}

std::string cpu_isa_name() {
  const Isa isa = cpu_isa();
  for (const auto& [name, one] : kNames)
    if (one == isa) return name;
  return "";
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

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa_name));
}

}  // namespace fused_resnet
