"""Several processes: statistics shared between them, and data-parallel training.

What the two processes do is in two_processes.py; they run once for all of these tests. The
definition is a single process with the joint batch.
"""

import copy
import functools
import tempfile
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, processes, two_processes
from torch import nn

import fused_resnet
from fused_resnet import functional, reference
from fused_resnet.testing import assert_error_rule, relative_error

TIMEOUT = 300


def run_process(rank, folder):
    environment = processes.current_environment()
    environment.pop("FUSED_RESNET_BACKEND", None)
    code = f"""
        import runpy, sys
        sys.argv = ["two_processes.py", "{rank}", {folder!r}]
        runpy.run_path({two_processes.__file__!r}, run_name="__main__")
    """
    return processes.run_code(textwrap.dedent(code), TIMEOUT, environment)


@functools.cache
def outcomes():
    """Where what every scenario returned in both processes is, or its error; their last words.

    Whole networks are among it: a test loads what it compares, and nobody keeps it.
    """
    folder = tempfile.TemporaryDirectory()
    with ThreadPoolExecutor() as pool:
        ranks = range(two_processes.WORLD)
        ended = list(pool.map(lambda rank: run_process(rank, folder.name), ranks))
    return folder, [err for _, _, err in ended]


once = threading.Lock()


def outcomes_once():
    with once:
        return outcomes()


pytestmark = pytest.mark.ahead(lambda: outcomes_once())


@pytest.fixture
def results(ahead):
    """`results(name)`: what a scenario returned in both processes, or fails with its error."""
    folder, errors = ahead()

    def load(name):
        found = []
        for rank in range(two_processes.WORLD):
            path = Path(folder.name) / f"{name}.{rank}.pt"
            assert path.exists(), f"{name} did not run in process {rank}: {errors[rank][-2000:]}"
            found.append(torch.load(path, weights_only=False))
            assert not isinstance(found[-1], str), f"{name} in process {rank}: {found[-1]}"
        return found

    return load


def joint(ranks, key):
    """The result of the whole batch from those of its shares."""
    values = [rank[key] for rank in ranks]
    if key in ("output", "grad_input", "grad_residual"):
        return torch.cat(values)
    if key.startswith("grad"):
        return torch.stack(values).sum(0)
    for other in values[1:]:
        assert_same_bits(other, values[0], key)
    return values[0]


def expected_function(share, dtype, residual, activation):
    """`run_function` on the joint batch, by torch's operators."""
    case = two_processes.function_case(share, two_processes.DTYPES[dtype])
    input, z, grad = (torch.cat(case[name]) for name in ("input", "residual", "grad"))
    mean, var, weight, bias = two_processes.vectors(two_processes.DTYPES[dtype])
    results = []
    for change in (lambda t: t, torch.Tensor.double):
        leaves = {"input": input, "weight": weight, "bias": bias}
        if residual:
            leaves["residual"] = z
        leaves = {n: change(t).clone().requires_grad_() for n, t in leaves.items()}
        means, variances = change(mean).clone(), change(var).clone()
        out = reference.batch_norm_act(
            leaves["input"], means, variances, leaves["weight"], leaves["bias"], True, 0.3,
            residual=leaves.get("residual"), activation=activation,
        )  # fmt: skip
        gradients = torch.autograd.grad(out, list(leaves.values()), change(grad))
        results.append(
            {
                "output": out.detach(),
                "running_mean": means,
                "running_var": variances,
                **{f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)},
            }
        )
    return results


@pytest.mark.parametrize("dtype", two_processes.DTYPES)
@pytest.mark.parametrize("share", two_processes.SHARES)
@pytest.mark.parametrize("run_by", ["cpu", "reference"])
def test_the_function_against_the_joint_batch(results, run_by, share, dtype):
    """Output, running statistics and all gradients; in float64 to the last digits."""
    ranks = results("functions")
    for residual, activation in ((True, "relu"), (False, "relu"), (True, "none")):
        key = (run_by, share, dtype, residual, activation)
        ours = [rank[key] for rank in ranks]
        eager, exact = expected_function(share, dtype, residual, activation)
        assert ours[0].keys() == eager.keys()
        for name in eager:
            actual = joint(ours, name)
            if dtype == "float64":
                torch.testing.assert_close(actual, eager[name], rtol=1e-9, atol=1e-9, msg=name)
            else:
                assert_error_rule(actual, eager[name], exact[name], what=name)


