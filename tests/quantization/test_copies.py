"""What native code sees of writes that torch does not: `quantized_copies_match`."""

import math

import pytest
import torch

from fused_resnet.layers.quantized import quantized_weight

match = torch.ops.fused_resnet.quantized_copies_match.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_weight_is_what_was_made_of_it(dtype, memory_format):
    torch.manual_seed(0)
    for shape in ((1, 1, 1, 1), (24, 20, 3, 3), (64, 256, 1, 1), (16, 4, 5, 7)):
        weight = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
        quantized, step = quantized_weight(weight)
        assert all(match([weight], [quantized], [step], [], []) for _ in range(200))
        other = weight * 1.1
        assert not match([weight, other], [quantized] * 2, [step] * 2, [], [])


def test_halves_are_rounded_to_even():
    weight = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -126.5, -127.0]).view(1, 7, 1, 1)
    quantized, step = quantized_weight(weight)
    assert quantized.flatten().tolist() == [127, 0, 2, 2, 0, -126, -127]
    assert all(match([weight], [quantized], [step], [], []) for _ in range(50))


def test_one_value_in_a_hundred_is_seen_within_twenty_calls():
    torch.manual_seed(0)
    weight = torch.randn(64, 64, 3, 3)
    quantized, step = quantized_weight(weight)
    for seed in range(50):
        torch.manual_seed(seed)
        changed = weight.clone()
        places = torch.randperm(weight.numel())[: weight.numel() // 100]
        changed.view(-1)[places] += 10
        assert not all(match([changed], [quantized], [step], [], []) for _ in range(20))


def test_every_value_of_a_vector_is_compared():
    vector = torch.randn(200)
    for index in range(200):
        changed = vector.clone()
        changed[index] = math.nan
        assert not match([], [], [], [changed], [vector])
        assert match([], [], [], [changed], [changed.clone()])
    twice = torch.stack([vector, vector], 1)[:, 0]
    assert match([], [], [], [twice], [vector])
    assert not match([], [], [], [-0.0 * torch.ones(3)], [torch.zeros(3)])


def test_nan_matches_nothing():
    weight = torch.full((1, 1, 1, 1), math.nan)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int8)
    assert not match([weight], [zero], [torch.ones(1, dtype=torch.float64)], [], [])


def test_bad_calls():
    weight = torch.randn(4, 4, 1, 1)
    quantized, step = quantized_weight(weight)
    errors = (RuntimeError, ValueError)
    with pytest.raises(errors, match="1 weights, 0 eight-bit ones"):
        match([weight], [], [], [], [])
    with pytest.raises(errors, match="must be int8"):
        match([weight], [weight], [step], [], [])
    with pytest.raises(errors, match="must be int8"):
        match([weight], [quantized[:2]], [step], [], [])
    with pytest.raises(errors, match="steps must be float64"):
        match([weight], [quantized], [step.float()], [], [])
    with pytest.raises(errors, match="must be float16, bfloat16 or float32"):
        match([weight.double()], [quantized], [step], [], [])
    with pytest.raises(errors, match="shape and dtype"):
        match([], [], [], [torch.zeros(3)], [torch.zeros(4)])
    torch.library.opcheck(
        match, ([weight], [quantized], [step], [], []), test_utils=["test_schema"]
    )
