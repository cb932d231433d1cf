"""Times every distinct layer of a network, each candidate side by side.

A layer is a convolution with the batch norm, shortcut add, ReLU and pool that follow it. What one
kernel can run of a Bottleneck, from its 3x3 convolution to the next one's first 1x1, is timed too:
as that, and layer by layer. In training a layer is a batch norm with its add and ReLU, forward and
backward (`norms.py`). Tensors and batch-norm statistics are random, channels_last. Every
candidate's output is checked against float64 first; one that is wrong, or fails, is a row that says
so and is not timed. The others take turns, round by round. Nothing finds its inputs in the cache
because it has just used them: on a GPU the L2 cache is overwritten before each call
(`race.EventTimer`, CUDA events), on a CPU the calls rotate among as many sets of tensors as make
`ceilings.COLD_BYTES`.

What is reported as GB/s and TFLOP/s counts what the layer has to do: each tensor moved once, the
convolution's products. A candidate that moves more gets no credit for it. The roofline share is the
time at the ceilings measured in the same run, divided by the candidate's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..testing import FACTOR
from ..tuning import architecture
from ..tuning.problem import ChainProblem, ConvProblem, Problem
from . import ceilings, documents, environment, networks, norms, telemetry
from .candidates import Call, Prepare
from .case import FACTOR_OF_OTHERS
from .clock import Latency, threads
from .errors import first_line
from .tune import cases, race

TIMED, WRONG, FAILED = "timed", "wrong", "failed"
_MOST_SETS = 32
_FLUSHED_CACHES = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """A candidate on a layer.

    Attributes:
        name: the candidate's.
        status: "timed", "wrong" or "failed".
        reason: why it was not timed; None if it was.
        error: relative to float64; None if it failed.
        keeps_nan: whether NaN comes out where float64 has it; None if that was not seen.
        latency: in milliseconds; None unless timed.
    """

    name: str
    status: str
    reason: str | None = None
    error: float | None = None
    keeps_nan: bool | None = None
    latency: Latency | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's rows, or a Bottleneck's, and how often the network has it."""

    problem: Problem
    count: int
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is benchmarked: a network's layers at a batch size and dtype."""

    model: str
    batch: int
    dtype: str
    device: str
    mode: str = "inference"

    def problems(self, selected: str = "") -> Counter[ConvProblem]:
        """The layers whose text has `selected` in it, and how often each runs."""
        found = networks.of_model(self.model, self.batch, self.dtype)
        return Counter({p: count for p, count in found.items() if selected in str(p)})

    def norms(self, selected: str = "") -> Counter[norms.NormProblem]:
        """The norms, with what follows them, that training has, likewise."""
        found = norms.of_model(self.model, self.batch, self.dtype)
        return Counter({p: count for p, count in found.items() if selected in str(p)})

    def blocks(self, selected: str = "") -> Counter[ChainProblem]:
        """The Bottlenecks that one kernel can run, likewise; there are none in float32."""
        found = Counter(networks.chains_of_model(self.model, self.batch, self.dtype))
        return Counter({p: count for p, count in found.items() if p and selected in str(p)})


@dataclasses.dataclass
class Result:
    """A case's layers and Bottlenecks as far as they were measured."""

    case: Case
    threads: int
    rounds: int
    ceilings: ceilings.Ceilings
    layers: list[Layer]
    blocks: list[Layer]
    interrupted: bool
    telemetry: dict[str, dict[str, float | None]]


def measure(
    case: Case,
    problems: Mapping[Problem, int],
    candidates: Mapping[str, Prepare],
    block_candidates: Mapping[str, Prepare] | None = None,
    *,
    rounds: int,
    thread_count: int | None = None,
    scale: float = 1.0,
    progress: Callable[[Problem | None, float], None] = lambda problem, done: None,
) -> Result:
    """Measures the ceilings, layer after layer, and the ceilings again, of which the better count.

    Ctrl-C keeps the layers that are done.

    Args:
        case: what the problems are of.
        problems: see `Case.problems` and `Case.blocks`.
        candidates: on layers; see `candidates.for_device`.
        block_candidates: on Bottlenecks; see `candidates.for_blocks`.
        rounds: how often each candidate is timed.
        thread_count: torch's CPU threads; its own choice by default.
        scale: see `ceilings.measure`.
        progress: told the layer at hand, None for the ceilings, and how many layers are done.

    Raises:
        KeyboardInterrupt: before the ceilings were known.
    """
    device = torch.device(case.device)
    if device.type == "cuda":
        cache = architecture.of_device(device).l2_bytes
        timer: race.Timer = race.EventTimer(device, _FLUSHED_CACHES * cache)
    else:
        timer = race.host_timer
    with threads(thread_count):
        progress(None, 0)
        before = telemetry.snapshot(device)
        limits = ceilings.measure(device, case.dtype, scale=scale)
        states = {"before": before, "after": before}
        result = Result(case, torch.get_num_threads(), rounds, limits, [], [], False, states)
        try:
            for done, (problem, count) in enumerate(problems.items()):
                progress(problem, done)
                is_block = isinstance(problem, ChainProblem)
                ways = (block_candidates or {}) if is_block else candidates
                rows = _rows(problem, ways, device, timer, rounds)
                measured = result.blocks if is_block else result.layers
                measured.append(Layer(problem, count, tuple(rows)))
            progress(None, len(problems))
            # Whoever else used the device while the first were measured may be gone by now.
            again = ceilings.measure(device, case.dtype, scale=scale)
            result.ceilings = limits.better_of(again)
        except KeyboardInterrupt:
            result.interrupted = True
        states["after"] = telemetry.snapshot(device)
    return result


