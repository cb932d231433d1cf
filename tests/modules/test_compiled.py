"""Artefacts of compilers: packages in fresh processes, graphs of operators, CUDA graphs."""

import copy
import tempfile

import pytest
import torch
from support import BLOCKS, double_copy, image_batch, run_python, small_resnet
from torch.fx.experimental.proxy_tensor import make_fx

import fused_resnet
from fused_resnet.testing import assert_error_rule

BATCH = torch.export.Dim("batch", min=1, max=16)

# What a process does with an artefact: outputs for both batches, by the error rule, and no others.
CHECK = """
    import torch
    torch.set_num_threads(2)
    import fused_resnet
    from fused_resnet.testing import assert_error_rule
    saved = torch.load({tensors!r})
    run = {load}
    with torch.no_grad():
        for x, eager, exact in saved:
            assert_error_rule(run(x), eager, exact)
    print(len(saved))
"""


def saved_program(tmp_path, block):
    """An exported program with a dynamic batch, and a file of what it has to compute."""
    eager = small_resnet(BLOCKS[block])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    with torch.no_grad():
        program = torch.export.export(fused, (image_batch(2, 40),), dynamic_shapes=({0: BATCH},))
        tensors = [
            (x, eager(x), double_copy(eager)(x.double()))
            for x in (image_batch(2, 40), image_batch(5, 40, seed=1))
        ]
    torch.save(tensors, tmp_path / "tensors.pt")
    return program, str(tmp_path / "tensors.pt")


def test_an_exported_program_in_a_fresh_process(tmp_path):
    program, tensors = saved_program(tmp_path, "bottleneck")
    torch.export.save(program, tmp_path / "program.pt2")
    load = f"torch.export.load({str(tmp_path / 'program.pt2')!r}).module()"
    assert run_python(CHECK.format(tensors=tensors, load=load)) == "2\n"


def packaged():
    """What a process prints that checks the package which another one has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        package = f"{folder}/model.pt2"
        compile_it = f"""
            import pathlib, torch
            from modules.test_compiled import saved_program
            program, _ = saved_program(pathlib.Path({folder!r}), "basic")
            torch._inductor.aoti_compile_and_package(program, package_path={package!r})
        """
        run_python(compile_it)
        load = f"torch._inductor.aoti_load_package({package!r})"
        return run_python(CHECK.format(tensors=f"{folder}/tensors.pt", load=load))


@pytest.mark.ahead(lambda: packaged())
def test_an_aot_inductor_package_in_a_fresh_process(ahead):
    """Its C++ calls our operators through the dispatcher, where importing the package put them."""
    assert ahead() == "2\n"


@pytest.mark.parametrize(
    ("block", "tracing_mode"), [("basic", "real"), ("bottleneck", "fake"), ("basic", "symbolic")]
)
@pytest.mark.single
def test_make_fx(block, tracing_mode):
    """A graph of operators, ours among them, that computes the same."""
    eager = small_resnet(BLOCKS[block])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    with torch.no_grad():
        graph = make_fx(fused, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
        targets = [str(node.target) for node in graph.graph.nodes]
        assert any(target.startswith("fused_resnet.conv_bn_act") for target in targets)
        assert not any("batch_norm" in target for target in targets)
        assert_error_rule(graph(x), eager(x), double_copy(eager)(x.double()))


def test_make_fx_of_a_training_step():
    """Forward and backward in one graph."""
    eager = small_resnet(BLOCKS["basic"]).double().train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(3, 32).double()

    def gradients(model):
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def step(x, parameters):
            leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
            out = torch.func.functional_call(model, leaves, (x,))
            return torch.autograd.grad(out.square().sum(), list(leaves.values()))

        return step, (x, parameters)

    step, arguments = gradients(fused)
    graph = make_fx(step)(*arguments)
    step, arguments = gradients(eager)
    for ours, theirs in zip(graph(*arguments), step(*arguments), strict=True):
        scale = theirs.abs().max().item() or 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_graphed_callables(mode):
    """Forward and backward replayed from CUDA graphs."""
    eager = small_resnet(BLOCKS["bottleneck"]).cuda().train(mode == "train")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    fused = torch.cuda.make_graphed_callables(fused, (image_batch(4, 64).cuda(),))
    fused.load_state_dict(eager.state_dict())  # capturing updated the running statistics
    x = image_batch(4, 64, seed=1).cuda()
    for model in (fused, eager):
        model.zero_grad()
        model(x).square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), eager.parameters(), strict=True):
        limit = 1e-3 * theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=limit, msg=name)
    for (name, ours), theirs in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=name)
