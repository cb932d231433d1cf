"""The registered operators: opcheck on each, fake kernels, dispatch."""

import itertools
import threading

import pytest
import torch
from support import (
    DTYPES,
    STEM_POOL,
    ConvShape,
    assert_same_bits,
    assert_within_bound,
    dtype_id,
    image_batch,
    make_conv_case,
    make_norm_conv_case,
    run_python,
    small_resnet,
)
from torch.utils._pytree import tree_map_only

import fused_resnet
from fused_resnet import backends
from fused_resnet.layers.description import Norm, SqueezeExcitation, Sums

NAMESPACE = "fused_resnet"
# Native operators that only a backend calls, on plain tensors, below autograd and tracing.
INTERNAL = {
    "batch_norm_act_backward",
    "batch_norm_act_backward_input",
    "batch_norm_act_backward_sums",
    "batch_statistics",
    "begin_cpu_plan",
    "conv_bn_act_packed",
    "conv_input_gradient",
    "conv_training",
    "conv_weight_gradient",
    "conv_weight_is_packed",
    "discard_cpu_plan",
    "end_cpu_plan",
    "free_cpu_plan",
    "free_launch_plan",
    "free_module_guard",
    "make_launch_plan",
    "make_module_guard",
    "max_pool_gradient",
    "norm_conv_bn_act_packed",
    "norm_vectors",
    "normalize_act",
    "normalize_act_backward",
    "pack_conv_weight",
    "pack_quantized_conv",
    "pool_empty_like",
    "pool_linear",
    "quantized_copies_match",
    "quantized_kernels",
    "quantized_pool_linear",
    "quantized_residual_blocks_packed",
    "quantized_stem_packed",
    "residual_blocks_packed",
    "run_cpu_plan",
    "run_launch_plan",
    "squeeze_excitation",
    "train_batch_norm_act",
}
# Those of them that no backend's function calls: tested in test_on_stub.py, test_copies.py and
# test_plans.py.
ELSEWHERE = {
    "begin_cpu_plan",
    "discard_cpu_plan",
    "end_cpu_plan",
    "free_cpu_plan",
    "free_launch_plan",
    "free_module_guard",
    "make_launch_plan",
    "make_module_guard",
    "quantized_copies_match",
    "run_cpu_plan",
    "run_launch_plan",
}
# Those that stand for a backend's kernels in a compiler's graph: tested in test_triton.py.
IN_GRAPHS = {"triton_conv_bn_act", "triton_conv_bn_act_max_pool"}
# The CUDA backend's own: tested in test_cuda_conv.py, test_cuda_batch_norm.py,
# test_cuda_basic_block.py, test_cuda_quantized.py, test_cuda_stem.py, test_cuda_plans.py,
# test_hopper_conv.py and test_hopper_bottleneck.py.
CUDA = {
    "basic_block_tiled",
    "basic_block_tiles",
    "batch_norm_backward_in_one_launch",
    "batch_norm_fits_cluster",
    "batch_norm_gradient_sums",
    "batch_norm_in_one_launch",
    "batch_norm_input_gradient",
    "batch_norm_normalize",
    "batch_norm_statistics",
    "begin_cuda_recording",
    "byte_blocks",
    "byte_conv_tiles",
    "byte_stem",
    "conv_bn_act_tiled",
    "conv_tiles",
    "conv_tiles_for",
    "driver_function",
    "end_cuda_recording",
    "free_cuda_plan",
    "hopper_bottleneck",
    "hopper_bottleneck_tiles",
    "hopper_conv_bn_act",
    "hopper_conv_tiles",
    "make_cuda_plan",
    "max_pool_channels_last",
    "run_cuda_plan",
    "stem_max_pool",
    "stem_rows_each",
}
# Those without tensors.
QUERIES = {
    "conv_isa",
    "conv_pair_isa",
    "conv_tile_isa",
    "cpu_isa",
    "cpu_pool_statistics",
    "cpu_pool_trim",
    "float32_pixels_for_tiles",
    "multiply_tiles",
    "set_float32_products",
    "tiles_for_winograd",
}