@dataclasses.dataclass(frozen=True)
class Total:
    """All of a network's layers: their time, and the share of it that the ceilings would take.

    `unit` is the share that the matrix unit would take for the products alone; None where there is
    no such unit.
    """

    milliseconds: float
    roofline: float
    unit: float | None = None


def totals(case: Mapping[str, Any]) -> dict[str, Total | None]:
    """Sums over a case of a document, layers counted as often as the network has them.

    None for a candidate that was not timed on every layer.
    """
    times: dict[str, list[float | None]] = {}
    least, unit = 0.0, 0.0
    for layer in case["layers"]:
        least += layer["count"] * layer["least_microseconds"]
        unit += layer["count"] * (layer.get("unit_microseconds") or 0)
        for one in layer["candidates"]:
            taken = one["microseconds"]
            share = None if taken is None else layer["count"] * taken["median"]
            times.setdefault(one["name"], []).append(share)
    found: dict[str, Total | None] = {}
    for name, all_of in times.items():
        taken = sum(one for one in all_of if one is not None)
        if None in all_of:
            found[name] = None
        else:
            found[name] = Total(1e-3 * taken, least / taken, unit / taken if unit else None)
    return found


def flop_unit(case: Mapping[str, Any]) -> tuple[str, float]:
    """The unit to show a case's rates in, and how many make one TFLOP/s."""
    below = case["ceilings"]["teraflops_per_second"] < 1
    return ("GFLOP/s", 1e3) if below else ("TFLOP/s", 1.0)


def unit_rate(case: Mapping[str, Any]) -> float | None:
    """TFLOP/s of a case's dtype on the processor's matrix unit.

    None where there is no such unit, it does not run that dtype, or the layers have no products.
    """
    unit = case["ceilings"].get("matrix_unit")
    if unit is None or unit["products"] is None or case.get("mode") == "training":
        return None
    return float(unit["teraops_per_second"]["bfloat16"]) / int(unit["products"])


def unit_text(case: Mapping[str, Any]) -> str | None:
    """The matrix unit's rates, to read; None where a case has no `unit_rate`."""
    if unit_rate(case) is None:
        return None
    unit = case["ceilings"]["matrix_unit"]
    rates = " and ".join(
        f"{rate:.3g} T{'OP' if dtype == 'int8' else 'FLOP'}/s of {dtype}"
        for dtype, rate in unit["teraops_per_second"].items()
    )
    products = unit["products"]
    how = f", {products} products for one of {case['dtype']}" if (products or 1) > 1 else ""
    return f"{unit['name']} tiles from the first-level cache: {rates}{how}"


def _rows(
    problem: Problem,
    candidates: Mapping[str, Prepare],
    device: torch.device,
    timer: race.Timer,
    rounds: int,
) -> list[Row]:
    """Checks the candidates for a layer and times those that are right."""
    # Outside of inference mode: tensors made in it have no version, by which the CPU backend knows
    # that a model's weights are those it has prepared already.
    with cases.precision(problem.dtype), torch.no_grad():
        try:
            case = _make_case(problem, device)
            sets = _argument_sets(case, device)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
            reason = f"the layer's tensors cannot be made: {first_line(error)}"
            return [Row(name, FAILED, reason) for name in candidates]
    trains = isinstance(problem, norms.NormProblem)
    mode = torch.enable_grad() if trains else torch.inference_mode()
    with cases.precision(problem.dtype), mode:
        rows = {name: _checked(name, prepare, case) for name, prepare in candidates.items()}
        calls: dict[str, Call] = {}
        for name, row in rows.items():
            if row.status != TIMED:
                continue
            try:
                calls[name] = _rotating([candidates[name](one, problem) for one in sets])
            except Exception as error:
                rows[name] = Row(name, FAILED, _text(error), row.error)
        try:
            times = timer(calls, rounds) if calls else {}
        except Exception as error:
            for name in calls:
                rows[name] = Row(name, FAILED, _text(error), rows[name].error)
            return list(rows.values())
    for name, seconds in times.items():
        latency = Latency(tuple(1e3 * one for one in seconds))
        rows[name] = dataclasses.replace(rows[name], latency=latency)
    return list(rows.values())


