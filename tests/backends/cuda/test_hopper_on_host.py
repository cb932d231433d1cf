"""Hopper's instructions as `csrc/cuda/device` names them, and the mistakes found in their use.

The first part runs on a GPU of compute capability 9.0 where there is one, which says whether
`csrc/cuda_on_host` does what the hardware does; without one it runs there. The kernels are in
hopper_kernels.cu.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from support import cuda_on_host, dtype_id

SOURCE = Path(__file__).with_name("hopper_kernels.cu")
ON_HOST = cuda_on_host.is_needed()
if ON_HOST:
    module = cuda_on_host.load()
elif torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
    torch.ops.load_library(cuda_on_host.build_for_gpu(SOURCE))
else:
    pytest.skip("no GPU of compute capability 9.0, and no compiler", allow_module_level=True)

operators = torch.ops.fused_resnet_hopper
DEVICE = "cpu" if ON_HOST else "cuda"
SEEDS = range(6) if ON_HOST else range(1)
on_host = pytest.mark.skipif(not ON_HOST, reason="a mistake on a GPU is undefined")


@pytest.fixture(autouse=True)
def same_seed():
    yield
    if ON_HOST:
        module.set_seed(0)


def run(name, *arguments):
    """An operator on copies of its tensors, for every seed: the copies, each time."""
    for seed in SEEDS:
        if ON_HOST:
            module.set_seed(seed)
        with cuda_on_host.guarded() if ON_HOST else torch.cuda.device(0):
            placed = [a.to(DEVICE, copy=True) if torch.is_tensor(a) else a for a in arguments]
        getattr(operators, name)(*placed)
        yield [a.cpu() if torch.is_tensor(a) else a for a in placed]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("dtype", "n"),
    [
        *itertools.product((torch.float16, torch.bfloat16), (64, 128, 256)),
        *itertools.product((torch.float32,), (64, 128)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else dtype_id(value),
)
def test_products(dtype, n):
    """Exact, of small integers: every element in its place."""
    a, b = torch.randint(-4, 5, (64, 192)), torch.randint(-4, 5, (n, 192))
    for *_, d in run("multiply", a.to(dtype), b.to(dtype), torch.full((64, n), torch.nan)):
        assert torch.equal(d, (a.double() @ b.double().T).float())


def rounded_to_tf32(x):
    """To nearest, ties to even; infinity and NaN as they are."""
    bits = x.view(torch.int32)
    rounded = (bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF
    return torch.where(x.isfinite(), rounded, bits).view(torch.float32)


def cut_off_to_tf32(x):
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def beside_tf32():
    """Numbers of float32 around ties, of all exponents, and such as carry into the exponent."""
    ties = torch.tensor([1 + k * 2.0**-11 for k in range(1, 9)])
    near = torch.cat([torch.nextafter(ties, torch.tensor(to)) for to in (0.0, 2.0)])
    carries = torch.tensor([2 - 2.0**-20, 2 - 2.0**-11, 2.0**100 * (2 - 2.0**-12)])
    x = torch.cat([ties, near, carries])
    return torch.cat([x, -x, torch.randn(64 * 64 - 2 * len(x)).exp2()])


@pytest.mark.parametrize("rounds", [False, True], ids=["cut off", "rounded"])
def test_what_products_of_float32_read(rounds):
    """tf32: rounded where the map says so, by TMA, else cut off, by the product."""
    a, b = beside_tf32().view(64, 64), torch.eye(64)
    as_tf32 = rounded_to_tf32 if rounds else cut_off_to_tf32
    for *_, d, _ in run("multiply", a, b, torch.full((64, 64), torch.nan), rounds):
        assert torch.equal(d, as_tf32(a))
    for *_, d, _ in run("multiply", b, a, torch.full((64, 64), torch.nan), rounds):
        assert torch.equal(d, as_tf32(a).T)


@pytest.mark.parametrize("is_im2col", [False, True], ids=["tiles", "im2col"])
def test_loads_that_round(is_im2col):
    x = beside_tf32()[: 16 * 32].clone()
    x[-6:] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 2.0**-130])
    x.view(torch.int32)[-7] = 0x7FFFFFFF  # a NaN that would become a zero
    x = x.view(1, 1, 16, 32) if is_im2col else x.view(16, 32)
    at = [0] * x.dim()
    corners, offset = ([0, 0, 0, 0, 1, 1], [0, 0]) if is_im2col else ([], [])
    expected = swizzled(rounded_to_tf32(x).reshape(-1).view(torch.uint8))
    out = torch.zeros_like(expected)
    for _, found, *_ in run("load", x, out, [32, 16], at, offset, corners, True, True):
        assert torch.equal(found, expected)


def swizzled(rows):
    """Rows of 128 bytes as they lie in shared memory."""
    chunks = rows.view(-1, 8, 16)
    places = torch.arange(8) ^ (torch.arange(len(chunks)) % 8)[:, None]
    return torch.gather(chunks, 1, places[..., None].expand_as(chunks)).reshape(-1)


def boxes():
    """Sizes, box and begin, outermost first: inside, across every border, and outside."""
    for swizzles in (False, True):
        inner = 64 if swizzles else 24
        yield (7, 80), (5, inner), (1, 8), swizzles
        yield (7, 80), (8, inner), (-3, -8), swizzles
        yield (7, 80), (4, inner), (5, 40), swizzles
        yield (4, 5, 72), (3, 2, inner), (2, 4, 16), swizzles
        yield (3, 4, 5, 64), (2, 3, 4, inner), (-1, 2, 3, 8), swizzles
        yield (3, 4, 5, 64), (2, 3, 4, inner), (3, 0, 0, 0), swizzles


def box_of(x, box, at):
    """What a load puts in place of what lies outside is zero."""
    sides = list(zip(x.shape, box, at, strict=True))
    wide = torch.zeros([size + 2 * side for size, side, _ in sides], dtype=x.dtype)
    wide[tuple(slice(side, side + size) for size, side, _ in sides)] = x
    return wide[tuple(slice(begin + side, begin + 2 * side) for _, side, begin in sides)]


@pytest.mark.parametrize("case", list(boxes()), ids=str)
def test_loads_of_tiles(case):
    sizes, box, at, swizzles = case
    x = torch.randn(sizes).half()
    expected = box_of(x, box, at).reshape(-1).view(torch.uint8)
    if swizzles:
        expected = swizzled(expected)
    out = torch.zeros_like(expected)
    for _, found, *_ in run("load", x, out, box[::-1], at[::-1], [], [], swizzles):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", list(boxes()), ids=str)
def test_stores_of_tiles(case):
    sizes, box, at, swizzles = case
    values = torch.randn(box).half()
    expected = torch.zeros(sizes).half()
    for index in itertools.product(*map(range, box)):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < size for p, size in zip(place, sizes, strict=True)):
            expected[place] = values[index]
    given = values.reshape(-1).view(torch.uint8)
    given = swizzled(given) if swizzles else given
    for _, found, *_ in run(
        "store", given, torch.zeros(sizes).half(), box[::-1], at[::-1], swizzles
    ):
        assert torch.equal(found, expected)


# Image (N, H, W), taps, stride, padding, dilation: (w, h) each; windows at a time.
WINDOWS = [
    ((3, 5, 6), (3, 3), (1, 1), (1, 1), (1, 1), 64),
    ((2, 7, 9), (3, 2), (2, 3), (1, 0), (2, 1), 16),
    ((2, 4, 4), (1, 1), (2, 2), (0, 0), (1, 1), 8),
    ((1, 3, 3), (5, 5), (1, 1), (4, 3), (1, 1), 48),
]


@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_loads_of_windows(case):
    """Tap by tap what `unfold` finds, zeros around the images and behind the last one."""
    (N, H, W), taps, stride, padding, dilation, pixels = case
    C = 64
    x = torch.randn(N, H, W, C).half()
    flipped = {"dilation": dilation[::-1], "padding": padding[::-1], "stride": stride[::-1]}
    nchw = x.permute(0, 3, 1, 2).float()
    windows = torch.nn.functional.unfold(nchw, taps[::-1], **flipped)
    windows = windows.view(N, C, taps[1], taps[0], -1).permute(0, 4, 2, 3, 1).half()
    count = windows.shape[1]
    windows = windows.reshape(N * count, taps[1], taps[0], C)
    windows = torch.cat([windows, torch.zeros(pixels, *windows.shape[1:]).half()])
    upper = [p - d * (t - 1) for p, d, t in zip(padding, dilation, taps, strict=True)]
    corners = [-padding[0], -padding[1], *upper, *stride]
    Q = (W + 2 * padding[0] - dilation[0] * (taps[0] - 1) - 1) // stride[0] + 1
    for first in (0, count // 2 + 1, N * count - 3):
        n, pixel = divmod(first, count)
        p, q = divmod(pixel, Q)
        at = [0, q * stride[0] - padding[0], p * stride[1] - padding[1], n]
        for s, r in {(0, 0), (taps[0] - 1, taps[1] - 1), (taps[0] // 2, 0)}:
            expected = windows[first : first + pixels, r, s].reshape(-1).view(torch.uint8)
            expected = swizzled(expected)
            offset = [s * dilation[0], r * dilation[1]]
            out = torch.zeros_like(expected)
            arguments = (x, out, [C, pixels], at, offset, corners, True)
            for _, found, *_ in itertools.islice(run("load", *arguments), 2):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("is_im2col", [False, True], ids=["tiles", "im2col"])
def test_loads_for_two_blocks(is_im2col):
    x = torch.randn(32, 64).half()
    expected = swizzled(x.reshape(-1).view(torch.uint8)).expand(2, -1)
    given = x.view(1, 1, 32, 64) if is_im2col else x
    for _, found in run("load_for_both", given, torch.zeros(2, 32 * 128, dtype=torch.uint8)):
        assert torch.equal(found, expected)


def test_matrices():
    x = torch.randn(4, 8, 8).half()
    for _, found in run("move_matrices", x, torch.zeros_like(x)):
        assert torch.equal(found, x[[3, 1, 2, 0]])


BAD_MAPS = [
    ((4, 72), (65, 4), "bad tensor map: a box's rows are no multiple of 16 bytes"),
    ((4, 72), (32, 4), "bad tensor map: swizzled rows are not of 128 bytes"),
    ((4, 72), (64, 300), "bad tensor map: a box's side is not 1 to 256"),
    ((4, 70), (64, 4), "bad tensor map: a stride is no multiple of 16 bytes"),
]


@on_host
@pytest.mark.parametrize(("sizes", "box", "said"), BAD_MAPS)
def test_maps_that_the_driver_refuses(sizes, box, said):
    out = torch.zeros(64 * 4 * 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=said):
        operators.load(torch.zeros(sizes).half(), out, box, [0, 0], [], [], True)


@on_host
def test_no_store_rounds():
    values, out = torch.zeros(4 * 128, dtype=torch.uint8), torch.zeros(4, 32)
    with pytest.raises(RuntimeError, match="bad tensor map: a store through one that rounds"):
        operators.store(values, out, [32, 4], [0, 0], True, True)


MOST_MAPS = 2048  # csrc/cuda/hopper/map_cache.h


@on_host
def test_maps_are_kept_until_there_are_too_many():
    rows = torch.zeros(8, 64).half()
    first = list(range(1, MOST_MAPS + 1))
    asked = [*first, *first, MOST_MAPS + 1, 1, MOST_MAPS + 1, 2]
    *encoded, total, wrong = operators.recall(rows, asked, 1)
    assert encoded[: 2 * MOST_MAPS] == first + [MOST_MAPS] * MOST_MAPS
    # One too many, and all others were forgotten.
    assert [count - MOST_MAPS for count in encoded[2 * MOST_MAPS :]] == [1, 2, 2, 3]
    assert (total, wrong) == (MOST_MAPS + 3, 0)


@on_host
def test_threads_share_maps():
    """Each is encoded by whoever is first, and whole for all others."""
    rows = torch.zeros(8, 64).half()
    for _ in range(100):
        *_, total, wrong = operators.recall(rows, list(range(1, MOST_MAPS + 1)), 4)
        assert (total, wrong) == (MOST_MAPS, 0)


@on_host
def test_windows_begin_in_their_box():
    x, out = torch.zeros(1, 4, 4, 64).half(), torch.zeros(8 * 128, dtype=torch.uint8)
    corners = [-1, -1, -1, -1, 1, 1]
    for at, offset in (([0, 3, 0, 0], [0, 0]), ([0, 0, -2, 0], [0, 0]), ([0, 0, 0, 0], [256, 0])):
        with pytest.raises(RuntimeError, match="out of bounds: "):
            operators.load(x, out, [64, 8], at, offset, corners, True)


# What is said of each mistake of the pipeline, whatever the order of threads.
MISTAKES = {
    "kNoWaitForLoad": "unfinished copy|uninitialised read",
    "kWrongParity": "unfinished copy|uninitialised read|deadlock",
    "kNoWaitForEmpty": "unfinished copy|unfinished product|bad mbarrier",
    "kEarlyRelease": "unfinished product",
    "kFewBytes": "unfinished copy",
    "kManyBytes": "deadlock",
    "kMissingArrival": "deadlock",
    "kManyArrivals": "bad mbarrier|unfinished product|unfinished copy|deadlock",
    "kNoWaitForProducts": "unfinished product",
    "kNoFenceOfSums": "unfenced",
    "kNoFenceForCopies": "unfenced",
    "kNoBarrierBeforeStore": "unfenced|uninitialised read",
    "kNoWaitForStore": "unfinished copy",
    "kNotPublished": "unpublished mbarrier",
    "kNotInitialised": "bad mbarrier",
    "kMisalignedLoad": "misaligned access",
    "kLoadBeyondEnd": "out of bounds",
    "kLoadOverMbarrier": "bad mbarrier",
    "kStoreOverMbarrier": "bad mbarrier",
    "kRowsBeginWithinEight": "bad descriptor",
    "kRowsBeyondEnd": "out of bounds",
    "kRowsNotLoaded": "uninitialised read",
    "kWarpsDiffer": "divergent warpgroup",
    "kLanesDiffer": "divergent warpgroup",
    "kHalfAWarp": "divergent warp",
    "kFewWarps": "divergent warpgroup",
    "kManyRegisters": "deadlock",
    "kLessIsMore": "register budget",
    "kOneWarpsRegisters": "deadlock|register budget",
    "kWrongRank": "bad tensor map",
    "kNoMap": "bad tensor map",
    "kMissingThread": "deadlock",
    "kOtherCount": "divergent barrier",
}
CLUSTER_MISTAKES = {
    "kEarlyEnd": "early end|deadlock",
    "kNoBarrier": "bad mbarrier|unpublished mbarrier|race",
    "kAbsentBlock": "out of bounds",
    "kAbsentArrival": "out of bounds",
    "kNotPublished": "unpublished mbarrier",
    "kAlone": "deadlock",
}
LINE = rf"block \(\d+, 0, 0\), thread \d+, {SOURCE.name}:\d+"


def test_every_mistake_is_here():
    named = re.findall(r"BOTH\((k\w+)\)", SOURCE.read_text())
    assert sorted(named) == sorted([*MISTAKES, *CLUSTER_MISTAKES])


@on_host
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_pipeline(mistake):
    a, b = (torch.randint(-3, 4, (64, 256)).half() for _ in range(2))
    expected = (a.double() @ b.double().T).half()
    for seed in SEEDS:
        module.set_seed(seed)
        with cuda_on_host.guarded():
            a, b, c = a.clone(), b.clone(), torch.zeros(64, 64).half()
        operators.pipeline(mistake, a, b, c, False)
        assert torch.equal(c, expected)
        with pytest.raises(RuntimeError) as raised:
            operators.pipeline(mistake, a, b, c, True)
        said = str(raised.value).splitlines()[0]
        assert re.match(f"cuda_on_host: ({MISTAKES[mistake]}): .*{LINE}", said), said


@on_host
@pytest.mark.parametrize("mistake", CLUSTER_MISTAKES)
def test_mistakes_in_a_cluster(mistake):
    x = torch.randn(16, 64).half()
    expected = swizzled(x.reshape(-1).view(torch.uint8)).expand(2, -1)
    for seed in SEEDS:
        module.set_seed(seed)
        with cuda_on_host.guarded():
            x, out = x.clone(), torch.zeros(2, 16 * 128, dtype=torch.uint8)
        operators.exchange(mistake, x, out, False)
        assert torch.equal(out, expected)
        with pytest.raises(RuntimeError) as raised:
            operators.exchange(mistake, x, out, True)
        said = str(raised.value).splitlines()[0]
        assert re.match(f"cuda_on_host: ({CLUSTER_MISTAKES[mistake]}): .*{LINE}", said), said


@on_host
def test_a_deadlock_names_all_who_wait():
    a = torch.zeros(64, 256).half()
    with pytest.raises(RuntimeError) as raised:
        operators.pipeline("kManyBytes", a, a, torch.zeros(64, 64).half(), True)
    said = str(raised.value).splitlines()[0]
    waits = r"wait for phase \d of the mbarrier at offset \d+, where"
    assert re.search(rf"thread 0 {waits} 4 arrivals and 0 bytes are missing", said)
    assert re.search(rf"threads 128 to 255 {waits} 0 arrivals and 8192 bytes are missing", said)
