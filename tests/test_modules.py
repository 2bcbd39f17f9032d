"""Conv2d and convert: in place of nn.Conv2d, with the same parameters, draws and saved states."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from reference import error, tolerance
from torch import Tensor, nn
from torch.nn.utils import prune

import conv2d_ext
from conv2d_ext import Conv2d, convert

ARGUMENTS: tuple[tuple[tuple, dict], ...] = (
    ((3, 8, 3), {}),
    ((3, 8, (1, 5)), {"padding": (0, 2), "bias": False}),
    ((4, 8, 3), {"stride": 2, "padding": 1, "groups": 4}),
    ((4, 6, 3), {"stride": (2, 1), "dilation": (1, 2), "groups": 2}),
    ((3, 5, 4), {"padding": "same"}),
    ((3, 5, (3, 2)), {"padding": "same", "dilation": (1, 3)}),
    ((3, 5, 3), {"padding": "valid", "stride": 2}),
    ((3, 5, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    ((3, 5, 4), {"padding": "same", "padding_mode": "reflect"}),
    ((3, 5, 3), {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    ((4, 6, 3), {"padding": (2, 1), "padding_mode": "circular", "groups": 2}),
    ((4, 6, 4), {"padding": "same", "padding_mode": "circular", "dilation": 2}),
    ((3, 5, 1), {"stride": 3}),
)
EVERY_ARGUMENT = pytest.mark.parametrize("args,kwargs", ARGUMENTS, ids=str)


def pair(args: tuple, kwargs: dict, **more: object) -> tuple[Conv2d, nn.Conv2d]:
    """Ours and torch's, each made from the same seed."""
    made = []
    for layer in (Conv2d, nn.Conv2d):
        torch.manual_seed(3)
        made.append(layer(*args, **kwargs, **more))
    return made[0], made[1]


def image(layer: nn.Conv2d, device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, layer.in_channels, 9, 11, dtype=torch.float64).to(device, dtype)