def _make_case(problem: Problem | norms.NormProblem, device: torch.device) -> Any:
    if isinstance(problem, norms.NormProblem):
        return norms.make_case(problem, device)
    return cases.case_of(problem, device)


def _checked(
    name: str, prepare: Prepare, case: cases.Case | cases.ChainCase | norms.NormCase
) -> Row:
    """A candidate's row before it is timed.

    Eager is the measure of error, so only what is not finite makes it wrong.
    """

    def run(arguments: tuple[Any, ...], problem: Any) -> Any:
        return prepare(arguments, problem)()

    try:
        out = run(case.arguments, case.problem)
        if isinstance(case, norms.NormCase):
            return _checked_norm(name, out, case)
        if isinstance(case, cases.ChainCase):
            return _checked_block(name, run, out, case)
        if out.shape != case.expected.shape:
            reason = f"shape {tuple(out.shape)}, must be {tuple(case.expected.shape)}"
            return Row(name, WRONG, reason)
        error = cases.relative_error(out, case.expected)
        limit = case.allowed_error
        if not name.startswith("fused"):
            limit *= FACTOR_OF_OTHERS / FACTOR
        if not (math.isfinite(error) if name == "eager" else error <= limit):
            return Row(name, WRONG, f"error {error:.1e}, at most {limit:.1e}", _finite(error))
        nan = cases.nan_error(run, case)
    except Exception as failure:
        return Row(name, FAILED, _text(failure))
    if nan is not None and name.startswith("fused"):
        return Row(name, WRONG, nan, error, False)
    return Row(name, TIMED, None, error, nan is None)


def _checked_block(
    name: str, run: cases.Run, outputs: tuple[torch.Tensor, ...], case: cases.ChainCase
) -> Row:
    """`_checked` of a Bottleneck, whose error is the larger of its outputs'."""
    if (reason := cases.chain_error(outputs, case)) and name != "eager":
        return Row(name, WRONG, reason)
    errors = map(cases.relative_error, outputs, case.expected)
    error = max(errors, key=lambda one: one if math.isfinite(one) else math.inf)
    if not math.isfinite(error):
        return Row(name, WRONG, "not finite")
    nan = cases.chain_nan_error(run, case)
    if nan is not None and name.startswith("fused"):
        return Row(name, WRONG, nan, error, False)
    return Row(name, TIMED, None, error, nan is None)


def _checked_norm(name: str, results: tuple[torch.Tensor, ...], case: norms.NormCase) -> Row:
    """`_checked` of a norm in training."""
    own = name.startswith("fused")
    error, reason = case.error(results, 1.0 if own else FACTOR_OF_OTHERS / FACTOR)
    if name == "eager":
        reason = None if math.isfinite(error) else "not finite"
    return Row(name, WRONG if reason else TIMED, reason, _finite(error))


def _argument_sets(
    case: cases.Case | cases.ChainCase | norms.NormCase, device: torch.device
) -> list[tuple[Any, ...]]:
    """The layer's tensors, on a CPU as often as it takes to be out of a core's cache."""
    if device.type == "cuda":
        return [case.arguments]
    wanted = math.ceil(ceilings.COLD_BYTES / max(1, case.problem.bytes_once))

    def copied() -> tuple[Any, ...]:
        if isinstance(case, norms.NormCase):
            return norms.copied(case.arguments)
        return pytree.tree_map_only(torch.Tensor, torch.clone, case.arguments)

    copies = [copied() for _ in range(min(_MOST_SETS, wanted) - 1)]
    return [case.arguments, *copies]


