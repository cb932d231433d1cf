"""Whole blocks in the graphs of compilers: one operator, and what it must follow and decline."""

import collections
import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from support import BLOCKS, assert_same_bits, double_copy, image_batch, run_python, small_resnet
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import fused_resnet
from fused_resnet import backends
from fused_resnet.testing import assert_error_rule

WHOLE = {"conv_bn_act_max_pool": 1, "residual_blocks": 1}
BATCH = torch.export.Dim("batch", min=1, max=16)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled in one test is found by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def our_operators(graph):
    """How often each of our operators is in a graph."""
    targets = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return dict(
        collections.Counter(
            target.split(".")[1] for target in targets if target.startswith("fused_resnet.")
        )
    )


def compiled(model, **options):
    """A compiled model, and the list of its graphs' operators, forward and backward."""
    graphs = []

    def collect(module, inputs):
        graphs.append(our_operators(module.graph))
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    return torch.compile(model, fullgraph=True, backend=backend, **options), graphs


def fused_model(block="bottleneck", layers=1, stages=2):
    """Without a linear layer, which outside of graphs is one call with the pool and rounds so."""
    model = small_resnet(BLOCKS[block], layers=layers, stages=stages)
    model.fc = torch.nn.Identity()
    return fused_resnet.fuse(model)