def operators():
    """Every operator registered under our namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.partition("::")[2] for n in names if n.startswith(f"{NAMESPACE}::")})


def conv_arguments(case, pool=None):
    pair = lambda v: [v, v] if isinstance(v, int) else list(v)  # noqa: E731
    arguments = [
        case.input,
        case.weight,
        case.running_mean,
        case.running_var,
        case.bn_weight,
        case.bn_bias,
        case.eps,
        case.bias,
        pair(case.stride),
        pair(case.padding),
        pair(case.dilation),
        case.groups,
    ]
    if pool is None:
        return (*arguments, case.residual, case.activation)
    return (
        *arguments,
        case.activation,
        *(pair(pool[n]) for n in ("kernel_size", "stride", "padding")),
    )


def require_grad(arguments, indices):
    return tuple(
        a.requires_grad_() if i in indices and isinstance(a, torch.Tensor) else a
        for i, a in enumerate(arguments)
    )


def conv_samples(device, dtype, pool=None):
    for shape, residual, bias, grad, memory_format in [
        (ConvShape(8, 12, (1, 1)), True, False, True, torch.channels_last),
        (
            ConvShape(8, 8, (3, 3), (2, 2), (1, 1), (1, 1), 2),
            False,
            True,
            True,
            torch.contiguous_format,
        ),
        (ConvShape(3, 16, (7, 7), (2, 2), (3, 3)), False, False, False, torch.channels_last),
    ]:
        case = make_conv_case(
            shape,
            size=(9, 10),
            dtype=dtype,
            residual=residual,
            bias=bias,
            memory_format=memory_format,
            pool=pool,
            device=device,
        )
        arguments = conv_arguments(case, pool)
        yield require_grad(arguments, {0, 1, 4, 5, 7, 12} if grad else set())


def norm_conv_samples(device, dtype):
    for input, *rest in conv_samples(device, dtype):
        like = rest[1]
        grad = input.requires_grad
        mean, var, weight, bias = torch.rand(4, input.size(1)).add(0.5).to(like).unbind(0)
        norm = (mean.clone(), var.clone(), weight.clone(), bias.clone(), 1e-3)
        yield (input, *require_grad(norm, {2, 3} if grad else set()), *rest)


def batch_norm_samples(device, dtype, training):
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for affine, residual, grad in itertools.product([True, False], repeat=3):
        x = torch.randn(3, 6, 5, 4, device=device).to(dtype).to(memory_format=torch.channels_last)
        weight = torch.rand(6, device=device, dtype=parameter_dtype) + 0.5 if affine else None
        bias = torch.randn(6, device=device, dtype=parameter_dtype) if affine else None
        z = torch.randn(3, 6, 5, 4, device=device).to(dtype) if residual else None
        statistics = [] if training else [torch.zeros(6), torch.ones(6)]
        statistics = [s.to(device, parameter_dtype) for s in statistics]
        arguments = (x, *statistics, weight, bias, 1e-5, z, "relu")
        skip = len(statistics)
        indices = {0, 1 + skip, 2 + skip, 4 + skip}
        yield require_grad(arguments, indices if grad else set())


def block_samples(device, dtype):
    """Two blocks: one with a projection, then one without affine parameters, with biases."""
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(12, 8, 3, 3), (12, 12, 3, 3), (12, 8, 1, 1), (16, 6, 3, 3), (12, 16, 1, 1)]
    strides, paddings, groups = [2, 1, 2, 1, 1], [1, 1, 0, 1, 0], [1, 1, 1, 2, 1]
    for grad, memory_format in [(True, torch.channels_last), (False, torch.contiguous_format)]:
        x = torch.randn(3, 8, 9, 7, device=device).to(dtype).to(memory_format=memory_format)
        tensors = []
        for i, shape in enumerate(shapes):
            K = shape[0]
            weight = torch.randn(shape, device=device).to(dtype).requires_grad_(grad)
            mean = torch.zeros(K, device=device, dtype=parameter_dtype)
            affine = torch.rand(K, device=device, dtype=parameter_dtype) if i < 3 else None
            bias = torch.randn(K, device=device).to(dtype).requires_grad_(grad) if i > 2 else None
            tensors += [weight, mean, torch.ones_like(mean), affine, affine, bias]
        numbers = []
        for stride, padding, group_count in zip(strides, paddings, groups, strict=True):
            numbers += [stride, stride, padding, padding, 1, 1, group_count]
        yield (x.requires_grad_(grad), tensors, numbers, [1e-5] * 5, [3, 2], [True, False])


def int8_samples(device, dtype):
    """These blocks in eight bits; the first one's input has a zero point."""
    for arguments in block_samples(device, dtype):
        steps = [0.03, 0.05, 0.06, 0.06, 0.07, 0.08]
        yield (*arguments, steps, [120, 0, 0, 0, 0, 0])


