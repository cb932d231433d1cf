"""`csrc/cuda_on_host` itself: it computes what a GPU does, and finds the mistakes it says it does.

The kernels are in cuda_kernels.cu.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from support import cuda_on_host, dtype_id

from fused_resnet.testing import relative_error

if not cuda_on_host.is_needed():
    pytest.skip("the kernels run on the GPU, or there is no compiler", allow_module_level=True)

SEEDS = range(8)
THREADS = 64  # of a block of the copying kernels
SOURCE = Path(__file__).with_name("cuda_kernels.cu")

module = cuda_on_host.load()
operators = torch.ops.fused_resnet_on_host


@pytest.fixture(autouse=True)
def same_seed():
    yield
    module.set_seed(0)


def tf32(x):
    """Rounded to 10 explicit bits, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("dtype", "transposed"),
    [
        (torch.float16, False),
        (torch.float16, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float32, False),  # ldmatrix does not transpose 32-bit elements
    ],
    ids=str,
)
def test_fragments(dtype, transposed):
    """mma, ldmatrix and cp.async against a plain product."""
    depth = 8 if dtype == torch.float32 else 16
    a, b, d = torch.randn(16, depth), torch.randn(8, depth), torch.randn(16, 8)
    if dtype == torch.float32:
        expected = d.double() + tf32(a).double() @ tf32(b).double().T
    else:
        a, b = a.to(dtype), b.to(dtype)
        expected = d.double() + a.double() @ b.double().T
    for seed in SEEDS:
        module.set_seed(seed)
        out = d.clone()
        operators.test_multiply(a, b.T.contiguous() if transposed else b, out, transposed)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_fragments_of_special_values(dtype):
    """Subnormal, largest and infinite elements, each multiplied by one."""
    info = torch.finfo(dtype)
    values = [info.smallest_normal / 4, -info.tiny, info.max, float("inf"), -0.0, 1 + info.eps]
    a = torch.zeros(16, 16, dtype=dtype)
    a[: len(values), 3] = torch.tensor(values, dtype=torch.float64).to(dtype)
    b = torch.zeros(8, 16, dtype=dtype)
    b[:, 3] = 1
    out = torch.zeros(16, 8)
    operators.test_multiply(a, b, out, False)
    assert torch.equal(out, a.float()[:, 3:4].expand(16, 8))


def test_sums_of_bytes():
    """Unsigned by signed ones, the largest of both among them, into 32 bits that wrap around."""
    for seed in SEEDS:
        module.set_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        a = torch.randint(0, 256, (16, 32), generator=generator, dtype=torch.uint8)
        b = torch.randint(-128, 128, (8, 32), generator=generator, dtype=torch.int8)
        a[3], b[2], b[5] = 255, -128, 127
        d = torch.randint(-(2**31), 2**31, (16, 8), generator=generator).to(torch.int32)
        d[3, 2], d[3, 5] = -(2**31) + 1, 2**31 - 1
        out = d.clone()
        operators.test_multiply(a, b, out, False)
        expected = d.long() + a.long() @ b.long().T
        assert torch.equal(out, ((expected + 2**31) % 2**32 - 2**31).to(torch.int32))
        assert expected[3, 2] < -(2**31)
        assert expected[3, 5] >= 2**31


def cut_off(x: Fraction, unit: Fraction) -> Fraction:
    """Towards zero, to a multiple of `unit`."""
    return int(x / unit) * unit


def exponent_of(x: float, least: int) -> int:
    return max(math.frexp(x)[1] - 1, least)


