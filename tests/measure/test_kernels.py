"""`bench kernels`: layers, blocks and norms side by side, checked before they are timed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Run
from support.results import CPU, LAYER, measured
from support.results_schema import check_kernels_document

from fused_resnet import backends
from fused_resnet.measure import (
    candidates,
    ceilings,
    kernels,
    norms,
)

# Its convolutions of bfloat16 want AVX-512.
ONEDNN_HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_amx = pytest.mark.skipif(
    torch.ops.fused_resnet.conv_tile_isa() != "amx", reason="this processor has no AMX"
)


@pytest.mark.usefixtures("small")
def test_layers_are_timed_side_by_side() -> None:
    content = measured(candidates.for_device(CPU, without=["torch.compile"]))
    check_kernels_document(content)
    json.dumps(content, allow_nan=False)
    ((layer,),) = (case["layers"] for case in content["cases"])
    assert (layer["label"], layer["count"]) == (LAYER, 2)
    assert layer["flops"] == 2 * 2048 * 512 * 49
    assert [one["name"] for one in layer["candidates"]] == ["eager", "oneDNN, fused", "fused, cpu"]
    assert all(one["status"] == "timed" for one in layer["candidates"])
    assert all(0 < one["error"] < 2e-6 for one in layer["candidates"])
    assert layer["candidates"][2]["keeps_nan"]
    totals = kernels.totals(content["cases"][0])
    median = layer["candidates"][0]["microseconds"]["median"]
    assert totals["eager"].milliseconds == pytest.approx(2e-3 * median)
    assert totals["eager"].roofline == pytest.approx(layer["candidates"][0]["roofline"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("model", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.single
def test_candidates_agree_on_every_kind_of_layer(model: str, dtype: str) -> None:
    """The stem with its pool, shortcuts, strides and groups, on small images."""
    found = kernels.networks.of_model(model, 1, dtype, 32)
    ways = candidates.for_device(CPU, without=["torch.compile"])
    case = kernels.Case(model, 1, dtype, "cpu")
    chosen = dict(list(found.items())[:6])
    result = kernels.measure(case, chosen, ways, rounds=1, thread_count=1, scale=0.02)
    assert {True, False} == {layer.problem.residual for layer in result.layers}
    for layer in result.layers:
        for row in layer.rows:
            if row.name == "oneDNN, fused" and dtype == "bfloat16" and not ONEDNN_HAS_BFLOAT16:
                assert row.status == "failed"
                assert row.reason
                continue
            assert (row.status, row.reason) == ("timed", None), (str(layer.problem), row)


def norms_in_training(found: dict[str, Any], rounds: int = 2) -> dict[str, Any]:
    """The document of resnet50's norms of one shape, two of three with a shortcut."""
    case = kernels.Case("resnet50", 1, "float32", "cpu", "training")
    chosen = case.norms("2048x7x7")
    result = kernels.measure(case, chosen, found, rounds=rounds, thread_count=1, scale=0.02)
    return kernels.document([result], "command")


@pytest.mark.usefixtures("small")
def test_norms_of_a_training_step_are_timed() -> None:
    content = norms_in_training(candidates.for_norms(candidates.for_device(CPU)))
    check_kernels_document(content)
    json.dumps(content, allow_nan=False)
    found = {layer["label"]: layer for layer in content["cases"][0]["layers"]}
    assert {label: layer["count"] for label, layer in found.items()} == {
        "norm + shortcut + ReLU of 2048x7x7": 3,
        "norm of 2048x7x7": 1,
    }
    for layer in found.values():
        names = [one["name"] for one in layer["candidates"]]
        assert names == ["eager", "torch.compile", "fused, cpu"]
        assert all(one["status"] == "timed" for one in layer["candidates"])
        assert all(0 < one["error"] < 2e-6 for one in layer["candidates"])
    medians = [layer["candidates"][0]["microseconds"]["median"] for layer in found.values()]
    total = kernels.totals(content["cases"][0])["eager"]
    counts = [layer["count"] for layer in found.values()]
    expected = 1e-3 * sum(m * c for m, c in zip(medians, counts, strict=True))
    assert total.milliseconds == pytest.approx(expected)