def stem_samples(device, dtype):
    """A convolution of 7x7 with its pool, in eight and in sixteen bits."""
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 3, 19, 17, device=device).to(dtype)
    weight = torch.randn(8, 3, 7, 7, device=device).to(dtype)
    mean = torch.zeros(8, device=device, dtype=parameter_dtype)
    layer = (weight, mean, torch.ones_like(mean), torch.ones_like(mean), None, 1e-5, None)
    numbers = ([2, 2], [3, 3], [1, 1], 1, [3, 3], [2, 2], [1, 1])
    yield (x, *layer, *numbers, 8, 0.03, 120, 0.2)
    yield (x, *layer, *numbers, 16, 1e-4, 128, 0.2)


def quantized_samples(device, dtype):
    """A block with a projection, then one without."""
    shapes = [(12, 8, 3, 3), (12, 12, 3, 3), (12, 8, 1, 1), (16, 6, 3, 3), (12, 16, 1, 1)]
    tensors, numbers = [], []
    for shape, stride, groups in zip(shapes, [2, 1, 2, 1, 1], [1, 1, 1, 2, 1], strict=True):
        weight = torch.randint(-127, 128, shape, device=device, dtype=torch.int8)
        scale, shift = torch.rand(2, shape[0], device=device) * 1e-3
        tensors += [weight, scale, shift]
        padding = shape[2] // 2
        numbers += [stride, stride, padding, padding, 1, 1, groups]
    x = torch.randn(3, 8, 9, 7, device=device).to(dtype)
    yield (x, tensors, numbers, [3, 2], [True, False], [1.0, 0.7], 0.03, 120, 0.05)


def training_samples(name, device, dtype):
    """The same two blocks one by one, and the first convolution as a stem; or their backward."""
    for i, (x, tensors, numbers, eps, *_) in enumerate(block_samples(device, dtype)):
        parameters = [tensors[6 * k + j] for k in range(len(eps)) for j in (0, 5, 3, 4)]
        if name.startswith("stem"):
            arguments = (x, parameters[:4], numbers[:7], eps[0], [3, 3, 2, 2, 1, 1])
        elif i == 0:
            arguments = (x, parameters[:12], numbers[:21], eps[:3], True, True)
        else:
            x = torch.randn(3, 12, 9, 7, device=device).to(dtype).requires_grad_(x.requires_grad)
            arguments = (x, parameters[12:], numbers[21:], eps[3:], False, True)
        if not name.endswith("_backward"):
            yield arguments
            continue
        x, parameters, *description = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        forward = getattr(torch.ops.fused_resnet, name.removesuffix("_backward")).default
        output, *kept = forward(x, parameters, *description)
        need = [i != 1, *(parameter is not None for parameter in parameters)]
        leading = (x, output) if name.startswith("block") else (x,)
        grad = torch.randn(output.shape, device=device).to(dtype)
        yield (grad, *leading, parameters, kept, need, *description)


