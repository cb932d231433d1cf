"""Programs exported from fused models, where nobody knows our operators."""

import collections
import contextlib
import copy
import io

import pytest
import torch
from support import BLOCKS, assert_same_bits, double_copy, image_batch, run_python, small_resnet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet
from fused_resnet import functional
from fused_resnet.models import cifar_resnet
from fused_resnet.testing import assert_error_rule, randomize_, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def exported(model, x, **keywords):
    with torch.no_grad():
        return torch.export.export(model, (x,), **keywords)


def decomposed(program):
    return program.run_decompositions(fused_resnet.decompositions())


def operators(program):
    """How often each operator is called."""
    nodes = program.graph_module.graph.nodes
    return collections.Counter(str(n.target) for n in nodes if n.op == "call_function")


def functional_names(counts):
    """The same with the names of what does it out of place."""
    names = collections.Counter()
    for name, count in counts.items():
        names[name.replace("relu_.", "relu.").replace("add_.", "add.")] += count
    return names


@pytest.mark.quick
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_a_decomposed_program_is_that_of_the_model_before(block, strict):
    """The same operators, as often; the same values for any batch."""
    eager = small_resnet(BLOCKS[block], stages=2)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    batch = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=2, max=64)},), "strict": strict}
    program = exported(fused, image_batch(2, 40), **batch)
    assert any("fused_resnet" in name for name in operators(program))
    program = decomposed(program)
    theirs = exported(eager, image_batch(2, 40), **batch).run_decompositions({})
    assert functional_names(operators(program)) == functional_names(operators(theirs))
    assert set(program.state_dict) == set(eager.state_dict())
    for size in (2, 5):
        x = image_batch(size, 40)
        with torch.no_grad():
            assert_error_rule(program.module()(x), eager(x), double_copy(eager)(x.double()))


def test_every_operator_of_exported_programs_is_in_the_table():
    """Each operator with a fake kernel, but those that compilers alone put into graphs."""
    found = {operator._schema.name for operator in fused_resnet.decompositions()}
    own = set()
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace = qualified.partition("::")[0]
        entry = torch._library.simple_registry.singleton.find(qualified)
        if namespace == "fused_resnet" and entry.fake_impl.kernel is not None:
            own.add(qualified)
    inside = {f"fused_resnet::{name}" for name in ("block_training", "stem_training")}
    inside |= {f"{name}_backward" for name in inside}
    assert own - inside == found


def test_the_core_operators():
    """With torch's own table too, nothing else is left."""
    fused = fused_resnet.fuse(small_resnet(stages=2))
    x = image_batch(2, 40)
    table = torch.export.default_decompositions()
    table.update(fused_resnet.decompositions())
    program = exported(fused, x).run_decompositions(table)
    names = {name.partition(".")[0] for name in operators(program)}
    assert {name for name in names if name != "<built-in function getitem>"} == {"aten"}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-4, atol=1e-4)


def test_models_with_every_operator():
    """Padded shortcuts, norms before convolutions, functions called by users."""

    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8)

        def forward(self, x):
            norm = self.norm
            running = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            h = functional.conv_bn_act(x, self.conv.weight, *running, bias=self.conv.bias)
            h = functional.batch_norm_act(h, *running, residual=h)
            h = torch.ops.fused_resnet.scale_shift_act(h, running[0], running[1], None, "relu")
            return functional.batch_norm_act(h, None, None, norm.weight, norm.bias, training=True)

    from torchvision.models import densenet

    for model in (
        cifar_resnet(8),
        fused_resnet.models.preact_resnet(18),
        densenet.DenseNet(8, (2, 2), 16),
        Functions(),
    ):
        # In float64, which leaves nothing for a batch norm behind others to blow up.
        eager = randomize_(model).eval().double()
        fused = fused_resnet.fuse(copy.deepcopy(eager))
        x = image_batch(2, 40).double()
        program = decomposed(exported(fused, x))
        assert not any("fused_resnet" in name for name in operators(program))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), eager(x), rtol=1e-9, atol=1e-9)


def test_a_program_in_training_is_torchs_own():
    """Whoever exports a model to train it, as quantization-aware training does, gets its norms."""
    eager = small_resnet(stages=2).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(4, 40)
    ours, theirs = (
        operators(torch.export.export(model, (x,), strict=True)) for model in (fused, eager)
    )
    assert ours == theirs
    assert not any("fused_resnet" in name for name in ours)


