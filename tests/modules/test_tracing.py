"""Compilers, tracers and transforms: whatever worked on the model works on the fused model."""

import copy
import io

import pytest
import torch
from support import (
    BLOCKS,
    assert_same_bits,
    double_copy,
    image_batch,
    small_resnet,
)
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.resnet import BasicBlock, ResNet

import fused_resnet
from fused_resnet.testing import assert_error_rule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def pair(block="bottleneck", **arguments):
    """A small eager model and its fused twin."""
    eager = small_resnet(BLOCKS[block], **arguments)
    return eager, fused_resnet.fuse(copy.deepcopy(eager))


def nodes_of(graph):
    return {str(n.target) for n in graph.nodes if n.op == "call_function"}


@pytest.fixture
def fresh_compiler():
    """Nothing compiled in one test is found by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.single
def test_compile_fullgraph(backend, block, compiler):
    """One graph, no breaks, our operators in it, in both gradient modes."""
    eager, fused = pair(block, stages=2)
    eager, fused = eager.to(backend.device), fused.to(backend.device)
    x = image_batch(2, 32).to(backend.device)
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    reference = double_copy(eager)(x.double()).detach()
    with torch.no_grad():
        assert_error_rule(compiled(x), eager(x), reference)
    assert_error_rule(compiled(x).detach(), eager(x).detach(), reference)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_sees_our_operators():
    graphs = []

    def collect(module, inputs):
        graphs.append(nodes_of(module.graph))
        return module.forward

    from torch._dynamo.backends.common import aot_autograd

    _, fused = pair()
    with torch.no_grad():
        torch.compile(fused, fullgraph=True, backend=aot_autograd(fw_compiler=collect))(
            image_batch()
        )
    assert len(graphs) == 1
    assert any("fused_resnet.conv_bn_act" in target for target in graphs[0])
    assert not any("batch_norm" in target and "aten" in target for target in graphs[0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.single
def test_compile_gradients(mode):
    """Forward and backward through AOT autograd, in float64."""
    eager, fused = pair("basic", stages=2)
    eager, fused = eager.double().train(mode == "train"), fused.double().train(mode == "train")
    x = image_batch(4, 32).double()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for model in (eager, compiled):
        model(x).square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), eager.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9 * scale, msg=name)
    for ours, theirs in zip(fused.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_inductor():
    """The default compiler, with another image size afterwards."""
    eager, fused = pair("basic")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size, batch in ((40, 2), (48, 3)):
            x = image_batch(batch, size)
            assert_error_rule(compiled(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_without_fullgraph_after_an_update():
    """A compiled model follows its parameters."""
    eager, fused = pair("basic")
    compiled = torch.compile(fused, backend="aot_eager")
    x = image_batch(2, 32)
    with torch.no_grad():
        compiled(x)
        for model in (eager, fused):
            for parameter in model.parameters():
                parameter.data.mul_(1.1)
        assert_error_rule(compiled(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.quick
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_export(block):
    """torch.export with a dynamic batch; our operators stay in the program."""
    eager, fused = pair(block)
    x = image_batch(2, 40)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
    assert any("fused_resnet.conv_bn_act" in target for target in nodes_of(program.graph))
    assert set(program.state_dict) == set(fused.state_dict())
    exported = program.module()
    for size in (2, 5):
        x = image_batch(size, 40)
        with torch.no_grad():
            assert_error_rule(exported(x), eager(x), double_copy(eager)(x.double()))


def test_export_saves_and_loads(tmp_path):
    """An exported program in a file."""
    _, fused = pair("basic")
    x = image_batch(2, 32)
    with torch.no_grad():
        torch.export.save(torch.export.export(fused, (x,)), tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(loaded(x), fused(x), rtol=1e-5, atol=1e-5)


def test_export_of_a_training_model():
    """Batch statistics and their buffers."""
    eager, fused = pair("basic")
    eager.double().train()
    fused.double().train()
    x = image_batch(4, 32).double()
    program = torch.export.export(fused, (x,))
    trained = program.module()
    with torch.no_grad():
        torch.testing.assert_close(trained(x), eager(x), rtol=1e-10, atol=1e-10)
        state = eager.state_dict()
        for name, value in trained.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-10, msg=name)


def test_decompositions_of_an_exported_program():
    """run_decompositions keeps our operators: they have no decomposition."""
    _, fused = pair("basic")
    x = image_batch(2, 32)
    with torch.no_grad():
        program = torch.export.export(fused, (x,)).run_decompositions()
        assert any("fused_resnet" in target for target in nodes_of(program.graph))
        torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_jit_trace(block):
    eager, fused = pair(block)
    x = image_batch(2, 40)
    with torch.no_grad():
        traced = torch.jit.trace(fused, x)
        for size in (2, 4):
            x = image_batch(size, 40, seed=size)
            assert_error_rule(traced(x), eager(x), double_copy(eager)(x.double()))


def test_jit_trace_saves_and_loads(tmp_path):
    eager, fused = pair("basic")
    x = image_batch(2, 40)
    with torch.no_grad():
        torch.jit.trace(fused, x).save(str(tmp_path / "traced.pt"))
        loaded = torch.jit.load(str(tmp_path / "traced.pt"))
        assert_error_rule(loaded(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.quick
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_jit_script(block, tmp_path):
    eager, fused = pair(block)
    types = [type(m) for m in fused.modules()]
    scripted = torch.jit.script(fused)
    assert [type(m) for m in fused.modules()] == types
    x = image_batch(2, 40)
    with torch.no_grad():
        assert_error_rule(scripted(x), eager(x), double_copy(eager)(x.double()))
        scripted.save(str(tmp_path / "scripted.pt"))
        loaded = torch.jit.load(str(tmp_path / "scripted.pt"))
        assert_same_bits(loaded(x), scripted(x))
    assert set(scripted.state_dict()) == set(fused.state_dict())


def test_jit_script_of_a_block():
    eager, fused = pair("bottleneck")
    scripted = torch.jit.script(fused.layer1[0])
    x = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), eager.layer1[0](x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_frozen_and_optimised_scripts():
    eager, fused = pair()
    x = image_batch(2, 40)
    with torch.no_grad():
        reference = double_copy(eager)(x.double())
        frozen = torch.jit.freeze(torch.jit.script(fused))
        assert_error_rule(frozen(x), eager(x), reference)
        optimised = torch.jit.optimize_for_inference(torch.jit.script(fused))
        torch.testing.assert_close(optimised(x).double(), reference, rtol=1e-4, atol=1e-4)


def exported_to_onnx(model):
    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(model, (image_batch(2, 40),), file, dynamo=False)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_onnx_export():
    """The exporter that goes through TorchScript writes the file it wrote before."""
    eager, fused = pair()
    try:
        expected = exported_to_onnx(eager)
    except (ImportError, ValueError, RuntimeError) as error:
        pytest.skip(f"this torch cannot export the model even unfused: {error}")
    assert len(exported_to_onnx(fused)) == len(expected)


def test_conversion_to_mkldnn_modules():
    """torch.utils.mkldnn replaces inner modules by its own and feeds opaque tensors."""
    mkldnn = pytest.importorskip("torch.utils.mkldnn")
    eager, fused = pair()
    x = image_batch(2, 40).to_mkldnn()
    with torch.no_grad():
        ours, theirs = (mkldnn.to_mkldnn(m)(x).to_dense() for m in (fused, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_fx_symbolic_trace(block):
    """The same graph as before fusing, and a graph module that computes the same."""
    eager, fused = pair(block)
    ours, theirs = fx.symbolic_trace(fused), fx.symbolic_trace(eager)
    assert [n.name for n in ours.graph.nodes] == [n.name for n in theirs.graph.nodes]
    x = image_batch(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), eager(x), rtol=1e-4, atol=1e-4)


def test_fx_with_blocks_as_leaves():
    """A tracer that stops at blocks calls the fused ones."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, BasicBlock) or super().is_leaf_module(module, name)

    eager, fused = pair("basic")
    graph = Tracer().trace(fused)
    module = fx.GraphModule(fused, graph)
    assert type(module.get_submodule("layer1.0")) is fused_resnet.BasicBlock
    x = image_batch(2, 40)
    with torch.no_grad():
        assert_error_rule(module(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_feature_extractor(block):
    eager, fused = pair(block)
    assert get_graph_node_names(fused) == get_graph_node_names(eager)
    nodes = ["relu", "layer1", "layer2.0.bn1", "layer3.0.add", "flatten"]
    x = image_batch(2, 40)
    ours = create_feature_extractor(fused, nodes)
    theirs = create_feature_extractor(eager, nodes)
    exact = create_feature_extractor(double_copy(eager), nodes)
    with torch.no_grad():
        features, expected, reference = ours(x), theirs(x), exact(x.double())
    for node in nodes:
        assert_error_rule(features[node], expected[node], reference[node])


def test_intermediate_layer_getter():
    """torchvision's older extractor takes the children out of the ResNet."""
    from torchvision.models._utils import IntermediateLayerGetter

    eager, fused = pair()
    layers = {"layer1": "a", "layer4": "b"}
    x = image_batch(2, 40)
    with torch.no_grad():
        ours = IntermediateLayerGetter(fused, layers)(x)
        theirs = IntermediateLayerGetter(eager, layers)(x)
        exact = IntermediateLayerGetter(double_copy(eager), layers)(x.double())
    for name in theirs:
        assert_error_rule(ours[name], theirs[name], exact[name])


def test_a_sequential_of_children():
    """The feature extractor half the web uses: `nn.Sequential(*list(model.children())[:-1])`."""
    eager, fused = pair()
    trunks = [nn.Sequential(*list(m.children())[:-1]) for m in (fused, eager, double_copy(eager))]
    x = image_batch(2, 40)
    with torch.no_grad():
        assert_error_rule(trunks[0](x), trunks[1](x), trunks[2](x.double()))


def test_functional_gradients():
    """torch.func.grad through functional_call."""
    results = []
    for model in pair("basic"):
        model = model.double()
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def loss(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        results.append(torch.func.grad(loss)(parameters, image_batch(2, 32).double()))
    for name in results[0]:
        scale = results[0][name].abs().max().item()
        torch.testing.assert_close(
            results[1][name], results[0][name], rtol=0, atol=1e-9 * scale, msg=name
        )


def test_per_sample_gradients():
    """vmap over grad: one gradient an image."""
    results = []
    for model in pair("basic"):
        model = model.double()
        weight = model.layer4[0].conv2.weight.detach()[:2]
        rest = {n: p.detach() for n, p in model.named_parameters()}

        def loss(part, x, model=model, rest=rest):
            weight = torch.cat([part, rest["layer4.0.conv2.weight"][2:]])
            parameters = {**rest, "layer4.0.conv2.weight": weight}
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        results.append(per_sample(weight, image_batch(3, 32).double()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)


def test_an_ensemble_under_vmap():
    """vmap over models with stacked parameters."""
    results = []
    for kind in ("eager", "fused"):
        models = []
        torch.manual_seed(6)
        for seed in range(2):
            model = small_resnet(BasicBlock).double()
            fused_resnet.testing.randomize_(model, seed)
            models.append((fused_resnet.fuse(model) if kind == "fused" else model).eval())
        parameters, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")

        def call(parameters, buffers, x, base=base):
            return torch.func.functional_call(base, (parameters, buffers), (x,))

        with torch.no_grad():
            x = image_batch(2, 32).double()
            results.append(torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x))
            torch.testing.assert_close(results[-1][1], models[1](x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


def test_forward_mode_differentiation():
    """Jacobian-vector products, through torch.func and through dual tensors."""
    import torch.autograd.forward_ad as forward_ad

    results = []
    x, tangent = image_batch(2, 32).double(), image_batch(2, 32, seed=1).double()
    for model in pair("basic"):
        model = model.double()
        _, product = torch.func.jvp(model, (x,), (tangent,))
        with forward_ad.dual_level():
            dual = model(forward_ad.make_dual(x, tangent))
            results.append((product, forward_ad.unpack_dual(dual).tangent))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_double_backward_through_a_model():
    """A gradient penalty."""
    results = []
    for model in pair("basic"):
        model = model.double()
        x = image_batch(2, 32).double().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(results[1], results[0], strict=True):
        scale = theirs.abs().max().item() or 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8 * scale)


@pytest.mark.quick
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.single
def test_gradient_modes(context):
    eager, fused = pair()
    x = image_batch(2, 40)
    with context():
        ours, theirs = fused(x), eager(x)
        again = fused(x)
    assert ours.requires_grad == theirs.requires_grad
    assert ours.is_inference() == theirs.is_inference()
    reference = double_copy(eager)(x.double()).detach()
    for out in (ours, again):
        assert_error_rule(out.detach(), theirs.detach(), reference)


def test_tensor_subclasses():
    """A plain subclass with __torch_function__ sees the operations it saw before."""
    calls = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    logs = []
    for model in pair("basic"):
        calls.clear()
        with torch.no_grad():
            out = model(image_batch(2, 32).as_subclass(Logged))
        assert type(out) is Logged
        logs.append(list(calls))
    assert logs[0].count("conv2d") == logs[1].count("conv2d") > 0


def test_torch_function_and_dispatch_modes():
    """Modes such as a FLOP counter or a device context still work around a fused model."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    eager, fused = pair("basic")
    x = image_batch(2, 32)
    with torch.no_grad(), Recorder() as recorder:
        out = fused(x)
    assert any(
        "fused_resnet.conv_bn_act" in name or "aten.convolution" in name for name in recorder.seen
    )
    with torch.no_grad(), torch.device("cpu"):
        assert_error_rule(out, eager(x), double_copy(eager)(x.double()))


def test_fake_tensors():
    """Memory estimators run models on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = fused_resnet.fuse(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=100)).eval()
        out = model(torch.empty(2, 3, 64, 64))
    assert out.shape == (2, 100)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode():
    _, fused = pair("basic")
    with torch.autograd.detect_anomaly(check_nan=True):
        fused(image_batch(2, 32)).sum().backward()
    assert fused.conv1.weight.grad.isfinite().all()


def test_quantization_by_the_eager_workflow():
    """Module fusion of torch.ao turns inner modules into others; the model keeps its meaning."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if not hasattr(quantization, "fuse_modules"):
        pytest.skip("this torch has no torch.ao.quantization.fuse_modules")
    eager, fused = pair("bottleneck")
    groups = [["conv1", "bn1", "relu"]]
    ours = quantization.fuse_modules(fused, groups)
    theirs = quantization.fuse_modules(eager, groups)
    x = image_batch(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
