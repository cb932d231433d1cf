"""Which convolutions the native kernels cover, and on which instructions they run them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from ...layers.description import output_size
from .. import library
from . import operators
from .precision import tile_products

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The filter's taps the kernel keeps offsets for, kMaxRuns in csrc/cpu/conv.h.
MOST_TAPS = 1024
# Of the gradient in a weight on tiles.
GRADIENTS_ON_TILES = (torch.bfloat16, torch.float32)
# Channels of a group with which tiles are half full, `fills_tiles()` in csrc/cpu/conv_layer.cpp.
LEAST_ON_TILES = 16
# The largest window that is pooled, kLargestPool in csrc/cpu/pool_linear.cpp.
LARGEST_POOL = 1024

ISA: str = operators.conv_isa()
TILE_ISA: str = operators.conv_tile_isa()
# What multiplies pairs of bfloat16; "" where tiles do.
PAIR_ISA: str = operators.conv_pair_isa()
# What training multiplies on tiles, or in pairs.
if TILE_ISA:
    TRAINED_ON_UNIT: tuple[torch.dtype, ...] = GRADIENTS_ON_TILES
else:
    TRAINED_ON_UNIT = (torch.bfloat16,) if PAIR_ISA else ()


def has_kernel(dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> bool:
    """Whether such a convolution is native, with what comes before and behind it."""
    return is_native(dtype, tuple(weight_shape), groups)


def on_tiles(dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> bool:
    """Whether the kernel multiplies tiles: `conv_isa()` in csrc/cpu/conv_layer.cpp."""
    if not TILE_ISA or dtype is not torch.bfloat16:
        return False
    return groups == 1 or (weight_shape[1] >= 16 and weight_shape[0] // groups >= 16)


def _vector_isa(dtype: torch.dtype) -> str:
    """What runs convolutions of a dtype that are not on tiles; "" where the library's do."""
    return PAIR_ISA if PAIR_ISA and dtype is torch.bfloat16 else ISA


@functools.lru_cache(maxsize=1024)
def is_native(dtype: torch.dtype, weight_shape: tuple[int, ...], groups: int) -> bool:
    """Whether the native kernel runs such convolutions."""
    if dtype not in NATIVE_DTYPES:
        return False
    if on_tiles(dtype, weight_shape, groups):
        return weight_shape[2] * weight_shape[3] <= MOST_TAPS
    isa = _vector_isa(dtype)
    if not isa:
        return False
    K, group_c, R, S = weight_shape
    if R * S > MOST_TAPS:
        return False
    group_k = K // groups
    lanes = 8 if isa == "avx2" else 16
    # Groups either fill vectors of output channels by themselves or share one evenly.
    shares_a_vector = group_k < lanes and lanes % group_k == 0 and group_c <= group_k
    return groups == 1 or group_k % lanes == 0 or shares_a_vector


def prefers_library(dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> bool:
    """Whether the library's convolution and a pass behind it are faster in NCHW, as measured.

    They are for a filter for each channel, in float32 on vectors. In channels_last none is.
    """
    is_depthwise = groups == weight_shape[0] > 1 and weight_shape[1] == 1
    return dtype is torch.float32 and not TILE_ISA and is_depthwise


def explain(
    operator: str,
    *,
    dtype: torch.dtype,
    weight_shape: Sequence[int] = (),
    input_shape: Sequence[int] = (),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    **_: object,
) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    if "conv_bn_act" in operator and is_native(dtype, tuple(weight_shape), groups):
        pooled = operator == "conv_bn_act_max_pool"
        before = "norm + " if operator == "norm_conv_bn_act" else ""
        isa = TILE_ISA if on_tiles(dtype, weight_shape, groups) else _vector_isa(dtype)
        outputs: tuple[int, ...] = ()
        if input_shape:
            outputs = output_size(input_shape[2:], weight_shape[2:], stride, padding, dilation)
        geometry = (tuple(stride), tuple(dilation), groups, pooled)
        if isa == ISA:
            isa = _with_winograd(weight_shape, geometry, input_shape[:1], outputs)
        if dtype in (torch.float32, torch.float16):
            isa = _isa_in_parts(dtype, weight_shape, geometry, input_shape[:1], outputs, isa)
        if not (pooled and groups > 1):
            native = f"cpu: native {before}convolution ({isa})"
            if pooled or before:
                return native
            instead = "; in NCHW the library's + normalize_act"
            return native + instead * prefers_library(dtype, weight_shape, groups)
    if operator == "quantized_residual_blocks":
        fastest, *_ = operators.quantized_kernels().split(",")
        return f"cpu: whole blocks in eight bits ({fastest})"
    if operator == "quantized_pool_linear":
        fastest, *_ = operators.quantized_kernels().split(",")
        return f"cpu: pooling + linear layer in eight bits ({fastest})"
    if operator == "quantized_stem":
        fastest, *_ = operators.quantized_kernels().split(",")
        return f"cpu: convolution in integers + pooling ({fastest})"
    if operator == "batch_norm_act_training":
        return "cpu: native statistics + scale_shift_act"
    return "cpu: " + library.explain(operator)


def _isa_in_parts(
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], int, bool],
    images: Sequence[int],
    outputs: Sequence[int],
    otherwise: str,
) -> str:
    """What runs a convolution of float32 or float16 on `images` of `outputs` pixels, or any."""
    stride, _, groups, pooled = geometry
    least = operators.float32_pixels_for_tiles(weight_shape, stride, groups, pooled)
    if least < 0 or (images and math.prod((*images, *outputs)) < least):
        return otherwise
    products = tile_products(dtype)
    tiles = f"{TILE_ISA}, {products} product{'s' if products != 1 else ''}"
    if images or least <= 1:
        return tiles
    return f"{tiles}, from {least} output pixels on, else {otherwise}"


def _with_winograd(
    weight_shape: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], int, bool],
    images: Sequence[int],
    outputs: Sequence[int],
) -> str:
    """How vectors run a convolution on `images` of `outputs` pixels, or on any."""
    least = operators.tiles_for_winograd(weight_shape, *geometry)
    if least < 0 or (images and math.prod((*images, *(-(-n // 2) for n in outputs))) < least):
        return ISA
    if images or least <= 1:
        return f"{ISA}, Winograd"
    return f"{ISA}, Winograd from {least} tiles of 2 x 2 outputs on"
