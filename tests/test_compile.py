"""What the compiler sees: schemas, fake kernels, graphs without breaks, export, flop counts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from calls import OPS, call
from cases import BY_NAME, CASES, DTYPES, FEW, Case
from checks import for_each
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS
from reference import error, four_sided, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import conv2d_ext

OPCHECK_CASES = tuple(
    BY_NAME[name] for name in ("3x3", "four_pads_grouped_dilated", "depthwise_multiplier2", "C0", "N0", "1x1_stride2")
)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> None:
    if "torch._dynamo" in sys.modules:  # to import it takes seconds, and fake tensors do without
        torch._dynamo.reset()


OPCHECKS = [
    *((case, "nchw", torch.float32) for case in OPCHECK_CASES),
    *((BY_NAME["3x3"], layout, torch.float32) for layout in ("nhwc", "nhwc_weight", "sliced")),
    (BY_NAME["3x3"], "nhwc", torch.bfloat16),
]


@pytest.mark.parametrize("case,layout,dtype", OPCHECKS, ids=str)
def test_opcheck_passes_on_conv2d(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    x, w, b = case.tensors(device, dtype, layout)
    torch.library.opcheck(torch.ops.conv2d_ext.conv2d.default, (x, w, b, *case.args))
    leaves = [t.requires_grad_() if t is not None else None for t in (x, w, b)]
    torch.library.opcheck(torch.ops.conv2d_ext.conv2d.default, (*leaves, *case.args), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_passes_on_the_raw_operators(case: Case, layout: str, op: str, device: str) -> None:
    x, w, b = case.tensors(device, layout=layout)
    go = case.grad_output(device, layout=layout)
    arguments = {
        "fprop": (x, w, b, *case.args),
        "dgrad": (go, w, case.input_size, *case.args),
        "wgrad": (go, x, case.weight_size, None, *case.args),
    }[op]
    torch.library.opcheck(getattr(torch.ops.conv2d_ext, op).default, arguments)


def test_the_schemas_are_the_documented_ones() -> None:
    """Saved programs name these; a change breaks them."""
    conv2d = str(torch.ops.conv2d_ext.conv2d.default._schema)
    assert conv2d.startswith(
        "conv2d_ext::conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=[1, 1], "
        "SymInt[2] padding=[0, 0], SymInt[2] dilation=[1, 1], SymInt groups=1, *, "
    )
    for op in ("conv2d", *OPS):
        schema = getattr(torch.ops.conv2d_ext, op).default._schema
        assert not schema.is_mutable and len(schema.returns) == 1
        assert {a.name for a in schema.arguments if a.kwarg_only} == {"allow_tf32", "row"}


def described(t: Tensor | None) -> Tensor | None:
    """A meta tensor of the same sizes and strides: an operator's fake kernel is also that of meta tensors."""
    return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


# Strides follow from which sizes are one or zero and from the operands' strides, not from how large the sizes are.
@pytest.mark.parametrize("case", [case for case in CASES if not case.large], ids=str)
@for_each(dtype=(torch.float32, torch.float64, torch.float16), layout=LAYOUTS)
def test_the_fake_result_has_the_shape_and_strides_of_the_real_one(
    case: Case, layout: str, dtype: torch.dtype, device: str
) -> None:
    tensors = (*case.tensors(device, dtype, layout), case.grad_output(device, dtype, layout))
    for op in OPS:
        real, imagined = call(op, case, *tensors)(), call(op, case, *map(described, tensors))()
        assert imagined.shape == real.shape, op
        assert imagined.stride() == real.stride(), op
        assert imagined.dtype == real.dtype, op


@pytest.mark.parametrize("case", FEW, ids=str)
@for_each(dtype=(torch.float32, torch.float64, torch.float16), layout=LAYOUTS)
def test_the_result_of_fake_tensors_is_that_of_meta_tensors_on_their_device(
    case: Case, layout: str, dtype: torch.dtype, device: str
) -> None:
    """A fake tensor takes ten times as long to make as a call."""
    tensors = (*case.tensors(device, dtype, layout), case.grad_output(device, dtype, layout))
    for op in OPS:
        meta = call(op, case, *map(described, tensors))()
        with FakeTensorMode() as mode:
            imagined = call(op, case, *(None if t is None else mode.from_tensor(t) for t in tensors))()
        assert imagined.shape == meta.shape and imagined.stride() == meta.stride(), op
        assert imagined.dtype == dtype and imagined.device.type == device, op


