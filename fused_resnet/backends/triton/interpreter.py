"""What Triton's interpreter leaves out, for `TRITON_INTERPRET=1`.

The interpreter keeps bfloat16 as its bits. It multiplies these as integers in `tl.dot` and cuts
float32 off where the hardware rounds to nearest even, and in float8_e4m3fn it rounds half up and
knows no NaN; it never rounds float32 products to TF32; up to Triton 3.7 a maximum of NaN and a
number is NaN also where a GPU takes the number; and Triton 3.6 with NumPy 2.4 cannot take a number
it has computed as a loop's bound. `repair` puts that right, so that interpreted kernels compute
what a GPU does, up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _round_bits(values: np.ndarray, dropped: int) -> np.ndarray:
    """Bits of float32 values rounded to nearest even, the last `dropped` ones zero; NaN is kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half, last = np.uint32((1 << (dropped - 1)) - 1), np.uint32(1)
    rounded = (bits + half + ((bits >> np.uint32(dropped)) & last)) >> np.uint32(dropped)
    kept = (bits >> np.uint32(dropped)) | np.uint32(1 << (22 - dropped))
    return np.where(np.isnan(values), kept, rounded) << np.uint32(dropped)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 values as the bits of the nearest bfloat16 ones."""
    return (_round_bits(values, 16) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tfloat32(values: np.ndarray) -> np.ndarray:
    """Float32 values rounded to TF32's ten bits after the point."""
    return _round_bits(values, 13).view(np.float32)


def to_float8(values: np.ndarray) -> np.ndarray:
    """Float32 values, at most 448 in magnitude, as the bits of the nearest float8_e4m3fn ones."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


def from_float8(bits: np.ndarray) -> np.ndarray:
    """The float32 values of float8_e4m3fn bits."""
    stored = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn)
    return stored.float().numpy()


def repair() -> None:
    """Replaces the interpreter's casts, dot product, maximum, minimum and conversion to `int`."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "_fused_resnet"):
        return
    builder._fused_resnet = True
    cast, handle = builder.cast_impl, interpreter.TensorHandle
    fp_to_fp = builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return handle(to_bfloat16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(from_bfloat16(source.data), tl.float32)
        if kinds == (tl.float32, tl.float8e4nv):
            return handle(to_float8(source.data), tl.float8e4nv)
        if kinds == (tl.float8e4nv, tl.float32):
            return handle(from_float8(source.data), tl.float32)
        if kinds == (tl.float8e4nv, tl.float16):
            return handle(from_float8(source.data).astype(np.float16), tl.float16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.float8e4nv in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, _: Any) -> Any:
        if a.dtype.scalar == tl.int8:
            # Exact, and faster than NumPy's own integers.
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
            return handle(product.astype(np.int32) + acc.data, acc.dtype.scalar)
        operands = []
        for operand in (a, b):
            values = operand.data
            if operand.dtype.scalar == tl.bfloat16:
                values = from_bfloat16(values)
            elif operand.dtype.scalar == tl.float32 and "TF32" in str(precision).upper():
                values = to_tfloat32(values)
            operands.append(values.astype(np.float32))
        with np.errstate(invalid="ignore", over="ignore"):
            return handle(np.matmul(*operands) + acc.data, acc.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *rest: Any) -> Any:
        result = patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return result

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
