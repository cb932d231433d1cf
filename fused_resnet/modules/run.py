"""Runs the blocks that `forms.py` knows, fused as far as `read.py` allows.

What the fused way does not cover runs exactly as the original class does: `obstacle` says what
keeps a module from it, `input_obstacle` what keeps an input, and a single convolution or norm whose
arguments do not fit runs unfused inside `conv_norm_act`. Whole networks are run by `network.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import forms
from ..forms import Unit
from ..ops.residual_blocks import residual_blocks
from . import metadata, quantized
from .conv_norm_act import conv_norm_act
from .read import (
    conv_norm,
    downsample_obstacle,
    inference_block,
    input_obstacle,
    obstacle,
    obstacle_of_call,
    pads_channels,
    plain_block,
    split_downsample,
    working_parts,
)
from .training import block_training, plain_block_training


def run_unfused(module: nn.Module, x: Any, method: str = "forward") -> Tensor:
    """What the class that a module had before runs, as it is now.

    Unless the input is one on whose values the module runs fused: see `metadata.py`.
    """
    if (out := metadata.run_on_values(module, x, method)) is not None:
        return out
    return getattr(forms.of(module).original, method)(module, x)


def block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A residual block of any form."""
    if block.quantization is not None and (out := quantized.block_output(block, x)) is not None:
        return out
    form = forms.of(block)
    if not torch.compiler.is_compiling() and obstacle_of_call(x) is None:
        records = torch.is_grad_enabled()
        described = plain_block(block, form, records, records)
        if described is not None:
            out = (
                plain_block_training(block, form, described, x)
                if records
                else residual_blocks(x, [described])
            )
            if out is not None:
                return out
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return run_unfused(block, x)
    described = inference_block(block, x)
    if described is not None and (out := residual_blocks(x, [described])) is not None:
        return out
    if (out := block_training(block, x)) is not None:
        return out
    units = form.units_of(block)
    out = x
    for unit in units[:-1]:
        out = run_unit(block, unit, out)
    last, downsample = units[-1], getattr(block, form.shortcut)
    if not working_parts(block, last.between):
        channels = forms.part(block, last.conv).out_channels
        if pads_channels(downsample) and downsample.padded_channels(x) == channels:
            return run_unit(block, last, out, downsample.subsampled(x), narrow=True)
        return run_unit(block, last, out, shortcut_of(downsample, x))
    out = conv_norm_act(*conv_norm(block, last), out, None, None)
    for between in working_parts(block, last.between):
        out = between(out)
    out += shortcut_of(downsample, x)
    out = forms.part(block, last.act)(out)
    for after in working_parts(block, last.after):
        out = after(out)
    return out


def plain_block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A block of two convolutions without a shortcut."""
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return run_unfused(block, x)
    for unit in forms.of(block).units_of(block):
        x = run_unit(block, unit, x)
    return x


def run_unit(
    module: nn.Module,
    unit: Unit,
    x: Tensor,
    residual: Tensor | None = None,
    narrow: bool = False,
) -> Tensor:
    """A unit of a module without an obstacle; with a residual, none of `between` is working.

    A `narrow` residual has fewer channels than the output: see `conv_norm_act`.
    """
    act = forms.part(module, unit.act)
    between = working_parts(module, unit.between)
    act_now = None if between else act
    x = conv_norm_act(*conv_norm(module, unit), x, residual, act_now, narrow=narrow)
    if between:
        for layer in between:
            x = layer(x)
        x = act(x)
    for layer in working_parts(module, unit.after):
        x = layer(x)
    return x


def shortcut_of(downsample: nn.Module | None, x: Tensor) -> Tensor:
    """What a block adds to its last convolution's output."""
    if downsample is None:
        return x
    if downsample_obstacle(downsample) is not None:
        return downsample(x)
    before, (conv, norm) = split_downsample(downsample)
    for module in before:
        x = module(x)
    return conv_norm_act(conv, norm, x, None, None)