class WeightSteps(TorchDispatchMode):
    """The steps that weights are made of again."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.quantized_decomposed.dequantize_per_channel.default:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


EIGHT_BITS = {"16-bit stem": {}, "8-bit stem": {"stem": "int8"}, "float stem": {"stem": "float"}}


@pytest.mark.parametrize("stem", EIGHT_BITS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_eight_bits_become_stored_activations(block, stem):
    """PT2E's operators; each activation within a step of what the kernels store."""
    eager = small_resnet(BLOCKS[block], stages=2)
    # A norm may turn a filter's sign, or leave nothing of it.
    with torch.no_grad():
        eager.layer1[0].bn1.weight[:3] = torch.tensor([-1.0, 0.0, -0.3])
    x = image_batch(8, 40)
    fused = fused_resnet.quantize(fused_resnet.fuse(copy.deepcopy(eager)), [x], **EIGHT_BITS[stem])
    program = exported(fused, x)
    assert any("int8" in name for name in operators(program))
    program = decomposed(program)
    names = operators(program)
    assert not any("fused_resnet" in name for name in names)
    convolutions = sum(type(m) is nn.Conv2d for m in eager.modules())
    by_channel = names["quantized_decomposed.dequantize_per_channel.default"]
    assert by_channel == convolutions - (stem != "8-bit stem")
    stored = names["quantized_decomposed.quantize_per_tensor.default"]
    written = 2 * {"basic": 2, "bottleneck": 3}[block]  # by the blocks' main convolutions
    assert stored == 1 + written + {"16-bit stem": 1, "8-bit stem": 2, "float stem": 0}[stem]
    with torch.no_grad():
        with WeightSteps() as steps:
            ours = program.module()(x)
        kernels = fused(x)
        exact = double_copy(eager)(x.double())
    # Other libraries refuse steps of zero.
    assert len(steps.seen) == by_channel
    assert all((step > 0).all() for step in steps.seen)
    # One activation that is rounded to the other side moves hundreds of sums in the next layer.
    assert relative_error(ours, kernels) < 0.7 * relative_error(kernels, exact)
    assert relative_error(ours, exact) < 1.2 * relative_error(kernels, exact)


@pytest.mark.quick
def test_eight_bits_to_the_last_bit_where_sums_are_exact():
    """Of few channels a float32 sum of bytes is exact too, and hardly any lies at half a step."""
    torch.manual_seed(0)
    block = randomize_(torch.nn.Sequential(small_resnet(BLOCKS["basic"]).layer1[0])).eval()
    x = torch.randn(8, 64, 12, 12)
    fused = fused_resnet.quantize(fused_resnet.fuse(block), [x])
    program = decomposed(exported(fused, x))
    with torch.no_grad():
        ours, kernels = program.module()(x), fused(x)
    step = fused[0].quantization.ranges[-1].step
    difference = (ours - kernels).abs()
    assert difference.max() <= 1.001 * step
    assert (difference > 0.5 * step).double().mean() < 1e-3


def test_the_operator_of_finished_copies_decomposes_to_the_reference():
    block = small_resnet(BLOCKS["basic"]).layer1[0]
    x = torch.randn(2, 64, 6, 6)
    fused = fused_resnet.quantize(fused_resnet.fuse(nn.Sequential(block)), [x])
    from fused_resnet.layers.quantized import flat_blocks
    from fused_resnet.layers.quantized_copies import copies_of
    from fused_resnet.modules import read

    described = read.inference_block(fused[0], x)
    ranges = fused[0].quantization.ranges
    (copied,) = copies_of([described], [ranges])
    operator = torch.ops.fused_resnet.quantized_residual_blocks.default
    arguments = (x, *flat_blocks([copied.block]), *ranges[0], ranges[-1].step)
    found = fused_resnet.decompositions()[operator](*arguments)
    assert_same_bits(found, operator(*arguments))


# ---- other libraries, where they are installed ----