def added_by_a_tensor_core(total: float, a: list[float], b: list[float], least: int) -> float:
    """Products of a few elements at once, as compute capability 8.x adds them."""
    terms = [(Fraction(x) * Fraction(y), exponent_of(x, least) + exponent_of(y, least))
             for x, y in zip(a, b, strict=True) if x and y]  # fmt: skip
    if total:
        terms.append((Fraction(total), exponent_of(total, -126)))
    if not terms:
        return 0.0
    unit = Fraction(2) ** (max(exponent for _, exponent in terms) - 24)
    result = sum(cut_off(term, unit) for term, _ in terms)
    if result == 0:
        return 0.0
    exponent = math.frexp(float(result))[1] - 1
    return float(cut_off(result, Fraction(2) ** (exponent - 23)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=dtype_id)
def test_sums_of_tensor_cores(dtype):
    """They cut off what is below the largest term, and round towards zero: bit for bit.

    Terms of alike and of far exponents, of which some cancel; and one by hand.
    """
    depth, together = (8, 4) if dtype == torch.float32 else (16, 8)
    least = -14 if dtype == torch.float16 else -126
    spread = torch.tensor([0, 3, 12] * 6)[:16]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(rows, depth, generator=generator) for rows in (16, 8))
        a *= 2.0 ** -spread[:, None]
        a[:, 1] = -a[:, 0]
        b[:, 1] = b[:, 0] * (1 + 2.0**-7)
        a[::5, 2], b[::3, 3] = 0, 0
        d = torch.randn(16, 8, generator=generator) * 2.0 ** spread[:, None]
        d[::4] = 0
        if dtype == torch.float32:
            a, b = tf32(a), tf32(b)
        a, b = a.to(dtype), b.to(dtype)
        out = d.clone()
        operators.test_multiply(a, b, out, False)
        for m, n in itertools.product(range(16), range(8)):
            total = d[m, n].item()
            for first in range(0, depth, together):
                part = slice(first, first + together)
                total = added_by_a_tensor_core(
                    total, a[m, part].tolist(), b[n, part].tolist(), least
                )
            assert out[m, n].item() == total, (seed, m, n)
    # Of 1 - 2^-24 a bit below a float32 is left, of 1 - 2^-25 none; two of 2^-24 count together,
    # where adding one after the other would leave 1.
    a, b, out = torch.zeros(16, depth), torch.zeros(8, depth), torch.ones(16, 8)
    a[0, 0], a[1, 0], a[2, :2] = -(2.0**-13), -(2.0**-12), 2.0**-12
    b[:, :2] = 2.0**-12
    operators.test_multiply(a.to(dtype), b.to(dtype), out, False)
    assert out[:3, 0].tolist() == [1, 1 - 2**-24, 1 + 2**-23]