def test_norms_of_a_network() -> None:
    """Each once, and what follows it; in resnet18 the second of a block has the shortcut."""
    for model, every, adds, projections in (("resnet50", 53, 16, 4), ("resnet18", 20, 8, 3)):
        found = kernels.Case(model, 2, "bfloat16", "cpu", "training").norms()
        assert sum(found.values()) == every
        assert sum(count for p, count in found.items() if p.residual) == adds
        assert sum(count for p, count in found.items() if not p.relu) == projections
        assert len({p.key for p in found}) == len(found)
        assert all(p.N == 2 for p in found)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("broken", "named"),
    [(0, "output"), (1, "input's gradient"), (2, "weight's"), (3, "bias's"), (4, "shortcut's")],
)
def test_wrong_norms_are_rows_and_not_timed(broken: int, named: str) -> None:
    """Wherever the error is; `fused` may err less than what is not ours."""

    def wrong(by: float) -> norms.Prepare:
        def prepare(arguments: tuple, problem: Any) -> norms.Call:
            def call() -> tuple[torch.Tensor, ...]:
                results = list(norms.step(norms.operators, arguments, problem))
                if broken < len(results):
                    results[broken] = results[broken] * (1 + by)
                return tuple(results)

            return call

        return prepare

    def short(arguments: tuple, problem: Any) -> norms.Call:
        return lambda: norms.step(norms.operators, arguments, problem)[:-1]

    found = {
        "eager": norms.eager, "others": wrong(2e-6), "fused, bad": wrong(1e-5),
        "others, bad": wrong(1e-3), "fused, short": short,
    }  # fmt: skip
    content = norms_in_training(found, rounds=1)
    check_kernels_document(content)
    (with_shortcut,) = (x for x in content["cases"][0]["layers"] if "shortcut" in x["label"])
    rows = {one["name"]: one for one in with_shortcut["candidates"]}
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "eager": "timed", "others": "timed", "fused, bad": "wrong", "others, bad": "wrong",
        "fused, short": "wrong",
    }  # fmt: skip
    assert rows["fused, bad"]["reason"].startswith(f"{named}: error 1.0e-05, at most")
    assert rows["fused, short"]["reason"] == "4 results, must be 5"


@pytest.mark.usefixtures("small")
def test_wrong_and_failing_candidates_are_rows_and_not_timed() -> None:
    calls: list[str] = []

    def wrong(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)
        return lambda: calls.append("wrong") or run() * (1 + 1e-3)

    def loses_nan(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)
        return lambda: run().nan_to_num(0.0)

    def failing(arguments: tuple, problem: Any) -> candidates.Call:
        raise RuntimeError("no kernel\nand more")

    def misshapen(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)
        return lambda: run()[:, 1:]

    def late(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)

        def call() -> torch.Tensor:
            calls.append("late")
            if calls.count("late") > 4:
                raise RuntimeError("gave up")
            return run()

        return call

    ways = {
        "eager": candidates.eager, "wrong": wrong, "library": loses_nan, "fused, lossy": loses_nan,
        "failing": failing, "misshapen": misshapen,
    }  # fmt: skip
    content = measured(ways)
    check_kernels_document(content)
    rows = {one["name"]: one for one in content["cases"][0]["layers"][0]["candidates"]}
    assert list(rows) == list(ways)
    assert rows["eager"]["status"] == "timed"
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["error"] == pytest.approx(1e-3, rel=1e-2)
    assert calls == ["wrong"]  # checked, not timed
    # Of others' kernels losing NaN is worth a note; ours must not.
    assert (rows["library"]["status"], rows["library"]["keeps_nan"]) == ("timed", False)
    assert rows["fused, lossy"]["status"] == "wrong"
    assert "NaN" in rows["fused, lossy"]["reason"]
    assert rows["failing"]["reason"] == "RuntimeError: no kernel"
    assert "shape" in rows["misshapen"]["reason"]

    content = measured({"eager": candidates.eager, "late": late})
    check_kernels_document(content)
    assert all(
        (one["status"], one["reason"]) == ("failed", "RuntimeError: gave up")
        for one in content["cases"][0]["layers"][0]["candidates"]
    )