def quantized_by_pt2e(model, x, train=False):
    """How many activations and weights PT2E quantizes, and what the result computes."""
    flow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=train))
    with fused_resnet.unfused() if not train else contextlib.nullcontext():
        program = torch.export.export(model.train(train), (x,), strict=True)
    prepare = flow.prepare_qat_pt2e if train else flow.prepare_pt2e
    prepared = prepare(program.module(), quantizer)
    with torch.no_grad():
        prepared(x)
        converted = flow.convert_pt2e(prepared)
        out = converted(x)
    names = [str(node.target) for node in converted.graph.nodes]
    return sum("quantize_per" in name and "dequantize" not in name for name in names), out


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_pt2e_quantizes_what_it_would(block, train):
    """As many activations as of the model before `fuse`, and the same values."""
    eager = small_resnet(BLOCKS[block])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(4, 40)
    theirs, expected = quantized_by_pt2e(eager, x, train)
    ours, out = quantized_by_pt2e(fused, x, train)
    assert ours == theirs > 10
    # In training a batch's rounding decides about the ranges that all is rounded in.
    assert relative_error(out, expected) < (0.05 if train else 1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_an_unfused_program_is_node_by_node_that_of_the_model_before(block, strict):
    """With what quantizers look at: operators, and in strict programs the modules they are from."""
    eager = small_resnet(BLOCKS[block], stages=2)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    with fused_resnet.unfused():
        ours = exported(fused, x, strict=strict)
    theirs = exported(eager, x, strict=strict)
    for mine, other in zip(ours.graph.nodes, theirs.graph.nodes, strict=True):
        assert (mine.name, mine.target) == (other.name, other.target)
        sources = [
            [source for _, source in node.meta.get("source_fn_stack", [])] for node in (mine, other)
        ]
        assert sources[0] == sources[1]
    assert "fused_resnet" in str(exported(fused, x, strict=strict).graph)


def test_unfused_passes():
    """Eager's bits, in eight bits too, and from plans back to them."""
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    with torch.inference_mode():
        before = [fused(x) for _ in range(3)][-1]
        with fused_resnet.unfused():
            with fused_resnet.unfused():
                pass
            assert_same_bits(fused(x), eager(x))
            features = torch.ones(1, 64, 8, 8)
            assert_same_bits(fused.layer1(features), eager.layer1(features))
        assert_same_bits(fused(x), before)
        fused_resnet.quantize(fused, [x])
        with fused_resnet.unfused():
            assert_same_bits(fused(x), eager(x))


def onnx_session(program_or_model, x, **keywords):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    with torch.no_grad():
        program = torch.onnx.export(program_or_model, (x,), dynamo=True, verbose=False, **keywords)
    program.save(file)
    model = program.model_proto
    assert {node.domain for node in model.graph.node} <= {""}
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return session, collections.Counter(node.op_type for node in model.graph.node)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["the model", "its program"])
def test_onnx(way):
    """Both from the module, which runs unfused while it is exported, and from a program."""
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40).contiguous()
    leaving = fused if way == "the model" else decomposed(exported(fused, x))
    session, counts = onnx_session(leaving, x)
    assert counts["Conv"] == 17
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert_error_rule(torch.from_numpy(out), eager(x), double_copy(eager)(x.double()), 3.0)


@pytest.mark.filterwarnings("ignore")
def test_onnx_in_eight_bits():
    """Quantize and dequantize nodes, which onnxruntime runs in integers."""
    eager = small_resnet(BLOCKS["basic"])
    x = image_batch(4, 40).contiguous()
    fused = fused_resnet.quantize(fused_resnet.fuse(copy.deepcopy(eager)), [x])
    session, counts = onnx_session(decomposed(exported(fused, x)), x)
    assert counts["QuantizeLinear"] >= 10
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        exact = double_copy(eager)(x.double())
        error = relative_error(fused(x), exact)
    assert relative_error(torch.from_numpy(out), exact) < 1.5 * error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["the model", "its program"])
def test_openvino(way):
    openvino = pytest.importorskip("openvino")
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40).contiguous()
    if way == "the model":
        converted = openvino.convert_model(fused, example_input=x)
    else:
        converted = openvino.convert_model(decomposed(exported(fused, x)))
    out = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())
    with torch.no_grad():
        expected = double_copy(eager)(x.double())
        assert_error_rule(torch.from_numpy(out[0]), eager(x), expected, 3.0)


@pytest.mark.filterwarnings("ignore")
def test_executorch():
    exir = pytest.importorskip("executorch.exir")
    runtime = pytest.importorskip("executorch.runtime")
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(1, 40).contiguous()
    edge = exir.to_edge(decomposed(exported(fused, x)))
    assert not any("fused_resnet" in name for name in operators(edge.exported_program()))
    program = runtime.Runtime.get().load_program(edge.to_executorch().buffer)
    (out,) = program.load_method("forward").execute([x])
    with torch.no_grad():
        expected = double_copy(eager)(x.double())
        assert_error_rule(out, eager(x), expected, 3.0)