def assert_joint(ranks, expected, tolerance=1e-9):
    assert ranks[0].keys() == expected.keys()
    for name, value in expected.items():
        actual = joint(ranks, name)
        torch.testing.assert_close(actual, value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("share", ["uneven", "empty"])
@pytest.mark.parametrize("name", two_processes.MODELS)
def test_models_against_the_joint_batch(results, name, share):
    model = two_processes.make_model(name)
    expected = two_processes.model_results(model, torch.cat(two_processes.images(share)))
    for memory in ("normal", "low"):
        for order in ("fuse first", "convert first"):
            key = (name, share, memory, order)
            assert_joint([rank[key] for rank in results("models")], expected)


def test_a_network_with_its_stem(results):
    model = two_processes.network()
    expected = two_processes.model_results(model, two_processes.draw(4, 3, 32, 32, seed=4))
    assert_joint(results("stem"), expected, 1e-7)


def test_under_autocast(results):
    eager = two_processes.make_model("basic").float()
    exact = copy.deepcopy(eager).double()
    x = torch.cat(two_processes.images("uneven")).float()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = eager(x)
    ranks = results("autocast")
    assert_error_rule(joint(ranks, "output"), theirs, exact(x.double()))
    two_processes.loss_of(theirs.float()).backward()
    two_processes.loss_of(exact(x.double())).backward()
    # Gradients in 16 bits, of few values, scatter: they are judged together.
    gradients = []
    for name, parameter in eager.named_parameters():
        parts = [rank[name] for rank in ranks]
        assert all(part.dtype == parameter.grad.dtype for part in parts)
        gradients.append((sum(parts), parameter.grad, exact.get_parameter(name).grad))
    ours, theirs, expected = (
        torch.cat([t.flatten() for t in each]) for each in zip(*gradients, strict=True)
    )
    assert relative_error(ours, expected) < 2 * relative_error(theirs, expected) < 0.5


def test_cumulative_averages(results):
    """`momentum=None`, over three steps."""
    model = two_processes.make_model("basic")
    for norm in (model.bn1, model.bn2, model.downsample[1]):
        norm.momentum = None
    for step in range(3):
        model(torch.cat(two_processes.images("uneven")) + step)
    assert_joint(results("momentum"), dict(model.named_buffers()))


def test_eval_mode_and_a_group_of_one_are_ordinary(results):
    for differences in results("not_shared"):
        assert differences == {"eval": [], "alone": []}


def test_process_group(results):
    model = two_processes.make_model("basic")
    expected = two_processes.model_results(model, torch.cat(two_processes.images("uneven")))
    assert_joint(results("group_argument"), expected)


def test_nobody_has_a_value(results):
    shape = (0, two_processes.CHANNELS, 3, 3)
    for result in results("all_empty"):
        assert result["shape"] == result["grad_input"] == shape
        assert result["unchanged"]
        assert not result["grad_weight"].any()


def test_one_collective_in_each_direction(results):
    for calls in results("collectives"):
        assert calls["function"] == ["all_gather", "all_reduce"]
        assert calls["bottleneck"] == ["all_gather"] * 4 + ["all_reduce"] * 4


def test_differentiating_twice_is_refused(results):
    for messages in results("twice"):
        assert len(messages) == 2
        assert all("differentiated only once" in message for message in messages)


def test_the_report_says_so(results):
    for records in results("report"):
        assert all(fused for fused, _ in records)
        assert all("statistics of 2 processes" in backend for _, backend in records)


def test_data_parallel_training(results):
    """Fused and unfused come to the same gradients, parameters and buffers, and ranks agree."""
    ranks = results("data_parallel")
    for rank in ranks:
        for name, theirs in rank["eager"].items():
            assert relative_error(rank["fused"][name], theirs) < 1e-8, name
    for name, value in ranks[0]["fused"].items():
        if "running" not in name:  # each rank's own, until the next forward pass
            assert_same_bits(ranks[1]["fused"][name], value, name)


def test_data_parallel_training_with_shared_statistics(results):
    """Two processes with half of the images each do what one does with all of them."""
    model = two_processes.network()
    expected = two_processes.two_steps(model, model, None)
    for rank in results("data_parallel"):
        for name, value in expected.items():
            torch.testing.assert_close(rank["shared"][name], value, rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.parametrize("order", ["fuse first", "shard first"])
def test_sharded_training(results, order):
    """FSDP2's gradients, parameters and buffers are those of the unfused network under it."""
    for rank in results("sharded"):
        for name, theirs in rank["eager"].items():
            assert relative_error(rank[order][name], theirs) < 1e-8, name
        assert rank[f"{order}: class"] == ["FSDPBasicBlock", "FSDPModule", "BasicBlock"]
        assert rank[f"{order}: memory"] == "low"
        assert rank[f"{order}: unfused"] == ["FSDPBasicBlock", "FSDPModule", "BasicBlock"]
        assert all(fused and not reason for fused, _, reason in rank[f"{order}: report"])
        assert rank[f"{order}: training again"].keys() == rank["eager"].keys()


def test_copies_of_gathered_weights(results):
    """They go with the gathered weights, but for the last block's; and are never out of date."""
    for rank in results("gathered"):
        for ours, theirs in (rank["first"], rank["second"]):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        # Of four blocks the last has four times as many weights as the one before it.
        assert 0 < rank["kept"] < 0.85 * rank["weights"]
        assert rank["kept later"] < 0.85 * rank["weights"]


def test_compiled_parallel_training(results):
    for rank, sharded in zip(results("compiled"), results("sharded"), strict=True):
        # DDP hands the first process's buffers to all, FSDP leaves each its own.
        for way, eager in (("data parallel", rank["eager"]), ("sharded", sharded["eager"])):
            for name, theirs in eager.items():
                assert relative_error(rank[way][name], theirs) < 1e-8, (way, name)


@pytest.mark.quick
def test_without_processes_it_is_ordinary():
    """As in torch, `SyncBatchNorm` normalises by itself where there is no process group."""
    eager = two_processes.make_model("bottleneck")
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused_resnet.fuse(copy.deepcopy(eager)))
    assert all(record.fused for record in fused_resnet.report(fused))
    x = torch.cat(two_processes.images("uneven"))
    theirs = two_processes.model_results(fused_resnet.fuse(eager), x)
    ours = two_processes.model_results(fused, x)
    for name, value in theirs.items():
        assert_same_bits(ours[name], value, name)


@pytest.mark.quick
def test_combined_statistics():
    """Of parts far from zero and of no values at all, against the whole in float64."""
    parts = [1e4 + torch.randn(n, 5, 3, dtype=torch.float64) for n in (4, 0, 1, 7)]
    statistics = [reference.batch_statistics(part) for part in parts]
    means, variances = (torch.stack(s) for s in zip(*statistics, strict=True))
    counts = torch.tensor([3.0 * len(part) for part in parts], dtype=torch.float64)
    mean, var, count = reference.combine_statistics(means, variances, counts)
    expected_var, expected_mean = torch.var_mean(torch.cat(parts), (0, 2), unbiased=False)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(var, expected_var, rtol=1e-10, atol=0)
    assert count == 36
    nothing = reference.combine_statistics(
        *(torch.zeros_like(t) for t in (means, variances)), counts * 0
    )
    assert not any(t.any() for t in nothing)


@pytest.mark.quick
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_reference_backward(residual, activation):
    """Its sums and its pass over the input are the derivative of batch norm, NaN let through."""
    x, z, grad = torch.randn(3, 4, 6, 5, 3, dtype=torch.float64).unbind(0)
    weight, bias = torch.randn(2, 6, dtype=torch.float64).unbind(0)
    z = z if residual else None
    x.requires_grad_()
    out, mean, var = reference.batch_norm_act_training(x, weight, bias, 1e-5, z, activation)
    (expected,) = torch.autograd.grad(out, x, grad)
    with torch.no_grad():
        for output in (out,) if residual else (out, None):
            arguments = (grad, x, output, mean, var, weight, bias, 1e-5, activation)
            total, dot = reference.batch_norm_act_backward_sums(*arguments)
            for count in (60, torch.tensor(60.0)):
                ours, masked = reference.batch_norm_act_backward_input(
                    *arguments, total, dot, count, True
                )
                torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
                passes = out > 0 if activation == "relu" else torch.ones_like(out, dtype=bool)
                assert_same_bits(masked, torch.where(passes, grad, 0.0))


@pytest.mark.quick
def test_bad_arguments():
    x, vector = torch.randn(2, 3, 4, 4), torch.ones(3)
    with pytest.raises(ValueError, match="sync_batch_norm_act: weight has shape"):
        functional.sync_batch_norm_act(x, vector, vector, vector[:2], None, group=None)
    with pytest.raises(RuntimeError, match="no rule for functorch transforms"):
        torch.func.vmap(lambda x: functional.sync_batch_norm_act(x, None, None, group=None))(
            x[None]
        )