def test_collectives():
    """Atomics, shuffles, votes and the barriers that count."""
    x = torch.randint(0, 1000, (2 * THREADS,), dtype=torch.int32)
    lane = torch.arange(2 * THREADS) % 32
    first = torch.arange(2 * THREADS) - lane

    def taken(lanes):
        return x[first + lanes]

    odd = x.view(-1, 32) % 2
    ballots = (odd.long() << torch.arange(32)).sum(1)
    blocks = x.view(2, THREADS)
    expected = torch.stack(
        [
            torch.ones_like(x),
            taken(lane ^ 5),
            taken(torch.where(lane + 3 < 32, lane + 3, lane)),
            taken(torch.where(lane % 16 >= 3, lane - 3, lane)),
            taken(lane // 8 * 8 + 7),
            ballots.to(torch.int32).repeat_interleave(32),
            (x.view(-1, 32) == 3).any(1).int().repeat_interleave(32),
            torch.ones_like(x),
            (blocks == 3).any(1).int().repeat_interleave(THREADS),
            (blocks % 2).sum(1).int().repeat_interleave(THREADS),
            torch.where(lane >= 24, taken(lane ^ 1), -1),
            torch.ones_like(x),
        ],
        dim=1,
    )
    for seed in SEEDS:
        module.set_seed(seed)
        out = torch.zeros(1 + expected.numel(), dtype=torch.int32)
        operators.test_collectives(x, out)
        assert out[0] == x.sum()
        assert torch.equal(out[1:].view_as(expected), expected.int())


@pytest.mark.quick
def test_same_bits_for_every_seed():
    a, b = torch.randn(2, 128, 160).half()
    products = []
    for seed in SEEDS:
        module.set_seed(seed)
        products.append(torch.full((128, 128), torch.nan))
        with cuda_on_host.guarded():
            operators.test_product(a.clone(), b.clone(), products[-1], 0)
    # Cut off once for each eight products: see test_sums_of_tensor_cores.
    assert relative_error(products[0], a.double() @ b.double().T) <= 160 / 8 * 2.0**-24
    assert all(torch.equal(product, products[0]) for product in products)


def test_the_size_of_the_gpu_changes_the_grid_alone():
    """Few multiprocessors make the kernels loop over what a grid does not cover."""
    x, scale, shift = torch.randn(2, 16, 100, 50), torch.randn(16), torch.randn(16)
    outputs, blocks = [], []
    for processors in (1, 132):
        module.set_processors(processors)
        before = module.statistics()["blocks"]
        outputs.append(operators.scale_shift_act(x, scale, shift))
        blocks.append(module.statistics()["blocks"] - before)
    module.set_processors(4)
    assert torch.equal(*outputs)
    assert blocks[0] < blocks[1]


def test_what_ran_is_counted():
    a, b = torch.randn(64, 96).half(), torch.randn(128, 96).half()
    before = module.statistics()
    operators.test_product(a, b, torch.empty(64, 128), 0)
    ran = {name: count - before[name] for name, count in module.statistics().items()}
    blocks, steps, tiles_of_a_step = 2, 3, 4 * 8 * 2
    assert ran == {
        "blocks": blocks,
        "threads": blocks * 128,
        "barriers": blocks * steps,
        "multiplications": blocks * steps * tiles_of_a_step,
    }


@pytest.mark.parametrize(
    ("mistake", "kinds"),
    [(1, "unfinished copy"), (2, "uninitialised read|race"), (3, "race")],
    ids=["no_wait", "no_barrier", "early_copy"],
)
def test_mistakes_in_a_pipeline(mistake, kinds):
    """The first two leave results wrong; the third overwrites what is still being read."""
    a, b = torch.randn(2, 64, 160).half()
    for seed in SEEDS:
        module.set_seed(seed)
        with pytest.raises(RuntimeError, match=f"^cuda_on_host: ({kinds}): "):
            operators.test_product(a, b, torch.empty(64, 64), mistake)


ALL = range(THREADS)
# Kernel, kind of mistake, blocks and threads that may be told of it.
MISTAKES = [
    ("missing_barrier", "race", (0, 1), ALL),
    ("missing_warp_barrier", "race", (0, 1), ALL),
    ("reused_early", "race", (0, 1), ALL),
    ("missing_wait", "unfinished copy", (0, 1), ALL),
    ("wait_for_too_few", "unfinished copy", (0, 1), range(32, THREADS)),
    ("load_past_end", "out of bounds", (1,), (THREADS - 1,)),
    ("load_before_begin", "out of bounds", (0,), (0,)),
    ("store_past_end", "out of bounds", (1,), (THREADS - 1,)),
    ("copy_past_end", "out of bounds", (1,), (THREADS - 1,)),
    ("shared_past_end", "out of bounds", (0, 1), (THREADS - 1,)),
    ("wild_pointer", "out of bounds", (0, 1), (7,)),
    ("barrier_after_exit", "divergent barrier", (0, 1), ALL),
    ("barrier_in_branch", "divergent barrier", (0, 1), ALL),
    ("uninitialised", "uninitialised read", (0, 1), (9,)),
    ("misaligned_load", "misaligned access", (0, 1), (8,)),
    ("misaligned_store", "misaligned access", (0, 1), (12,)),
    ("misaligned_plain_load", "misaligned access", (0, 1), (6,)),
    ("misaligned_copy", "misaligned access", (0, 1), (16,)),
    ("shuffle_by_half_a_warp", "divergent warp", (0, 1), ALL),
    ("mma_by_half_a_warp", "divergent warp", (0, 1), ALL),
    ("shuffle_from_absent_lane", "divergent warp", (0, 1), ALL),
    ("operations_of_a_warp_differ", "divergent warp", (0, 1), ALL),
    ("handover_without_barrier", "race", (0, 1), ALL),
    ("handover_without_fence", "race", (0, 1), ALL),
    ("handover_fenced_late", "race", (0, 1), ALL),
    ("handover_without_second_fence", "race", (0, 1), ALL),
    ("handover_fenced_behind_barrier", "race", (0, 1), range(1, THREADS)),
    ("handover_with_early_ticket", "race", (0, 1), ALL),
    ("handover_without_ticket", "race", (0, 1), ALL),
    ("stored_by_two_blocks", "race", (0, 1), ALL),
    ("cluster_reads_global", "race", (0, 1), ALL),
    ("cluster_missing_barrier", "race", (0, 1), ALL),
    ("cluster_reused_early", "race", (0, 1), ALL),
    ("cluster_early_end", "early end", (0, 1), ALL),
    ("cluster_uninitialised", "uninitialised read", (0, 1), (9,)),
    ("cluster_missing_wait", "unfinished copy", (0, 1), ALL),
    ("cluster_past_end", "out of bounds", (0, 1), (THREADS - 1,)),
    ("cluster_misaligned", "misaligned access", (0, 1), (6,)),
    ("cluster_absent_block", "out of bounds", (0, 1), (3,)),
    ("cluster_barrier_after_exit", "divergent barrier", (0, 1), ALL),
    ("cluster_barrier_in_branch", "divergent barrier", (0, 1), ALL),
    ("cluster_barriers_differ", "divergent barrier", (0, 1), ALL),
    ("cluster_block_ends", "divergent barrier", (0,), ALL),
]
FAULT = re.compile(
    r"cuda_on_host: (?P<kind>[^:]*): .*, block \((?P<block>\d+), 0, 0\), thread (?P<thread>\d+), "
    rf"{SOURCE.name}:(?P<line>\d+)"
)


def test_every_kernel_is_here():
    kernels = set(re.findall(r"^    BOTH\((\w+)\)", SOURCE.read_text(), re.MULTILINE))
    assert kernels == {mistake[0] for mistake in MISTAKES}


def copying_tensors(offset):
    """Input and output of the copying kernels, `offset` elements into their storage."""
    x, out = torch.randn(2 * THREADS + offset), torch.empty(2 * THREADS + offset)
    return x[offset:], out[offset:]


@pytest.mark.parametrize("guard", ["end", "begin"])
@pytest.mark.parametrize("kernel", [mistake[0] for mistake in MISTAKES])
def test_nothing_is_found_where_nothing_is_wrong(kernel, guard):
    for seed in SEEDS:
        module.set_seed(seed)
        with cuda_on_host.guarded(guard):
            x, out = copying_tensors(0)
            operators.test_copy(kernel, x, out, False)
        assert torch.equal(out, x)


@pytest.mark.parametrize(("kernel", "kind", "blocks", "threads"), MISTAKES)
def test_mistakes_are_found(kernel, kind, blocks, threads):
    lines = [
        number
        for number, line in enumerate(SOURCE.read_text().splitlines(), 1)
        if line.endswith((f"// {kernel}", f"// {kernel.partition('_')[0]}"))
    ]
    for seed in SEEDS:
        module.set_seed(seed)
        with cuda_on_host.guarded(), pytest.raises(RuntimeError) as raised:
            operators.test_copy(kernel, *copying_tensors(0), True)
        found = FAULT.match(str(raised.value))
        assert found, raised.value
        assert found["kind"] == kind
        assert int(found["block"]) in blocks
        assert int(found["thread"]) in threads
        assert int(found["line"]) in lines


@pytest.fixture
def at_once():
    """How many blocks run at once, and of how many accesses others run before one."""
    yield module.set_at_once
    module.set_at_once(0, 0)
    module.order_global_accesses(True)


HANDOVERS = [mistake[0] for mistake in MISTAKES if mistake[0].startswith("handover")]
# Stores are seen at once here: a fence that is missing leaves results right in any order.
UNFENCED = {name for name in HANDOVERS if "fence" in name}


@pytest.mark.parametrize("kernel", [*HANDOVERS, "stored_by_two_blocks", "cluster_reads_global"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_unordered_accesses_are_found_however_blocks_run(blocks, kernel, at_once):
    """One after the other and in turns, by what orders them alone."""
    at_once(blocks, 2)
    for seed in range(6):
        module.set_seed(seed)
        x, out = copying_tensors(0)
        operators.test_copy(kernel, x, out, False)
        assert torch.equal(out, x)
        with pytest.raises(RuntimeError, match="cuda_on_host: race: "):
            operators.test_copy(kernel, x, out, True)
        _draw_both_tickets()


def _draw_both_tickets():
    """A kernel that was stopped may have drawn one; the next one's first must be even."""
    with contextlib.suppress(RuntimeError):
        operators.test_copy("handover_without_barrier", *copying_tensors(0), False)


def differs(kernel, seed):
    """Whether a handover that is wrong gives other results, where nobody looks at the order."""
    module.set_seed(seed)
    x, out = copying_tensors(0)
    out.fill_(torch.nan)
    operators.test_copy(kernel, x, out, True)
    return not torch.equal(out, x)


@pytest.mark.parametrize("kernel", HANDOVERS)
def test_blocks_that_take_turns_read_what_is_not_yet_written(kernel, at_once):
    """A ticket drawn before the store, and none at all, give wrong results; right ones never do.

    One block after the other, each of them done before the next begins, a ticket that is drawn too
    early does no harm.
    """
    module.order_global_accesses(False)
    at_once(2, 2)
    wrong = [differs(kernel, seed) for seed in range(30)]
    assert any(wrong) == (kernel not in UNFENCED), (kernel, sum(wrong))
    for seed in range(10):
        module.set_seed(seed)
        x, out = copying_tensors(0)
        operators.test_copy(kernel, x, out, False)
        assert torch.equal(out, x)
    at_once(1, 0)
    if kernel == "handover_with_early_ticket":
        assert not any(differs(kernel, seed) for seed in range(10))


@pytest.mark.parametrize(("blocks", "turn"), [(1, 0), (2, 16), (7, 3)])
def test_any_number_of_blocks_at_once(blocks, turn, at_once):
    """All blocks run, each once, and each knows which it is."""
    at_once(blocks, turn)
    x = torch.randn(10 * THREADS)
    for kernel in ("missing_barrier", "cluster_reused_early"):
        for seed in SEEDS:
            module.set_seed(seed)
            out, before = torch.empty_like(x), module.statistics()["blocks"]
            operators.test_copy(kernel, x, out, False)
            assert torch.equal(out, x)
            assert module.statistics()["blocks"] - before == 10


def test_grids_are_of_whole_clusters():
    x = torch.randn(3 * THREADS)
    with pytest.raises(RuntimeError, match="clusters of 2 blocks in a grid of 3"):
        operators.test_copy("cluster_block_ends", x, torch.empty_like(x), False)


def test_clusters_of_a_grid_are_apart():
    """Several of them, each of which reads its own blocks."""
    x = torch.randn(10 * THREADS)
    for seed in SEEDS:
        module.set_seed(seed)
        out = torch.empty_like(x)
        operators.test_copy("cluster_reused_early", x, out, False)
        assert torch.equal(out, x)


@pytest.mark.parametrize("kernel", ["load_past_end", "store_past_end", "copy_past_end"])
def test_bytes_that_alignment_leaves_over_are_out_of_bounds(kernel):
    with cuda_on_host.guarded(), pytest.raises(RuntimeError, match="offset 520 of 520 bytes"):
        operators.test_copy(kernel, *copying_tensors(2), True)


def test_loads_before_a_buffer_that_begins_at_a_guard_page():
    with cuda_on_host.guarded("begin"), pytest.raises(RuntimeError, match="offset -4 of 512"):
        operators.test_copy("load_before_begin", *copying_tensors(0), True)


def test_a_mistake_leaves_nothing_behind():
    """The next kernel runs, and this process's other crashes are its own."""
    x, out = copying_tensors(0)
    for kernel in ("wild_pointer", "barrier_after_exit"):
        with pytest.raises(RuntimeError):
            operators.test_copy(kernel, x, out, True)
        operators.test_copy(kernel, x, out, False)
        assert torch.equal(out, x)