DIMENSION = st.integers(0, 4)
STRIDE = st.one_of(st.integers(0, 40), st.sampled_from([1, 2, 3, 4, 8, 12, 16, 24, 36, 48, 64]))


@given(
    sizes=st.tuples(*[DIMENSION] * 3, st.integers(1, 3), st.integers(1, 3), DIMENSION, DIMENSION),
    strides=st.tuples(*[st.one_of(st.none(), st.permutations(range(4)), st.tuples(*[STRIDE] * 4))] * 3),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(OPS),
)
def test_the_fake_strides_are_the_real_ones_for_any_strides(
    sizes: tuple[int, ...],
    strides: tuple[object, ...],
    dtype: torch.dtype,
    op: str,
    device: str,
) -> None:
    """Arbitrary strides, also of dimensions of size one and zero, where the guess of channels_last goes astray."""
    n, c, k, r, s, dh, dw = sizes
    case = Case("any", n, c, r + dh, s + dw, k, r, s)

    def tensor(size: tuple[int, ...], how: object) -> Tensor:
        if how is None:
            return torch.zeros(size, dtype=dtype, device=device)
        if isinstance(how, list):  # a permutation of dense dimensions
            t = torch.zeros([size[d] for d in how], dtype=dtype, device=device)
            return t.permute([how.index(d) for d in range(4)])
        return torch.zeros(1000, dtype=dtype, device=device).as_strided(size, how)  # type: ignore[arg-type]

    x, w, y = (
        tensor(z, h) for z, h in zip((case.input_size, case.weight_size, case.output_size), strides, strict=True)
    )
    real = call(op, case, x, w, None, y)()
    with FakeTensorMode() as mode:
        x, w, y = (mode.from_tensor(t) for t in (x, w, y))
        imagined = call(op, case, x, w, None, y)()
    assert (imagined.shape, imagined.stride(), imagined.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("nchw", "nhwc", "nhwc_input", "nhwc_weight"))
def test_the_memory_format_follows_torchs_rule(layout: str, dtype: torch.dtype, device: str) -> None:
    """channels_last if the input or the weight is, and never for double."""
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device, dtype, layout)
    y = conv2d_ext.conv2d(x, w, b, *case.args)
    last = layout != "nchw" and dtype != torch.float64
    assert y.is_contiguous(memory_format=torch.channels_last) == last
    assert y.is_contiguous() == (not last)
    if dtype == torch.float32:
        assert y.stride() == four_sided(x, w, b, *case.args).stride()


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_meta_tensors_give_a_meta_result(layout: str) -> None:
    for case in CASES:
        x, w, b = (None if t is None else t.to("meta") for t in case.tensors(layout=layout))
        y = conv2d_ext.conv2d(x, w, b, *case.args)
        assert y.is_meta and tuple(y.shape) == case.output_size


def test_gradients_flow_through_meta_tensors() -> None:
    """Shape and memory estimates of a whole training step run on meta tensors."""
    case = BY_NAME["groups2"]
    x, w, b = (t.to("meta").requires_grad_() for t in case.tensors())
    conv2d_ext.conv2d(x, w, b, *case.args).sum().backward()
    assert x.grad.is_meta and tuple(w.grad.shape) == case.weight_size and tuple(b.grad.shape) == (case.K,)


class Block(torch.nn.Module):
    """Two convolutions of this package with something between them for a compiler to fuse."""

    def __init__(self, layer: type[torch.nn.Conv2d] = conv2d_ext.Conv2d) -> None:
        super().__init__()
        self.first = layer(3, 8, 3, padding=1, stride=2)
        self.second = layer(8, 12, 3, padding="same", groups=4, bias=False, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).tanh()


