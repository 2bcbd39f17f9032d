"""What only a GPU can show: graphs, streams, devices, tensors of more than 2^31 elements."""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from calls import OPS, alignment, call, candidates, machine, plan, problem
from cases import BY_NAME, CASES, DTYPES, FEW, Case
from reference import assert_close, error, exact, same_bits, tolerance
from torch import Tensor

import conv2d_ext

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def test_the_cuda_library_is_loaded(cuda: str) -> None:
    from conv2d_ext import _library

    assert _library.CUDA_ERROR is None


def test_without_the_cuda_library_a_reason_is_given() -> None:
    from conv2d_ext import _library

    if torch.version.cuda is None:
        assert "without CUDA" in str(_library.CUDA_ERROR)
    elif _library.CUDA_ERROR is not None:
        assert len(_library.CUDA_ERROR) > 10


@EVERY_DTYPE
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", (*FEW, BY_NAME["many_pixels"]), ids=str)
def test_a_captured_graph_replays_on_new_values(case: Case, op: str, dtype: torch.dtype, cuda: str) -> None:
    """Capture fails on a synchronisation or a foreign allocation; a replay shows a pointer or value that was kept."""
    if case.empty:
        pytest.skip("an empty graph captures nothing")
    tensors = [*case.tensors(cuda, dtype), case.grad_output(cuda, dtype)]
    run = call(op, case, *tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    others = [*case.tensors(cuda, dtype, seed=50), case.grad_output(cuda, dtype, seed=50)]
    for old, new in zip(tensors, others, strict=True):
        if old is not None:
            old.copy_(new)
    graph.replay()
    first = captured.clone()
    graph.replay()
    assert same_bits(first, captured)
    assert same_bits(captured, run())


def test_the_first_call_of_a_process_may_be_inside_a_capture(cuda: str, package_environment: dict[str, str]) -> None:
    """Nothing is set up lazily that a capture forbids."""
    program = """
import torch, conv2d_ext
x, w = torch.ones(2, 8, 9, 9, device="cuda"), torch.ones(8, 8, 3, 3, device="cuda")
g = torch.cuda.CUDAGraph()
with torch.cuda.graph(g):
    y = conv2d_ext.conv2d(x, w)
    gx = torch.ops.conv2d_ext.dgrad(y, w, x.shape, [1, 1], [0, 0], [1, 1], 1)
    gw = torch.ops.conv2d_ext.wgrad(y, x, w.shape, None, [1, 1], [0, 0], [1, 1], 1)
g.replay()
torch.cuda.synchronize()
assert (y == 72).all() and gw.eq(2 * 49 * 72).all() and gx[0, 0, 4, 4] == 9 * 8 * 72
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env=package_environment
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.alone
def test_the_first_call_of_a_shape_takes_at_most_a_millisecond_longer(
    cuda: str, package_environment: dict[str, str]
) -> None:
    """Nothing is tried out, compiled or loaded: the kernels are there from the process's first call on."""
    program = Path(__file__).resolve().parents[1] / "benchmarks" / "first_call.py"
    run = subprocess.run(
        [sys.executable, program, "--shapes", "30"],
        capture_output=True, text=True, timeout=400, env=package_environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]


@pytest.mark.parametrize("op", OPS)
def test_work_is_queued_on_the_current_stream(op: str, cuda: str) -> None:
    """The inputs are written late on a side stream; a kernel on another stream would read them too early."""
    case = BY_NAME["many_pixels"]
    source = [*case.tensors(cuda), case.grad_output(cuda)]
    expected = call(op, case, *source)()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [None if t is None else torch.full_like(t, float("nan")) for t in source]
        torch.cuda._sleep(50_000_000)
        for empty, full in zip(late, source, strict=True):
            if empty is not None:
                empty.copy_(full)
        y = call(op, case, *late)()
    stream.synchronize()
    assert same_bits(y, expected)


@pytest.mark.parametrize("op", OPS)
def test_several_streams_at_once_do_not_share_a_workspace(op: str, cuda: str) -> None:
    case = BY_NAME["many_pixels"]
    sets = [[*case.tensors(cuda, seed=k), case.grad_output(cuda, seed=k)] for k in range(4)]
    expected = [call(op, case, *tensors)() for tensors in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in sets]
    for _ in range(20):
        for stream, tensors, into in zip(streams, sets, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(call(op, case, *tensors)())
    torch.cuda.synchronize()
    for want, got in zip(expected, results, strict=True):
        assert all(same_bits(want, y) for y in got)


def test_a_thread_of_autograd_may_begin_with_a_convolution(cuda: str, package_environment: dict[str, str]) -> None:
    """Nothing has made the device's context current in that thread before, and tensor maps of the driver need one."""
    program = """
import torch, conv2d_ext
x = torch.ones(2, 64, 16, 16, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last).requires_grad_()
w = torch.ones(64, 64, 3, 3, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last).requires_grad_()
y = conv2d_ext.conv2d(x, w, padding=1)
gradient = torch.ones_like(y)
gx, gw = torch.autograd.grad(y, (x, w), gradient)
assert gx[0, 0, 5, 5] == 64 * 9 and gw[0, 0, 1, 1] == 2 * 16 * 16
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env=package_environment
    )
    assert run.returncode == 0, run.stderr


def test_the_stream_of_the_backward_pass_is_that_of_the_forward_pass(cuda: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = (t.requires_grad_() for t in case.tensors(cuda))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = conv2d_ext.conv2d(x, w, b, *case.args)
        y.backward(case.grad_output(cuda))
    torch.cuda.synchronize()
    assert_close(w.grad, exact(case, torch.float32).grad_weight, torch.float32, case.reduction("wgrad"))


@pytest.mark.parametrize("op", OPS)
def test_tensors_of_a_device_that_is_not_the_current_one_are_served_there(op: str, cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    case = BY_NAME["3x3"]
    expected = call(op, case, *case.tensors("cuda:0"), case.grad_output("cuda:0"))()
    with torch.cuda.device(0):
        y = call(op, case, *case.tensors("cuda:1"), case.grad_output("cuda:1"))()
        assert torch.cuda.current_device() == 0
    assert y.device == torch.device("cuda:1")
    assert error(y, expected.double()) <= tolerance(torch.float32, case.reduction(op))


def test_tensors_of_two_gpus_are_refused(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    x, w, b = BY_NAME["3x3"].tensors("cuda:0")
    with pytest.raises(RuntimeError, match="weight.*cuda:0.*cuda:1"):
        conv2d_ext.conv2d(x, w.to("cuda:1"), b)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", [c for c in CASES if c.empty], ids=str)
def test_empty_tensors_leave_no_error_behind(case: Case, op: str, cuda: str) -> None:
    """A launch of an empty grid is an error that CUDA reports at the next call."""
    call(op, case, *case.tensors(cuda), case.grad_output(cuda))()
    torch.cuda.synchronize()
    assert float(torch.ones(3, device=cuda).sum()) == 3


def check_calls_in_a_broken_capture(op: str, dtype: torch.dtype, layout: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    case = BY_NAME["3x3"]
    x, w, b = case.tensors("cuda", dtype, layout)
    go = case.grad_output("cuda", dtype, layout)
    run = functools.partial(call(op, case, x, w, b, go), **({"stride": w.stride()} if op == "wgrad" else {}))
    sms, capability = machine()
    tensors = problem(op, x, w, go, run())
    rows = candidates(plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability))
    names = torch.ops.conv2d_ext.kernels()
    asking = next(row for row in rows if names[row].startswith("simt_"))
    if dtype == torch.float16 and capability == 90:
        assert any(names[row].startswith(f"tma_{op}_") for row in rows)
    expected = run(row=asking)
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            with pytest.raises(RuntimeError):
                stream.synchronize()  # which breaks the capture
            for row in rows:
                with pytest.raises(RuntimeError, match=r"CUDA error"):
                    run(row=row)
                with torch.cuda.stream(torch.cuda.default_stream()):
                    assert same_bits(run(row=asking), expected), f"after {names[row]}"
            with torch.cuda.stream(torch.cuda.default_stream()):
                assert float(torch.ones(3, device="cuda").sum()) == 3
        finally:
            with pytest.raises(RuntimeError):
                graph.capture_end()
    torch.cuda.synchronize()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtype,layout", ((torch.float32, "nchw"), (torch.float16, "nhwc")), ids=("float32-nchw", "float16-nhwc")
)
def test_a_failed_call_leaves_no_error_behind(dtype: torch.dtype, layout: str, op: str, cuda: str) -> None:
    """A launch fails in a capture that is broken, and CUDA's runtime keeps the error until it is asked for.

    The library has a runtime of its own: torch is never told of its errors. Most rows ask after their launch, and are
    told of whatever was left. Those of tma in 16 bits never ask (launch_dependent); what they leave, simt would report.
    In a process of its own: torch leaves its generator and its allocator in a capture that broke.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(check_calls_in_a_broken_capture, op, dtype, layout).result(timeout=200)


def test_memory_of_a_call_is_given_back(cuda: str) -> None:
    case = BY_NAME["many_pixels"]
    tensors = [*case.tensors(cuda), case.grad_output(cuda)]
    for op in OPS:
        call(op, case, *tensors)()
    torch.cuda.synchronize()
    gc.collect()  # tensors in cycles that tests before this one left would go in between
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        for op in OPS:
            call(op, case, *tensors)()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_gradient_that_memory_is_too_small_for_raises_what_torch_raises(cuda: str) -> None:
    g, w = torch.ones(1, 1, 1, 1, device=cuda), torch.ones(1, 1, 1, 1, device=cuda)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.ops.conv2d_ext.dgrad(
            g.expand(1024, 1, 1, 1), w, (1024, 1, 2**23, 2**23), (2**23, 2**23), (0, 0), (1, 1), 1
        )


def test_a_backward_pass_that_memory_is_too_small_for_says_so(cuda: str) -> None:
    """In a RuntimeError, also of a node in C++: libraries that retry with less look for these words."""
    x = torch.ones(1, 1, 1, 1, device=cuda, requires_grad=True).expand(1024, 1, 16130, 16130)
    w = torch.ones(1, 1, 1, 1, device=cuda, requires_grad=True)
    y = conv2d_ext.conv2d(x, w, None, 127)
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="CUDA out of memory"):
            torch.autograd.grad(y, (x, w), torch.ones_like(y), create_graph=create_graph, retain_graph=True)


def test_a_call_does_not_wait_for_the_gpu(cuda: str) -> None:
    case = BY_NAME["3x3"]
    tensors = [*case.tensors(cuda), case.grad_output(cuda)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op in OPS:
            call(op, case, *tensors)()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def room(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, there are {free:.0f}")


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("op", OPS)
def test_an_input_of_more_than_2_to_the_31_elements_is_read_to_its_end(op: str, layout: str, cuda: str) -> None:
    """The last image of the batch lies beyond 2^31 elements; its result is that of the image alone."""
    room(24)
    torch.cuda.empty_cache()
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    case = Case("large", 3, 8, 10240, 10240, 2, 3, 3, stride=(3, 3))
    assert 2 * case.C * case.H * case.W < 2**31 < case.N * case.C * case.H * case.W
    x = torch.zeros(case.input_size, dtype=torch.float16, device=cuda).to(memory_format=memory_format)
    part = torch.randint(-1, 2, (1, *case.input_size[1:]), dtype=torch.int8, device=cuda).half()
    x[-1:] = part
    w = torch.randint(-1, 2, case.weight_size, device=cuda).half()
    go = torch.zeros(case.output_size, dtype=torch.float16, device=cuda)
    # Few enough ones that the sums of wgrad stay exact in float16.
    go[-1:, :, ::50, ::50] = 1
    one = Case("one", 1, case.C, case.H, case.W, case.K, case.R, case.S, stride=case.stride)
    whole = call(op, case, x, w, None, go)()
    alone = call(op, one, x[-1:].clone(memory_format=memory_format), w, None, go[-1:].clone())()
    if op == "wgrad":
        # go's ones are 50 apart and the stride is 3: a tap meets every 150th pixel from its own on.
        met = [[part[0, :, r::150, s::150].sum((1, 2)) for s in range(case.S)] for r in range(case.R)]
        expected = torch.stack([torch.stack(row, -1) for row in met], -2).expand(case.weight_size)
        assert torch.equal(whole, expected) and torch.equal(alone, expected) and bool((expected != 0).any())
    else:
        assert torch.equal(whole[-1:], alone) and bool((alone != 0).any())
        assert not whole[:-1].any()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_an_output_of_more_than_2_to_the_31_elements_is_written_to_its_end(layout: str, cuda: str) -> None:
    room(24)
    torch.cuda.empty_cache()
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.ones(1, 1, 16400, 16400, dtype=torch.float16, device=cuda)
    w = torch.arange(1, 9, dtype=torch.float16, device=cuda).view(8, 1, 1, 1).contiguous(memory_format=memory_format)
    if layout == "nhwc":
        x = x.as_strided(x.shape, (16400 * 16400, 1, 16400, 1))
    y = conv2d_ext.conv2d(x, w, torch.ones(8, dtype=torch.float16, device=cuda))
    assert y.numel() > 2**31
    for k in range(8):
        assert bool((y[0, k] == k + 2).all())


# 3x3 and 7x7, dense, grouped, depthwise, 1x1, and few channels.
OF_NAN = (
    Case("dense", 32, 128, 56, 56, 128, 3, 3, padding=(1, 1), bias=False),
    Case("dense_s2", 32, 64, 56, 56, 128, 3, 3, (2, 2), padding=(1, 1), bias=False),
    Case("1x1", 32, 256, 28, 28, 256, 1, 1, bias=False),
    Case("few", 32, 3, 112, 112, 64, 7, 7, (2, 2), padding=(3, 3), bias=False),
    Case("groups", 32, 256, 28, 28, 256, 3, 3, padding=(1, 1), groups=32, bias=False),
    Case("depthwise", 32, 192, 56, 56, 192, 3, 3, padding=(1, 1), groups=192, bias=False),
    Case("depthwise_s2", 32, 192, 57, 57, 192, 5, 5, (2, 2), padding=(2, 2), groups=192, bias=False),
    Case("depthwise_7x7", 32, 96, 28, 28, 96, 7, 7, padding=(3, 3), groups=96, bias=False),
)


@pytest.mark.alone
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=("f16", "f32"))
@pytest.mark.parametrize("case", OF_NAN, ids=str)
def test_nothing_but_nan_takes_no_second(case: Case, dtype: torch.dtype, cuda: str) -> None:
    """As first steps with scaled gradients may meet it: a sum that is made again, product by product, ends there."""
    for layout, op in itertools.product((torch.contiguous_format, torch.channels_last), OPS):
        x, w, go = (
            torch.randn(size, device=cuda).to(dtype).to(memory_format=layout)
            for size in (case.input_size, case.weight_size, case.output_size)
        )
        run = call(op, case, x, w, None, go)
        run()
        (go if op == "dgrad" else x).fill_(torch.nan)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        made = run()
        torch.cuda.synchronize()
        assert time.perf_counter() - begin < 0.05, f"{op} {layout}"
        assert made[..., made.shape[2] // 2, made.shape[3] // 2].isnan().all(), f"{op} {layout}"


@pytest.mark.alone
@pytest.mark.slow
def test_a_batch_of_more_than_65535_images_and_many_groups_fit_the_grid(cuda: str) -> None:
    """A CUDA grid has at most 65535 blocks in y and z."""
    for case in (
        Case("batch", 70_000, 1, 3, 3, 1, 3, 3),
        Case("groups", 1, 70_000, 3, 3, 70_000, 3, 3, groups=70_000),
        Case("filters", 1, 1, 3, 3, 9_000_000, 1, 1, bias=False),
    ):
        x, w, b = case.tensors(cuda, integers=True)
        go = case.grad_output(cuda, integers=True)
        truth = exact(case, torch.float32, integers=True, device=cuda)
        for op, expected in zip(OPS, (truth.output, truth.grad_input, truth.grad_weight), strict=True):
            assert torch.equal(call(op, case, x, w, b, go)().double(), expected), f"{case} {op}"
    exact.cache_clear()