def test_a_program_that_needs_nothing_of_ours(tmp_path):
    """Saved, and run by a process without this package."""
    eager = small_resnet(BLOCKS["basic"])
    x = image_batch(2, 40)
    program = decomposed(exported(fused_resnet.fuse(copy.deepcopy(eager)), x))
    torch.export.save(program, tmp_path / "program.pt2")
    with torch.no_grad():
        torch.save((x, eager(x)), tmp_path / "tensors.pt")
    code = f"""
        import sys
        import torch
        x, expected = torch.load({str(tmp_path / "tensors.pt")!r})
        program = torch.export.load({str(tmp_path / "program.pt2")!r})
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
        print("fused_resnet" in sys.modules)
    """
    assert run_python(code) == "False\n"


# ---- graphs of fused models ----


def test_unflattened_programs():
    """The modules of an exported program, with the fused operator among them."""
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    program = exported(fused, x)
    module = torch.export.unflatten(program)
    targets = {
        str(node.target)
        for inside in module.modules()
        for node in getattr(getattr(inside, "graph", None), "nodes", ())
    }
    assert any("fused_resnet.residual_blocks" in target for target in targets)
    assert set(module.state_dict()) == set(eager.state_dict())
    with torch.no_grad():
        assert_error_rule(module(x), eager(x), double_copy(eager)(x.double()))


def test_unflattened_modules_that_are_kept():
    """Named stages are called, and can be put in another's place."""
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    kept = ("layer1", "layer2", "layer3.0")
    program = exported(fused, x, preserve_module_call_signature=kept, strict=False)
    assert any("fused_resnet" in name for name in operators(program))
    module = torch.export.unflatten(program)
    seen = []
    for path in kept:
        inside = module.get_submodule(path)
        inside.register_forward_hook(lambda m, a, out, path=path: seen.append(path))
    with torch.no_grad():
        assert_error_rule(module(x), eager(x), double_copy(eager)(x.double()))
        module.set_submodule("layer2", fused.layer2)
        assert_error_rule(module(x), eager(x), double_copy(eager)(x.double()))
    assert seen[:3] == list(kept)


def test_blocks_that_their_owner_compiled():
    """`block.compile()` reaches the compiler it names, alone and inside the network.

    As unfused: the compilers of some torches leave a module of torch's own, such as conv2, alone.
    """
    eager = small_resnet()
    fused, unfused = fused_resnet.fuse(copy.deepcopy(eager)), copy.deepcopy(eager)
    graphs = {fused: 0, unfused: 0}
    runs = []

    def backend_of(model):
        def backend(module, inputs):
            graphs[model] += 1

            def run(*arguments):
                runs.append(model)
                return module.forward(*arguments)

            return run

        return backend

    torch._dynamo.reset()
    x = image_batch(2, 40)
    with torch.no_grad():
        for _ in range(3):  # so that there would be a plan
            fused(x)
        fused.layer1[0].compile(backend=backend_of(fused))
        for _ in range(3):
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))
        assert graphs[fused] == 1
        assert len(runs) == 3  # and no plan went past it
        unfused.layer1[0].compile(backend=backend_of(unfused))
        for model in (fused, unfused):
            model.layer2.compile(backend=backend_of(model))
            model.layer3[0].conv2.compile(backend=backend_of(model))
        for _ in range(3):
            assert_error_rule(fused(x), unfused(x), double_copy(eager)(x.double()))
    assert graphs[fused] == graphs[unfused] >= 2
    assert runs.count(fused) == 3 + runs.count(unfused)
    reasons = {record.path: record.reason for record in fused_resnet.report(fused)}
    assert reasons["layer3.0"] == "conv2 is compiled by itself"
    assert reasons["layer1.0"] == ""
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["conv1", "bn2", "relu"])
def test_compiled_parts_in_training(part):
    """Each by itself keeps its block from running as one: it is compiled as unfused.

    The compilers of some torches leave a module of torch's own alone.
    """
    graphs = {}
    for name, change in (("eager", lambda model: model), ("fused", fused_resnet.fuse)):
        model = change(small_resnet(stages=2)).train()
        seen = graphs[name] = []

        def backend(module, inputs, seen=seen):
            seen.append(module)
            return module.forward

        torch._dynamo.reset()
        model.layer1[0].get_submodule(part).compile(backend=backend)
        model(image_batch(2, 40)).sum().backward()
    assert len(graphs["fused"]) == len(graphs["eager"])
    torch._dynamo.reset()