@EVERY_ARGUMENT
def test_equal_seeds_give_equal_parameters_and_leave_equal_generators(args: tuple, kwargs: dict) -> None:
    torch.manual_seed(5)
    ours = Conv2d(*args, **kwargs)
    after = torch.randn(3)
    torch.manual_seed(5)
    theirs = nn.Conv2d(*args, **kwargs)
    assert torch.equal(after, torch.randn(3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_the_constructor_has_torchs_parameters_and_may_be_called_without_drawing(device: str) -> None:
    ours, theirs = (inspect.signature(layer).parameters for layer in (Conv2d, nn.Conv2d))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
    before = torch.get_rng_state()
    layer = nn.utils.skip_init(Conv2d, 3, 8, 3, padding=1, device=device)
    assert torch.equal(before, torch.get_rng_state())
    assert type(layer) is Conv2d and layer.weight.device.type == device and layer.weight.shape == (8, 3, 3, 3)


@EVERY_ARGUMENT
def test_the_module_computes_what_torchs_does(args: tuple, kwargs: dict, device: str) -> None:
    ours, theirs = pair(args, kwargs, device=device, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = image(ours, device)
    assert error(ours(x), theirs(x)) <= 1e-13
    assert error(ours(x[0]), theirs(x[0])) <= 1e-13
    a, b = ours(x), theirs(x)
    for mine, other in zip(
        torch.autograd.grad(a.pow(2).sum(), list(ours.parameters())),
        torch.autograd.grad(b.pow(2).sum(), list(theirs.parameters())),
        strict=True,
    ):
        assert error(mine, other) <= 1e-12


@EVERY_ARGUMENT
def test_the_module_runs_our_operator_and_not_torchs(args: tuple, kwargs: dict, device: str) -> None:
    layer = Conv2d(*args, **kwargs, device=device)
    x = image(layer, device, torch.float32)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    names = {event.key for event in profile.key_averages()}
    assert names & {"conv2d_ext::conv2d", "conv2d_ext::fprop", "conv2d_ext::plain_fprop"}
    assert "aten::conv2d" not in names


@EVERY_ARGUMENT
def test_states_load_both_ways(args: tuple, kwargs: dict) -> None:
    ours, theirs = Conv2d(*args, **kwargs), nn.Conv2d(*args, **kwargs)
    assert str(ours.load_state_dict(theirs.state_dict())) == str(theirs.load_state_dict(theirs.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    fresh = nn.Conv2d(*args, **kwargs)
    fresh.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), fresh.parameters(), strict=True))


@EVERY_ARGUMENT
def test_a_copy_by_pickle_deepcopy_or_save_computes_the_same(args: tuple, kwargs: dict, device: str) -> None:
    layer = Conv2d(*args, **kwargs, device=device, dtype=torch.float64)
    x = image(layer, device)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(twin) is Conv2d and twin.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(twin(x), layer(x))


def test_the_module_is_an_nn_conv2d_and_prints_like_one() -> None:
    ours, theirs = pair((3, 8, 3), {"stride": 2, "padding": 1, "bias": False})
    assert isinstance(ours, nn.Conv2d)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_a_module_moves_to_a_dtype_device_and_memory_format(dtype: torch.dtype, device: str) -> None:
    layer = Conv2d(4, 8, 3).to(device=device, dtype=dtype, memory_format=torch.channels_last)
    x = image(layer, device, dtype).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    expected = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double())
    assert error(y, expected) <= 2 * tolerance(dtype, 36)


def test_a_module_on_meta_has_shapes_only() -> None:
    layer = Conv2d(4, 8, 3, padding=1, device="meta")
    assert layer(torch.empty(2, 4, 5, 6, device="meta")).shape == (2, 8, 5, 6)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real(torch.zeros(2, 4, 5, 6)).isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    (
        {"in_channels": 3, "groups": 2},
        {"out_channels": 5, "groups": 2},
        {"groups": 0},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding_mode": "mirror"},
    ),
    ids=str,
)
def test_the_constructor_refuses_what_torchs_refuses(arguments: dict[str, object]) -> None:
    everything = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments}
    with pytest.raises(ValueError) as theirs:
        nn.Conv2d(**everything)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as ours:
        Conv2d(**everything)  # type: ignore[arg-type]
    assert str(ours.value) == str(theirs.value)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, padding="same", padding_mode="reflect"), nn.Conv2d(8, 4, 1)),
    )


def test_convert_swaps_every_convolution_in_place_and_shares_its_parameters(device: str) -> None:
    model = net().to(device, torch.float64).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    before, parameters = model(x), {n: p for n, p in model.named_parameters()}
    names = [n for n, _ in model.named_modules()]
    assert convert(model) is model
    assert [n for n, _ in model.named_modules()] == names
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert all(type(m) is Conv2d for m in model.modules() if isinstance(m, nn.Conv2d))
    assert error(model(x), before) <= 1e-13


def test_convert_of_a_single_layer_returns_ours(device: str) -> None:
    layer = nn.Conv2d(3, 4, 3, stride=2, bias=False, device=device)
    ours = convert(layer)
    assert type(ours) is Conv2d and ours.weight is layer.weight and ours.bias is None
    assert ours.stride == layer.stride


def test_convert_keeps_the_mode_and_frozen_parameters_and_a_second_time_changes_nothing() -> None:
    model = net().eval()
    model[0].weight.requires_grad_(False)
    model[3][0].train()
    convert(model)
    assert not model[0].training and model[3][0].training
    assert not model[0].weight.requires_grad
    layers = [m for m in model.modules() if isinstance(m, Conv2d)]
    assert [m for m in convert(model).modules() if isinstance(m, Conv2d)] == layers


def test_convert_keeps_a_layer_that_is_used_twice_one_layer() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    model = convert(nn.Sequential(layer, nn.ReLU(), layer))
    assert type(model[0]) is Conv2d and model[0] is model[2]


def test_convert_leaves_other_convolutions_and_subclasses_alone() -> None:
    """A subclass may compute something else in its forward."""

    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleList([nn.Conv1d(3, 3, 3), nn.Conv3d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3), Scaled(3, 3, 3)])
    types = [type(m) for m in model]
    assert [type(m) for m in convert(model)] == types