def head_samples(device, dtype):
    dtype = torch.float32 if dtype == torch.float64 else dtype
    for bias in (True, False):
        x = torch.randn(2, 6, 5, 4, device=device).to(dtype)
        weight = torch.randn(7, 6, device=device).to(dtype)
        yield (x, weight, torch.randn(7, device=device).to(dtype) if bias else None, 0.02, 0.01)


def scale_shift_samples(device, dtype):
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for residual, activation in itertools.product([True, False], ["relu", "none"]):
        x = torch.randn(2, 6, 5, 4, device=device).to(dtype)
        scale, shift = torch.randn(2, 6, device=device, dtype=parameter_dtype).unbind(0)
        z = torch.randn(2, 6, 5, 4, device=device).to(dtype) if residual else None
        yield (x, scale.clone(), shift.clone(), z, activation)


def samples(name, device, dtype):
    if name == "conv_bn_act":
        return conv_samples(device, dtype)
    if name == "conv_bn_act_max_pool":
        return conv_samples(device, dtype, STEM_POOL)
    if name == "norm_conv_bn_act":
        return norm_conv_samples(device, dtype)
    if name == "batch_norm_act_training":
        return batch_norm_samples(device, dtype, True)
    if name == "batch_norm_act_inference":
        return batch_norm_samples(device, dtype, False)
    if name.startswith(("block_training", "stem_training")):
        return training_samples(name, device, dtype)
    if name == "residual_blocks":
        return block_samples(device, dtype)
    if name == "residual_blocks_int8":
        return int8_samples(device, dtype)
    if name == "residual_blocks_float8":
        return ((*sample[:-1],) for sample in int8_samples(device, dtype))  # without zero points
    if name == "conv_bn_act_max_pool_int8":
        return stem_samples(device, dtype)
    if name == "pool_linear_int8":
        return head_samples(device, dtype)
    if name == "quantized_residual_blocks":
        return quantized_samples(device, dtype)
    if name == "scale_shift_act":
        return scale_shift_samples(device, dtype)
    raise KeyError(name)


@pytest.mark.parametrize("name", sorted(set(operators()) - INTERNAL - IN_GRAPHS - CUDA - QUERIES))
def test_every_operator_has_samples(name):
    """A new operator fails here until it is given samples for opcheck."""
    assert list(samples(name, "cpu", torch.float32))


WHOLE = [
    "block_training",
    "block_training_backward",
    "residual_blocks",
    "stem_training",
    "stem_training_backward",
]
SINGLE = [
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "norm_conv_bn_act",
    "batch_norm_act_training",
    "batch_norm_act_inference",
    "scale_shift_act",
]
PUBLIC = SINGLE + WHOLE


@pytest.mark.whole
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("name", SINGLE)
def test_opcheck(backend, name, dtype):
    """Schema, autograd registration, fake kernel and AOT dispatch with dynamic shapes.

    A trace, a second each, is of what backends share: one has them in every dtype.
    """
    operator = getattr(torch.ops.fused_resnet, name).default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if backend.name == "cpu" or dtype is torch.float32:
        tests.append("test_aot_dispatch_dynamic")
    for arguments in samples(name, backend.device, dtype):
        torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("name", PUBLIC)
def test_opcheck_quick(request, backend, name):
    """AOT dispatch, a second a trace, over two backends unless it is the whole suite."""
    operator = getattr(torch.ops.fused_resnet, name).default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if backend.name in ("reference", "cpu") or request.config.option.whole:
        tests.append("test_aot_dispatch_dynamic")
    arguments = next(iter(samples(name, backend.device, torch.float32)))
    torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", PUBLIC)
