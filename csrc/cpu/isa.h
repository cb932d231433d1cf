// Which vector instructions this processor has, asked once at run time.
//
// Files named *_avx2.cpp, *_avx512.cpp, *_avx512bf16.cpp and *_amx.cpp are compiled for those
// instructions. They are entered only through a function pointer chosen here, keep everything else
// in an anonymous namespace and include no header with inline functions: the linker keeps one copy
// of an inline function, and if that were the one compiled for AVX-512, it would run everywhere.
#pragma once

namespace fused_resnet {

enum class Isa { baseline, avx2, avx512 };  // avx2: with FMA and F16C; avx512: F, BW, DQ and VL

// The best the processor has, or less where FUSED_RESNET_CPU_ISA (none, avx2, avx512, avx512bf16,
// avx512bf16_emulated, amx, amx_emulated; in any case) says so. Throws where that is something
// else.
Isa cpu_isa();

// The unit that sums products of pairs of bfloat16 in vectors: AVX512_BF16, where there are no
// tiles and it is faster than float32 is, or FUSED_RESNET_CPU_ISA names it;
// FUSED_RESNET_CPU_ISA=avx512bf16_emulated has it emulated.
enum class PairUnit { none, avx512bf16, emulated };
PairUnit pair_unit();

// The unit that multiplies tiles of bfloat16: AMX, if the processor has it and the kernel grants it
// to this process. FUSED_RESNET_CPU_ISA=amx_emulated has it emulated, and any other value but amx
// does without.
enum class TileUnit { none, amx, emulated };
TileUnit tile_unit();

// Whether the processor, as far as FUSED_RESNET_CPU_ISA lets it be used, sums products of bytes:
// AVX512_VNNI, AVX-VNNI, and AMX-INT8 where the unit is AMX.
bool has_vnni();
bool has_avx_vnni();
bool has_int8_tiles();

// Whether FUSED_RESNET_CPU_ISA names the unit: then float32 runs on it wherever it can, not only
// where that is faster.
bool tiles_asked_for();

// Makes what this thread has streamed past the caches visible to other threads.
void finish_streaming();

}  // namespace fused_resnet