@pytest.fixture
def packs(monkeypatch):
    """Grows by one whenever a weight is brought into the CPU kernel's layout."""
    calls, pack = [], backends.cpu.operators.pack_conv_weight

    def counted(weight, groups):
        calls.append(tuple(weight.shape))
        return pack(weight, groups)

    monkeypatch.setattr(backends.cpu.operators, "pack_conv_weight", counted)
    return calls


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
@pytest.mark.single
def test_one_operator_for_all_blocks(block, packs):
    """One more for the stem; the bits of the fused model; another batch in the same graph."""
    model = fused_model(block, layers=2)
    run, graphs = compiled(model)
    for batch in (2, 5):
        x = image_batch(batch, 40, seed=batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same_bits(run(x), model(x))
    assert graphs == [WHOLE]
    packs.clear()
    run(x)
    assert not packs


@torch.no_grad()
@pytest.mark.single
def test_other_backends_have_convolutions_in_their_graphs(backend):
    """Whole blocks where the backend has them for graphs, otherwise what was there before."""
    model = fused_model("basic").to(backend.device)
    x = image_batch(2, 32).to(backend.device)
    run, graphs = compiled(model)
    assert_error_rule(run(x), model(x), double_copy(model)(x.double()))
    assert ("residual_blocks" in graphs[0]) == (backend.name == "cpu")
    assert any(name.startswith(("conv_bn_act", "triton_conv")) for name in graphs[0])


@torch.no_grad()
def test_the_backend_is_chosen_when_the_operator_runs():
    """Whatever backend compiled it."""
    model = fused_model("basic")
    x = image_batch(2, 32)
    run, graphs = compiled(model)
    native = run(x)
    with fused_resnet.use_backend("reference"):
        assert_same_bits(run(x), model(x))
        assert not torch.equal(run(x), native)
    assert graphs == [WHOLE]


@torch.no_grad()
def test_a_compiled_model_follows_its_weights():
    """In-place changes, new values from a checkpoint, and new tensors."""
    model = fused_model()
    x = image_batch(2, 40)
    run, graphs = compiled(model)
    outputs = [run(x)]
    conv = model.layer2[0].conv2

    def scaled(state, factor):
        return {name: value * factor if "conv" in name else value for name, value in state.items()}

    def new_tensor():
        conv.weight = torch.nn.Parameter(conv.weight * 1.1)

    for change in (
        lambda: conv.weight.mul_(1.1),
        lambda: conv.weight[3].neg_(),
        lambda: model.load_state_dict(scaled(model.state_dict(), 1.1)),
        lambda: model.load_state_dict(scaled(model.state_dict(), 1.1), assign=True),
        new_tensor,
        lambda: model.layer1[0].bn1.running_var.mul_(2),
        lambda: model.layer1[0].bn1.bias.add_(1),
    ):
        change()
        outputs.append(run(x))
        assert not torch.equal(outputs[-1], outputs[-2])
        assert_same_bits(outputs[-1], model(x))
    assert graphs[0] == WHOLE


@torch.no_grad()
def test_a_compiled_model_follows_fuse_and_unfuse():
    model = fused_model()
    eager = fused_resnet.unfuse(copy.deepcopy(model))
    x = image_batch(2, 40)
    run, graphs = compiled(model)
    fused = run(x)
    fused_resnet.unfuse(model)
    assert_same_bits(run(x), eager(x))
    fused_resnet.fuse(model)
    assert_same_bits(run(x), fused)
    assert graphs[:2] == [WHOLE, {}]


@pytest.mark.parametrize(
    ("where", "calls"),
    [("layer2", 3), ("layer1.1", 3), ("layer2.0.bn2", 2), ("maxpool", 1)],
)
@torch.no_grad()
@pytest.mark.single
def test_hooks_are_called_between_operators(where, calls):
    """What is before a hook and what is behind it are operators of their own."""
    model = fused_model(layers=2)
    x = image_batch(2, 40)
    expected, seen = model(x), []
    model.get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
    run, graphs = compiled(model)
    assert_error_rule(run(x), expected, double_copy(fused_resnet.unfuse(model))(x.double()))
    assert where in seen
    assert graphs[0]["residual_blocks"] == calls


@torch.no_grad()
def test_hooks_that_come_later_are_called():
    """Where torch has been told to look for hooks again, the model is compiled anew."""
    model = fused_model()
    x, seen = image_batch(2, 40), []
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        run, graphs = compiled(model)
        run(x)
        assert graphs == [WHOLE]
        model.layer2[0].bn1.register_forward_hook(lambda *_: seen.append(1))
        run(x)
    assert seen == [1]
    assert len(graphs) == 2


@torch.no_grad()
def test_what_does_not_fit_is_refused_by_the_module_it_does_not_fit():
    """Not by the operator, whose message would speak of something that nobody called."""
    model = fused_model("basic")
    model.layer2[0].conv2 = torch.nn.Conv2d(64, 128, 3, padding=1, bias=False)
    run, _ = compiled(model)
    with pytest.raises(Exception, match=r"expected input.* to have 64 channels") as raised:
        run(image_batch(2, 40))
    assert "residual_blocks" not in str(raised.value).partition("from user code")[0]


def test_gradients_go_through_convolutions():
    """Where autograd records, the operator is its convolutions, each of them differentiable."""
    model = fused_model("basic").double()
    eager = fused_resnet.unfuse(copy.deepcopy(model))
    x = image_batch(2, 32).double().requires_grad_()
    run, graphs = compiled(model)
    ours = torch.autograd.grad(run(x).square().sum(), [x, *model.parameters()])
    theirs = torch.autograd.grad(eager(x).square().sum(), [x, *eager.parameters()])
    for gradient, expected in zip(ours, theirs, strict=True):
        scale = expected.abs().max().item() or 1.0
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9 * scale)
    assert "residual_blocks" not in graphs[0]
    assert graphs[0]["conv_bn_act"] == sum(
        isinstance(module, torch.nn.Conv2d) for module in model.modules()
    )


@torch.no_grad()
def test_autocast_casts_all_convolutions_of_the_operator():
    """As it casts each by itself; batch norm's parameters stay float32."""
    model = fused_model()
    x = image_batch(2, 40)
    run, graphs = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(x)
        assert_same_bits(ours, model(x))
    assert ours.dtype is torch.bfloat16
    assert graphs == [WHOLE]
    reduced = copy.deepcopy(model)
    for module in reduced.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.bfloat16()
    assert_same_bits(ours, reduced(x.bfloat16()))