def _rotating(calls: Sequence[Call]) -> Call:
    """Each call in turn; all have run once before, since a first call may prepare something."""
    for call in calls:
        call()
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def document(
    results: Sequence[Result], command: str, root: Any = environment.ROOT
) -> dict[str, Any]:
    """The results as JSON, schema "fused_resnet.kernels/1".

    Top level: what `environment.provenance` gives, and `cases`.

    A case: `model`, `batch`, `dtype` (see `ConvProblem`), `device`, `mode` ("inference", also in
    older files, which lack it, or "training", whose layers are norms), `threads`, `rounds`,
    `interrupted`, `ceilings` (`copy_gigabytes_per_second`, `teraflops_per_second`, `copy_bytes`,
    `matrix_size`: measured in this run; `matrix_unit`: the CPU's unit that multiplies tiles, null
    where there is none, absent in older files: its `name`, `teraops_per_second` by the operands'
    dtype, from the first-level cache, and `products`, how many of bfloat16 stand for one of the
    case's dtype, null where it does not run on the unit), `telemetry` (`before` and `after`, see
    `telemetry.snapshot`), `layers`, `blocks` (what one kernel can run of a Bottleneck, as a layer;
    absent in older files).

    A layer: `problem` (`ConvProblem.key`, `NormProblem.key`), `label` (to read), `count` (how often
    the network has it), `bytes` (each tensor once), `flops`, `least_microseconds` (at the
    ceilings), `unit_microseconds` (its products on the matrix unit; null where the case has no rate
    of one, absent in older files), `candidates`.

    A candidate: `name`, `status` ("timed", "wrong" or "failed"), `reason` (null if timed), `error`
    (relative to float64; null if it failed or is not finite), `keeps_nan` (null if not seen), and,
    null unless timed, `microseconds` (`median`, `p10`, `p90`, `samples`), `gigabytes_per_second`,
    `teraflops_per_second`, `roofline` (`least_microseconds` over the median; more than 1 where a
    cache beats the copy or an algorithm saves products), `unit_share` (`unit_microseconds` over the
    median; null where there are none, absent in older files), `ratio_to_eager`.
    """
    device = torch.device(results[0].case.device)
    return {
        **environment.provenance(documents.KERNELS, command, device, root),
        "cases": [_case_document(result) for result in results],
    }


def _case_document(result: Result) -> dict[str, Any]:
    limits = result.ceilings
    return {
        **dataclasses.asdict(result.case),
        "threads": result.threads,
        "rounds": result.rounds,
        "interrupted": result.interrupted,
        "ceilings": {
            "copy_gigabytes_per_second": limits.copy_bandwidth / 1e9,
            "teraflops_per_second": limits.matrix_rate / 1e12,
            "copy_bytes": limits.copy_bytes,
            "matrix_size": limits.matrix_size,
            "matrix_unit": _unit_document(limits.unit),
        },
        "telemetry": result.telemetry,
        "layers": [_layer_document(layer, limits) for layer in result.layers],
        "blocks": [_layer_document(block, limits) for block in result.blocks],
    }


def _unit_document(unit: ceilings.MatrixUnit | None) -> dict[str, Any] | None:
    if unit is None:
        return None
    rates = {dtype: rate / 1e12 for dtype, rate in unit.rates.items()}
    return {"name": unit.name, "teraops_per_second": rates, "products": unit.products}


def _layer_document(layer: Layer, limits: ceilings.Ceilings) -> dict[str, Any]:
    problem, least = layer.problem, limits.least_seconds(layer.problem)
    unit = limits.unit_seconds(problem)
    eager = next((r.latency.median for r in layer.rows if r.name == "eager" and r.latency), None)
    return {
        "problem": problem.key,
        "label": str(problem),
        "count": layer.count,
        "bytes": problem.bytes_once,
        "flops": problem.flops,
        "least_microseconds": 1e6 * least,
        "unit_microseconds": None if unit is None else 1e6 * unit,
        "candidates": [_candidate_document(row, problem, least, unit, eager) for row in layer.rows],
    }


def _candidate_document(
    row: Row, problem: Problem, least: float, unit: float | None, eager: float | None
) -> dict[str, Any]:
    timed = ("microseconds", "gigabytes_per_second", "teraflops_per_second", "roofline")
    fields: dict[str, Any] = {
        "name": row.name,
        "status": row.status,
        "reason": row.reason,
        "error": row.error,
        "keeps_nan": row.keeps_nan,
        **dict.fromkeys((*timed, "unit_share", "ratio_to_eager")),
    }
    if row.latency is None:
        return fields
    seconds = 1e-3 * row.latency.median
    return fields | {
        "microseconds": {
            "median": 1e3 * row.latency.median,
            "p10": 1e3 * row.latency.quantile(0.1),
            "p90": 1e3 * row.latency.quantile(0.9),
            "samples": [1e3 * sample for sample in row.latency.samples],
        },
        "gigabytes_per_second": problem.bytes_once / seconds / 1e9,
        "teraflops_per_second": problem.flops / seconds / 1e12,
        "roofline": least / seconds,
        "unit_share": None if unit is None else unit / seconds,
        "ratio_to_eager": row.latency.median / eager if eager else None,
    }