@pytest.mark.usefixtures("small")
def test_a_layer_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(kernels.cases, "make_case", no_memory)
    content = measured({"eager": candidates.eager})
    check_kernels_document(content)
    assert "too large" in content["cases"][0]["layers"][0]["candidates"][0]["reason"]
    assert kernels.totals(content["cases"][0]) == {"eager": None}


@pytest.mark.usefixtures("small")
def test_inputs_rotate_where_the_cache_would_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = kernels.Case("resnet50", 1, "float32", "cpu").problems(LAYER)
    monkeypatch.setattr(ceilings, "COLD_BYTES", 3 * problem.bytes_once - 1)
    seen: list[int] = []

    def spy(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)
        # A model's weights are no inference tensors: those would be prepared for each call anew.
        assert not arguments[1].is_inference()
        return lambda: seen.append(arguments[0].data_ptr()) or run()

    measured({"eager": candidates.eager, "spy": spy}, rounds=6)
    timed = seen[-6:]
    assert len(set(timed)) == 3
    assert timed[:3] == timed[3:]


@pytest.mark.usefixtures("small", "interruptible")
def test_interrupted_kernels_keep_the_layers_that_are_done(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, done = kernels._rows, []

    def stop(*arguments: Any) -> Any:
        if len(done) == 1:
            signal.raise_signal(signal.SIGINT)
        done.append(original(*arguments))
        return done[-1]

    monkeypatch.setattr(kernels, "_rows", stop)
    written = tmp_path / "kernels.json"
    code, out, err = run(
        "bench", "kernels", "--layers", "7x7", "--rounds", 2, "--threads", 1, "--without",
        "torch.compile", "--json", written,
    )  # fmt: skip
    assert code == 130, err
    assert "interrupted after 1 of 4 layers" in out
    content = json.loads(written.read_text())
    check_kernels_document(content)
    assert content["cases"][0]["interrupted"]
    assert len(content["cases"][0]["layers"]) == 1


@pytest.mark.usefixtures("small")
def test_bottlenecks_are_timed_as_one_kernel_and_by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs interpreted here; without that it is a row with its reason."""
    found = kernels.networks.chains_of_model("resnet50", 1, "bfloat16", 32)
    chosen = {problem: 2 for problem in found if problem and problem.width == 64}
    assert [bool(problem.projection) for problem in chosen] == [True, False, False]
    layers = candidates.for_device(CPU, without=["torch.compile"])
    blocks = candidates.for_blocks(layers)
    assert list(blocks) == ["eager", "fused, cpu", "fused, one kernel"]
    case = kernels.Case("resnet50", 1, "bfloat16", "cpu")

    def rows_of(chosen: dict[Any, int]) -> list[dict[str, Any]]:
        result = kernels.measure(case, chosen, layers, blocks, rounds=1, thread_count=1, scale=0.02)
        content = kernels.document([result], "command")
        check_kernels_document(content)
        assert not content["cases"][0]["layers"]
        assert kernels.totals(content["cases"][0]) == {}
        return [one for block in content["cases"][0]["blocks"] for one in block["candidates"]]

    if backends.triton.interpreted():
        assert [one["status"] for one in rows_of(chosen)] == ["timed"] * 9
    monkeypatch.setattr(candidates.eligible, "interpreted", lambda: False)
    *timed, last = rows_of(dict(list(chosen.items())[:1]))
    assert [one["status"] for one in timed] == ["timed"] * 2
    assert last["reason"] == "NotImplementedError: runs on a GPU only"
    monkeypatch.setitem(
        blocks, "fused, cpu", lambda *both: lambda: [1.1 * o for o in blocks["eager"](*both)()]
    )
    _, wrong, _ = rows_of(dict(list(chosen.items())[:1]))
    assert wrong["status"] == "wrong"
    assert "output: error" in wrong["reason"]


@pytest.mark.usefixtures("small")
def test_kernels_prints_what_it_writes(run: Run, tmp_path: Path) -> None:
    written = tmp_path / "kernels.json"
    code, out, err = run(
        "bench", "kernels", "--layers", LAYER, "--rounds", 2, "--threads", 1, "--backend",
        "cpu,reference", "--without", "torch.compile", "--batch", "1,2", "--json", written,
    )  # fmt: skip
    assert code == 0, err
    content = json.loads(written.read_text())
    check_kernels_document(content)
    assert [case["batch"] for case in content["cases"]] == [1, 2]
    for case in content["cases"]:
        names = [one["name"] for one in case["layers"][0]["candidates"]]
        assert names == ["eager", "oneDNN, fused", "fused, cpu", "fused, reference"]
        for one in case["layers"][0]["candidates"]:
            assert one["status"] == "failed" or f"{one['microseconds']['median']:.1f}" in out
    assert "all layers, fused, cpu" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.usefixtures("small")
def test_a_backend_that_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        candidates.backends, "available", lambda: {"cpu": "yes", "triton": "no such luck"}
    )
    monkeypatch.setattr(backends.named("triton"), "available", lambda: "no such luck")
    rows = measured(candidates.for_device(CPU, ["triton"], ["torch.compile"]))
    row = rows["cases"][0]["layers"][0]["candidates"][-1]
    assert (row["name"], row["status"]) == ("fused, triton", "failed")
    assert "no such luck" in row["reason"]


def test_each_layer_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all would pass the limit of recompilations and run eager in silence."""
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda run, **_: compiled.append(run) or run)
    prepare = candidates.compiled()
    first, second, *_ = kernels.networks.of_model("resnet18", 1, "float32", 32)
    for problem in (first, first, second, second):
        prepare((), problem)
    assert len(compiled) == 2