def test_fake_kernels_predict_shape_dtype_and_strides(backend, name, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    operator = getattr(torch.ops.fused_resnet, name).default
    for arguments in samples(name, backend.device, dtype):
        with torch.no_grad():
            real = operator(*arguments)
        with FakeTensorMode() as mode, torch.no_grad():
            fake = operator(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        real, fake = (r if isinstance(r, (tuple, list)) else (r,) for r in (real, fake))
        assert len(real) == len(fake)
        for ours, predicted in zip(real, fake, strict=True):
            assert predicted.shape == ours.shape
            assert predicted.dtype == ours.dtype
            assert predicted.device == ours.device
            assert predicted.stride() == ours.stride()


def test_meta_tensors(backend):
    for name in PUBLIC:
        operator = getattr(torch.ops.fused_resnet, name).default
        arguments = next(iter(samples(name, "cpu", torch.float32)))
        out = operator(*tree_map_only(torch.Tensor, lambda a: a.to("meta"), arguments))
        out = out[0] if isinstance(out, (tuple, list)) else out
        assert out.device.type == "meta"


@pytest.mark.parametrize("name", PUBLIC)
def test_schemas_alias_nothing(name):
    """Functional operators: no argument is written to, no output is a view."""
    schema = getattr(torch.ops.fused_resnet, name).default._schema
    assert not schema.is_mutable
    assert all(r.alias_info is None for r in schema.returns)


@pytest.mark.parametrize("pool", [None, STEM_POOL], ids=["", "pool"])
def test_the_operator_and_the_function_agree(backend, pool):
    """Called through the dispatcher or through functional.py: the same kernel, the same bits."""
    operators = torch.ops.fused_resnet
    operator = (operators.conv_bn_act_max_pool if pool else operators.conv_bn_act).default
    case = make_conv_case(
        ConvShape(16, 24, (3, 3), (1, 1), (1, 1)), pool=pool, device=backend.device
    )
    assert_same_bits(case.fused(), operator(*conv_arguments(case, pool)))


@pytest.fixture(scope="module")
def internal_calls():
    """Of each operator that the CPU backend calls while models run, the arguments of some calls."""
    calls = {name: [] for name in sorted(INTERNAL - ELSEWHERE)}

    def recorder(name):
        operator = getattr(torch.ops.fused_resnet, name).default

        def record(*arguments):
            if len(calls[name]) < 8:
                calls[name].append(arguments)
            return operator(*arguments)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(backends.cpu.operators, name, recorder(name))
        run_all_that_the_cpu_has()
    return calls


def run_all_that_the_cpu_has():
    model = fused_resnet.fuse(small_resnet(layers=2))
    with torch.no_grad():
        model(image_batch(2, 40))
        model.train()(image_batch(4, 40))
        model.eval()
        watched = fused_resnet.fuse(small_resnet(layers=2), watch="full").eval()
        watched(watched_input := image_batch(2, 40))
        watched(watched_input)
        images = [image_batch(2, 40)]
        fused_resnet.quantize(model, images, classifier="int8")(image_batch(2, 40))
        fused_resnet.dequantize(model)
        backends.cpu.explain("quantized_residual_blocks", dtype=torch.float32)
        make_conv_case(ConvShape(16, 24, (3, 3))).fused()
        weights = (torch.randn(4, 8, 1, 1), None, torch.randn(8, 4, 1, 1), torch.randn(8))
        factors = SqueezeExcitation(*weights, "silu", "sigmoid")
        backends.cpu.squeeze_excitation(torch.randn(2, 8, 5, 5), factors)
        make_norm_conv_case(ConvShape(16, 24, (3, 3))).fused()
    model.train()(image_batch(4, 40)).sum().backward()
    train_on_shared_statistics()
    train_a_convolution()
    train_with_another_activation()


@pytest.mark.parametrize("name", sorted(INTERNAL - ELSEWHERE))
def test_internal_operators_keep_to_their_schemas(internal_calls, name):
    """What the CPU backend calls while a model runs writes to and aliases nothing it should not."""
    if name == "conv_weight_gradient" and torch.float32 not in backends.cpu.isa.TRAINED_ON_UNIT:
        assert not internal_calls[name]
        pytest.skip("no AMX: the gradients in weights of float32 are the library's")
    assert internal_calls[name]
    operator = getattr(torch.ops.fused_resnet, name).default
    for arguments in internal_calls[name]:
        torch.library.opcheck(operator, arguments, test_utils=["test_schema"])


def train_with_another_activation():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    layer = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.SiLU())
    layer = fused_resnet.fuse(layer.train())
    layer(x).sum().backward()


def train_on_shared_statistics():
    """The passes of training as processes call them that share a batch."""
    x = image_batch(2, 8)
    mean, var = backends.cpu.batch_statistics(x)
    arguments = (x, x, x, Norm(mean, var, None, None, 1e-5), "relu")
    total, dot = backends.cpu.batch_norm_act_backward_sums(*arguments)
    sums = Sums(total, dot, x.numel() // 3)
    backends.cpu.batch_norm_act_backward_input(*arguments, sums, True)


def train_a_convolution():
    """As the CPU backend does where there are tiles."""
    x, weight = image_batch(2, 8), torch.randn(16, 3, 3, 3)
    norm = Norm(torch.zeros(3), torch.ones(3), None, None, 1e-5)
    one = (1, 1)
    geometry = (*one, *one, *one, 1)
    for before in ((None, None, None, None, 0.0), norm):
        backends.cpu.operators.conv_training(x, weight, None, *geometry, *before, True)


@pytest.mark.quick
def test_available_lists_every_backend():
    states = backends.available()
    assert set(states) == {"reference", "cpu", "triton", "cuda"}
    assert states["reference"] == states["cpu"] == "yes"
    assert all(isinstance(state, str) and state for state in states.values())


@pytest.mark.quick
def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError) as raised, fused_resnet.use_backend("tpu"):
        pass
    for word in ("tpu", *backends.available()):
        assert word in str(raised.value)


def test_an_unavailable_backend_says_why():
    for name, state in backends.available().items():
        if state != "yes":
            with pytest.raises(ValueError) as raised, fused_resnet.use_backend(name):
                pass
            assert name in str(raised.value)
            assert state in str(raised.value)


@pytest.mark.quick
def test_use_backend_nests_and_restores():
    seen = lambda: backends.choose("cpu").name  # noqa: E731
    default = seen()
    assert default == "cpu"
    with fused_resnet.use_backend("reference"):
        assert seen() == "reference"
        with fused_resnet.use_backend("cpu"):
            assert seen() == "cpu"
        assert seen() == "reference"
    assert seen() == default
    with pytest.raises(KeyError), fused_resnet.use_backend("reference"):
        raise KeyError
    assert seen() == default


def test_use_backend_is_per_thread():
    seen = []
    with fused_resnet.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.choose("cpu").name))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_backends_really_differ():
    """`use_backend` changes what runs: the reference's operators show in the profile."""
    case = make_conv_case(ConvShape(32, 32, (3, 3), (1, 1), (1, 1)))
    names = {}
    for name in ("reference", "cpu"):
        with (
            fused_resnet.use_backend(name),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            case.fused()
        names[name] = {event.key for event in profile.key_averages()}
    assert "aten::batch_norm" in names["reference"]
    assert "aten::batch_norm" not in names["cpu"]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_environment_variable(name):
    code = """
        from fused_resnet import backends
        print(backends.choose("cpu").name)
        """
    assert run_python(code, FUSED_RESNET_BACKEND=name).strip() == name


@pytest.mark.ahead(
    lambda: run_python(
        """
        import fused_resnet, support, torch
        try:
            support.make_conv_case(support.ConvShape(4, 4, (1, 1))).fused()
        except ValueError as error:
            print(error)
        """,
        FUSED_RESNET_BACKEND="abacus",
    )
)
def test_a_wrong_environment_variable(ahead):
    for word in ("FUSED_RESNET_BACKEND", "abacus", "reference", "cpu"):
        assert word in ahead()


def test_backends_agree():
    """The two backends of this machine, each within its rounding bound of the other's result."""
    case = make_conv_case(ConvShape(32, 32, (3, 3), (1, 1), (1, 1)))
    with fused_resnet.use_backend("reference"):
        expected = case.fused()
    with fused_resnet.use_backend("cpu"):
        assert_within_bound(case.fused(), expected.double(), 2 * case.rounding_bound())