def test_convert_keeps_hooks(device: str) -> None:
    model = net().to(device)
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda m, args: seen.append("before"))
    model[0].register_forward_hook(lambda m, args, out: seen.append("after"))
    convert(model)(torch.randn(1, 3, 8, 8, device=device))
    assert seen == ["before", "after"]


def test_an_optimizer_made_before_convert_trains_the_converted_model(device: str) -> None:
    model = net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    convert(model)
    model(torch.randn(2, 3, 8, 8, device=device)).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_hooks_on_our_module_run(device: str) -> None:
    layer = Conv2d(3, 4, 3, device=device)
    seen: list[tuple[int, ...]] = []
    layer.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append(tuple(go[0].shape)))
    layer(torch.randn(1, 3, 5, 5, device=device)).sum().backward()
    assert seen == [(1, 4, 3, 3)] * 2


@pytest.mark.parametrize("kind", ("weight_norm", "spectral_norm", "orthogonal"))
def test_parametrizations_work_as_on_torchs_module(kind: str, device: str) -> None:
    ours, theirs = pair((3, 4, 3), {"padding": 1}, device=device, dtype=torch.float64)
    apply = getattr(nn.utils.parametrizations, kind)
    for layer in (ours, theirs):
        torch.manual_seed(1)
        apply(layer)
    theirs.load_state_dict(ours.state_dict())
    x = image(ours, device)
    ours.eval(), theirs.eval()  # spectral_norm changes its state in each training step
    assert error(ours(x), theirs(x)) <= 1e-12
    ours(x).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_pruning_works_on_our_module(device: str) -> None:
    layer = Conv2d(3, 4, 3, device=device)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    layer(torch.randn(1, 3, 5, 5, device=device)).sum().backward()
    assert int((layer.weight == 0).sum()) == 54
    assert bool((layer.weight_orig.grad[layer.weight == 0] == 0).all())


def test_batch_norm_is_fused_into_our_module(device: str) -> None:
    layer = Conv2d(3, 4, 3, device=device, dtype=torch.float64).eval()
    norm = nn.BatchNorm2d(4, device=device, dtype=torch.float64).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    fused = nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
    x = image(layer, device)
    assert isinstance(fused, Conv2d)
    assert error(fused(x), norm(layer(x))) <= 1e-13


def test_the_public_names_are_the_documented_ones() -> None:
    assert {"conv2d", "Conv2d", "convert", "explain", "__version__"} <= set(conv2d_ext.__all__)
    assert all(hasattr(conv2d_ext, name) for name in conv2d_ext.__all__)


def test_functional_call_and_swapped_parameters_reach_the_operator(device: str) -> None:
    layer = Conv2d(3, 4, 3, device=device, dtype=torch.float64)
    x = image(layer, device)
    other = {"weight": torch.randn_like(layer.weight), "bias": torch.zeros_like(layer.bias)}
    y = torch.func.functional_call(layer, other, (x,))
    assert error(y, nn.functional.conv2d(x, other["weight"])) <= 1e-13


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", ({}, {"padding": "same"}, {"padding": (1, 0, 2, 1), "stride": 2}), ids=str)
def test_a_traced_module_is_saved_and_computes_and_differentiates_the_same(
    arguments: dict[str, object], device: str
) -> None:
    module = conv2d_ext.Conv2d(4, 6, 3, **arguments).to(device)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, torch.randn(2, 4, 8, 8, device=device)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x = torch.randn(3, 4, 9, 10, device=device)
    assert torch.equal(loaded(x), module(x))
    loaded(x).square().sum().backward()
    module(x).square().sum().backward()
    assert torch.equal(loaded.weight.grad, module.weight.grad)


def test_a_lazy_convolution_becomes_ours_when_it_is_first_called(device: str) -> None:
    model = convert(nn.Sequential(nn.LazyConv2d(6, 3))).to(device)
    x = torch.randn(2, 4, 8, 8, device=device)
    model(x)
    assert type(model[0]) is Conv2d
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