def test_the_roofline_is_the_larger_of_two_times() -> None:
    (problem,) = kernels.Case("resnet50", 1, "float32", "cpu").problems(LAYER)
    slow_memory = ceilings.Ceilings(1.0, 1e30, 1, 1)
    slow_products = ceilings.Ceilings(1e30, 1.0, 1, 1)
    assert slow_memory.least_seconds(problem) == problem.bytes_once
    assert slow_products.least_seconds(problem) == problem.flops
    both = slow_memory.better_of(slow_products)
    assert (both.copy_bandwidth, both.matrix_rate) == (1e30, 1e30)
    for dtype in ("float32", "bfloat16"):
        found = ceilings.measure(CPU, dtype, scale=0.02)
        assert found.copy_bandwidth > 1e6
        assert found.matrix_rate > 1e6


@needs_amx
@pytest.mark.usefixtures("small")
def test_the_rate_of_the_matrix_unit_is_measured() -> None:
    """A float32 product is six of bfloat16, or what torch's setting says, a float16 one three."""
    (problem,) = kernels.Case("resnet50", 1, "float32", "cpu").problems(LAYER)
    assert problem.flops == 2 * 2048 * 512 * 49
    found = {d: ceilings.measure(CPU, d, scale=0.02) for d in ("float32", "bfloat16", "float16")}
    for dtype, products in (("bfloat16", 1), ("float16", 3), ("float32", 6)):
        unit = found[dtype].unit
        assert unit is not None
        assert (unit.name, unit.products) == ("amx", products)
        assert unit.rate == unit.rates["bfloat16"] / products
        assert found[dtype].unit_seconds(problem) == problem.flops / unit.rate
        # A core does 1024 multiply-adds a cycle, and no vector unit does an eighth of that.
        assert 0.2e12 < unit.rates["bfloat16"] < 2 * 1024 * 6e9 * torch.get_num_threads()
    before = torch.backends.mkldnn.conv.fp32_precision
    try:
        torch.backends.mkldnn.conv.fp32_precision = "tf32"
        unit = ceilings.measure(CPU, "float32", scale=0.02).unit
        assert unit is not None
        assert unit.products == 3
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    content = measured(candidates.for_device(CPU, without=["torch.compile"]))
    check_kernels_document(content)
    (case,) = content["cases"]
    assert case["ceilings"]["matrix_unit"]["products"] == 6
    (layer,) = case["layers"]
    timed = layer["candidates"][0]
    median = timed["microseconds"]["median"]
    assert timed["unit_share"] == pytest.approx(layer["unit_microseconds"] / median)
    assert kernels.totals(case)["eager"].unit == pytest.approx(timed["unit_share"])
