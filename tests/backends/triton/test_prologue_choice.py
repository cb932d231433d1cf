"""`tuning.prologue`: where a norm goes into the loads of the convolution behind it."""

import dataclasses

import pytest

from fused_resnet.tuning import estimate, prologue
from fused_resnet.tuning.architecture import ARCHITECTURES
from fused_resnet.tuning.problem import ConvProblem

# A bottleneck layer of DenseNet, over what all layers before it have made.
LAYER = ConvProblem(64, 512, 28, 28, 128, 1, 1, (1, 1), (0, 0), (1, 1), 1, "float16", False, None)
WIDE = dataclasses.replace(LAYER, K=512, R=3, S=3, padding=(1, 1))

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("gpu", ARCHITECTURES.values(), ids=lambda gpu: gpu.name)
def test_narrow_layers_save_a_pass_and_wide_filters_do_not(gpu):
    """One column of programs normalises once; nine taps of several columns do so many times."""
    tile, saved = prologue.choose(LAYER, gpu)
    assert tile in prologue.TILES
    assert 0 < saved < 2 * LAYER.input_bytes / gpu.copy_bandwidth + estimate.LAUNCH
    assert prologue.choose(WIDE, gpu) == (None, 0.0)


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"groups": 32}, {"N": 0}])
def test_what_has_no_kernel_is_composed(change):
    gpu = next(iter(ARCHITECTURES.values()))
    assert prologue.choose(dataclasses.replace(LAYER, **change), gpu) == (None, 0.0)