@pytest.mark.quick
@pytest.mark.parametrize("recorded", [False, True])
def test_an_exported_program_holds_whole_blocks(recorded):
    """Exported with gradients enabled or not; it can be differentiated either way."""
    model = fused_model()
    x = image_batch(2, 40)
    with torch.set_grad_enabled(recorded):
        program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))
    counts = our_operators(program.graph)
    assert counts.pop("residual_blocks") == 1
    assert counts == {"conv_bn_act" if recorded else "conv_bn_act_max_pool": 1}
    exported = program.module()
    x = image_batch(3, 40, seed=1)
    with torch.no_grad():
        assert_same_bits(exported(x), model(x))
    exported(x).sum().backward()
    model(x).sum().backward()
    gradients = dict(exported.named_parameters())
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        scale = expected.abs().max().item() or 1.0
        torch.testing.assert_close(
            gradients[name].grad, expected, rtol=0, atol=1e-4 * scale, msg=name
        )


@pytest.mark.parametrize("recorded", [False, True])
def test_a_traced_graph_holds_whole_blocks_unless_autograd_records(recorded):
    model = fused_model("basic")
    with torch.set_grad_enabled(recorded):
        graph = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            image_batch(2, 32)
        )
    assert ("residual_blocks" in our_operators(graph.graph)) == (not recorded)
    x = image_batch(3, 32, seed=1)
    with torch.no_grad():
        assert_same_bits(graph(x), model(x))


def trained_step(model, run, x):
    """One step's loss gradients and buffers, and the bytes that autograd kept for it."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run(x).square().sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return gradients, list(model.buffers()), sum(v for k, v in kept.items() if k not in own)


@pytest.mark.parametrize(("block", "memory"), [("basic", "normal"), ("bottleneck", "low")])
@pytest.mark.single
def test_training_holds_whole_blocks(block, memory):
    """The fused step's bits, and its memory: one operator a block, and one for its backward."""
    model = fused_resnet.fuse(small_resnet(BLOCKS[block], stages=2), memory=memory).train()
    twin = copy.deepcopy(model)
    run, graphs = compiled(model)
    for seed in (0, 1):
        x = image_batch(3, 40, seed=seed)
        ours, theirs = trained_step(model, run, x), trained_step(twin, twin, x)
        for one, other in zip(ours[0], theirs[0], strict=True):
            assert_same_bits(one, other)
        for one, other in zip(ours[1], theirs[1], strict=True):
            assert_same_bits(one, other)
        assert ours[2] <= 1.01 * theirs[2]
    assert graphs == [
        {"stem_training": 1, "block_training": 2},
        {"stem_training_backward": 1, "block_training_backward": 2},
    ]


def test_training_under_autocast_holds_whole_blocks():
    """Convolutions in bfloat16, everything else as autocast leaves it."""
    model = fused_model("basic").train()
    twin = copy.deepcopy(model)
    run, graphs = compiled(model)
    x = image_batch(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (trained_step(m, r, x) for m, r in ((model, run), (twin, twin)))
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * other.abs().max().item())
    assert graphs[0] == {"stem_training": 1, "block_training": 2}


def test_training_around_what_must_be_seen():
    """A hooked block, and one in eval mode, are their convolutions."""
    model = fused_model("basic").train()
    seen = []
    model.layer2[0].bn1.register_forward_hook(lambda *_: seen.append(1))
    model.layer1.eval()
    run, graphs = compiled(model)
    run(image_batch(3, 40)).sum().backward()
    assert seen
    assert "block_training" not in graphs[0]
    assert graphs[0]["conv_bn_act"] == 2


def test_weights_of_a_package_are_packed_once(tmp_path):
    """They are constants of its C++, which hands the same tensors over in every call."""
    model = fused_model("basic")
    x = image_batch(2, 32)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))
        torch.save((x, model(x)), tmp_path / "tensors.pt")
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    code = """
        import torch
        torch.set_num_threads(2)
        from fused_resnet.backends.cpu import operators
        calls, pack = [], operators.pack_conv_weight
        operators.pack_conv_weight = lambda *arguments: calls.append(1) or pack(*arguments)
        x, expected = torch.load({tensors!r})
        run = torch._inductor.aoti_load_package({package!r})
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                for batch in (x, x[:1], x):
                    torch.testing.assert_close(run(batch), expected[: len(batch)])
        print(len(calls))
    """
    out = run_python(code.format(tensors=str(tmp_path / "tensors.pt"), package=package))
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert out == f"{convolutions}\n"