def step(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of its squared sum."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *parameters])]


@pytest.mark.parametrize("backend", ("eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_a_compiled_module_has_the_outputs_and_gradients_of_the_eager_one(
    memory_format: torch.memory_format, backend: str, device: str
) -> None:
    if backend == "inductor" and memory_format == torch.channels_last and device == "cpu":
        pytest.skip("one compilation by Inductor is enough on a CPU: it takes a minute")
    block = Block().to(device, memory_format=memory_format)
    x = torch.randn(4, 3, 12, 10, device=device).to(memory_format=memory_format)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for ours, theirs in zip(
        step(compiled, x, list(block.parameters())), step(block, x, list(block.parameters())), strict=True
    ):
        assert error(ours, theirs) <= 1e-5


@pytest.mark.slow
def test_the_graphs_of_a_compiled_module_replay_on_new_values(cuda: str) -> None:
    """`mode="reduce-overhead"`: one call to warm up, one that captures CUDA graphs, two that replay them."""
    from torch._dynamo.utils import counters

    block = Block().to(cuda, memory_format=torch.channels_last)
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    counters.clear()
    for _ in range(4):
        x = torch.randn(4, 3, 12, 10, device=cuda).to(memory_format=torch.channels_last)
        torch.compiler.cudagraph_mark_step_begin()
        ours = [t.clone() for t in step(compiled, x, list(block.parameters()))]
        for found, expected in zip(ours, step(block, x, list(block.parameters())), strict=True):
            assert error(found, expected) <= 1e-5
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("needed", ("input", "weight", "bias", "none"))
def test_a_compiled_function_needs_only_the_gradients_it_is_asked_for(needed: str, device: str) -> None:
    case = BY_NAME["groups2"]
    tensors = dict(zip(("input", "weight", "bias"), case.tensors(device), strict=True))
    leaves = [tensors[needed].requires_grad_()] if needed != "none" else []

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv2d_ext.conv2d(x, w, b, *case.args)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = compiled(*tensors.values())
    assert y.requires_grad == bool(leaves)
    assert error(y, run(*tensors.values())) <= 1e-6
    if leaves:
        go = case.grad_output(device)
        (ours,) = torch.autograd.grad(y, leaves, go)
        (theirs,) = torch.autograd.grad(run(*tensors.values()), leaves, go)
        assert error(ours, theirs) <= 1e-6


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("train", (False, True))
def test_a_new_batch_size_does_not_compile_again(train: bool, backend: str, device: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for batch in (4, 7, 2, 33):
        x = torch.randn(batch, 3, 12, 10, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(train):
            y = compiled(x)
            if train:
                y.sum().backward()
        assert y.shape[0] == batch
    assert counter.frame_count == 1


def test_new_sizes_of_the_image_do_not_compile_again_when_dynamic(device: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, w: conv2d_ext.conv2d(x, w, None, 2, 1), fullgraph=True, backend=counter, dynamic=True
    )
    w = torch.randn(4, 3, 3, 3, device=device)
    for h, width in ((12, 10), (9, 17), (30, 31)):
        x = torch.randn(2, 3, h, width, device=device)
        assert error(compiled(x, w), four_sided(x, w, None, (2, 2), (1, 1), (1, 1), 1)) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "arguments", ({"padding": "same"}, {"padding": "valid", "stride": 2}, {"padding": (0, 1, 2, 0)})
)
def test_every_kind_of_padding_compiles_without_a_break(arguments: dict[str, object], device: str) -> None:
    x, w, b = BY_NAME["C4_K12"].tensors(device)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv2d_ext.conv2d(x, w, b, **arguments)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert error(compiled(x, w, b), run(x, w, b)) <= 1e-6
    assert error(compiled(x[0], w, b), run(x[0], w, b)) <= 1e-6


def test_the_compiled_graph_holds_one_operator_a_convolution(device: str) -> None:
    """Not its decomposition, and not ATen's convolution."""
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    from torch._dynamo.backends.common import aot_autograd

    case = BY_NAME["3x3"]
    x, w, b = (t.requires_grad_() for t in case.tensors(device))
    compiled = torch.compile(
        lambda x, w, b: conv2d_ext.conv2d(x, w, b, *case.args), fullgraph=True, backend=aot_autograd(fw_compiler=look)
    )
    compiled(x, w, b).sum().backward()
    ours = [name for name in names if name.startswith("conv2d_ext")]
    assert len(ours) == 3, names
    assert not [name for name in names if "aten.convolution" in name]


def test_a_module_is_exported_and_runs_at_another_batch_size(device: str) -> None:
    block = Block().to(device).eval()
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(block, (torch.randn(4, 3, 12, 10, device=device),), dynamic_shapes={"x": {0: batch}})
    assert [n for n in program.graph.nodes if "conv2d_ext" in str(n.target)]
    x = torch.randn(9, 3, 12, 10, device=device)
    assert error(program.module()(x), block(x)) <= 1e-6


def test_a_compiled_double_backward_is_the_eager_one_or_refused(device: str) -> None:
    case = BY_NAME["groups2"]

    def penalty(function: Callable[..., Tensor]) -> Tensor:
        x, w, b = (t.requires_grad_() for t in case.tensors(device))
        (g,) = torch.autograd.grad(function(x, w, b).pow(2).sum(), x, create_graph=True)
        (result,) = torch.autograd.grad(g.pow(2).sum(), w)
        return result

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv2d_ext.conv2d(x, w, b, *case.args)

    try:
        ours = penalty(torch.compile(run, fullgraph=True, backend="aot_eager"))
    except RuntimeError as e:
        assert "double backward" in str(e)
        return
    assert error(ours, penalty(run)) <= 1e-5


def test_compiled_functions_under_autocast_are_the_eager_ones(device: str) -> None:
    x, w, b = BY_NAME["3x3"].tensors(device)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return conv2d_ext.conv2d(x, w, b, padding=1)

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x, w, b)
    assert y.dtype == torch.bfloat16
    assert same_bits(y, run(x, w, b))


@pytest.mark.parametrize("entry", ("conv2d", "torch.ops"))
@pytest.mark.parametrize("case", [c for c in FEW if not c.empty], ids=str)
def test_the_flop_counter_counts_two_for_each_product_of_each_operator(case: Case, entry: str, device: str) -> None:
    """Forward, and the two gradients. For grouped convolutions torch's formula counts too many in the backward pass."""
    function = {"conv2d": conv2d_ext.conv2d, "torch.ops": torch.ops.conv2d_ext.conv2d}[entry]

    def flops(function: Callable[..., Tensor], backward: bool) -> int:
        x, w, b = (t if t is None else t.requires_grad_() for t in case.tensors(device))
        with FlopCounterMode(display=False) as counter:
            y = function(x, w, b, *case.args)
            if backward:
                y.sum().backward()
        return counter.get_total_flops()

    products = case.N * case.K * case.P * case.Q * case.reduction("fprop")
    assert flops(function, False) == 2 * products
    assert flops(function, True) == 6 * products
    if case.groups == 1 and len(case.padding) == 2:
        assert flops(torch.nn.functional.conv2d, True) == 6 * products


@pytest.mark.parametrize("case", [c for c in FEW if not c.empty], ids=str)
def test_compiled_autograd_traces_the_backward_of_an_eager_call(case: Case, device: str) -> None:
    from torch._dynamo import compiled_autograd  # takes seconds

    tensors = [t for t in case.tensors(device) if t is not None]

    def gradients(compiled: bool) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = conv2d_ext.conv2d(leaves[0], leaves[1], *(leaves[2:] or [None]), *case.args)
        whole = torch.compile(backend="eager", fullgraph=True)
        with compiled_autograd._enable(whole) if compiled else nullcontext():
            y.square().sum().backward()
        return [t.grad for t in leaves]

    for made, eager in zip(gradients(True), gradients(False), strict=True):
        assert made is not None and eager is not None
        assert same_bits(made, eager)
