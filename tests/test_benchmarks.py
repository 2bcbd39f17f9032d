"""The programs of benchmarks/, as far as they can be tried without a GPU."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import json
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case
from reference import error, exact
from torch import Tensor

from conv2d_ext.cli import bench

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
OPS = ("fprop", "dgrad", "wgrad")


@pytest.fixture(scope="module")
def programs() -> Iterator[tuple[Any, ...]]:
    sys.path.insert(0, str(FOLDER))
    yield tuple(
        importlib.import_module(name)
        for name in (
            "shapes",
            "fuzz",
            "sweep",
            "bounds",
            "first_call",
            "tables",
            "eager",
            "networks",
            "large",
            "collect",
        )
    )
    sys.path.remove(str(FOLDER))


@pytest.fixture
def shapes(programs: tuple[Any, ...]) -> Any:
    return programs[0]


@pytest.fixture
def fuzz(programs: tuple[Any, ...]) -> Any:
    return programs[1]


@pytest.fixture
def sweep(programs: tuple[Any, ...]) -> Any:
    return programs[2]


@pytest.fixture
def bounds(programs: tuple[Any, ...]) -> Any:
    return programs[3]


@pytest.fixture
def first_call(programs: tuple[Any, ...]) -> Any:
    return programs[4]


@pytest.fixture
def tables(programs: tuple[Any, ...]) -> Any:
    return programs[5]


@pytest.fixture
def eager(programs: tuple[Any, ...]) -> Any:
    return programs[6]


@pytest.fixture
def networks(programs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """With a small network more."""
    found, models = programs[7], sys.modules["models"]

    def small() -> torch.nn.Module:
        stem = [models.conv(3, 8, 3, 2)]
        return models.resnet((8, 16), (1, 4), (2, 1), 2, stem, (1, 2), excite=True)

    monkeypatch.setitem(found.NETWORKS, "small", (small, (3, 16, 16), 2))
    return found


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("network", "dense", "few", "grouped", "depthwise"))
def test_random_layers_are_of_their_kind_and_every_one_has_a_row(shapes: Any, kind: str) -> None:
    draw = random.Random(1)
    for _ in range(100):
        case = shapes.layer(draw, kind)
        assert min(case.P, case.Q) >= 1 and case.C % case.groups == case.K % case.groups == 0
        is_kind = {
            "network": case.groups == 1,
            "dense": case.groups == 1,
            "few": case.groups == 1 and min(case.C, case.K) <= 24,
            "depthwise": case.groups == case.C,
            "grouped": case.groups > 1,
        }
        assert is_kind[kind]
        x, w, y = (torch.empty(s, device="meta") for s in (case.input_size, case.weight_size, case.output_size))
        for op in OPS:
            chosen, supported = shapes.plan(op, case, x, w, y, False)
            assert chosen in supported


def test_a_shape_is_drawn_again_from_its_seed(shapes: Any, fuzz: Any) -> None:
    assert [shapes.small(random.Random(5)) for _ in range(2)] == [shapes.small(random.Random(5))] * 2
    assert fuzz.example(3, 8) == fuzz.example(3, 8)
    assert fuzz.example(3, 8).case != fuzz.example(3, 9).case != fuzz.example(4, 9).case


def test_some_thousand_examples_reach_every_row(fuzz: Any, shapes: Any) -> None:
    """As the planner of an H200 sees them; the two plain layouts are enough."""
    # Those of 9x9 by stream_quads_f32.cuh take planes that fill the GPU alone.
    large = re.compile(r"stream_\w+_f32_9x9_nchw")
    missed = {row for row, name in enumerate(torch.ops.conv2d_ext.kernels()) if not large.fullmatch(name)}
    for index in range(40_000):
        e = fuzz.example(0, index)
        if e.layout in ("nchw", "nhwc"):
            like = torch.channels_last if e.layout == "nhwc" else torch.contiguous_format
            sizes = (e.case.input_size, e.case.weight_size, e.case.output_size)
            x, w, y = (torch.empty(size, dtype=shapes.STORAGE[e.dtype], device="meta").to(memory_format=like)
                       for size in sizes)  # fmt: skip
            missed -= set(shapes.plan(e.op, e.case, x, w, y, e.dtype == "tf32")[1])
        if not missed:
            return
    pytest.fail(f"no example for {[torch.ops.conv2d_ext.kernels()[row] for row in missed]}")


def test_the_text_of_a_shape_names_what_it_is(shapes: Any) -> None:
    assert shapes.text(BY_NAME["four_pads_grouped_dilated"]) == "2x8x8x9 8x3x3 s2,1 p2,1,0,3 d2,3 g4"


# ---- fuzz ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if not case.empty and not case.large], ids=str)
def test_the_reference_of_the_fuzzer_is_that_of_the_suite(fuzz: Any, case: Case) -> None:
    x, w, b = case.tensors("cpu", torch.float64)
    go = case.grad_output("cpu", torch.float64)
    truth = exact(case, torch.float64)
    for op, expected in zip(OPS, (truth.output, truth.grad_input, truth.grad_weight), strict=True):
        assert error(fuzz.reference(op, case, x, w, b, go), expected) <= 1e-13


def test_a_run_on_the_cpu_finds_nothing(fuzz: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert fuzz.main(["--device", "cpu", "--cases", "60"]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert "60 cases, 60 results checked, 0 cases failed" in capsys.readouterr().out


def examples(fuzz: Any, **wanted: object) -> Iterator[Any]:
    """Those with these properties, of some size."""
    for index in range(10_000):
        e = fuzz.example(0, index)
        if all(getattr(e, k) == v for k, v in wanted.items()) and 50 <= e.case.reduction(e.op) <= 1000:
            yield e


def first(fuzz: Any, **wanted: object) -> Any:
    return next(examples(fuzz, **wanted))


def one_off(y: Tensor, by: float) -> Tensor:
    y = y.clone(memory_format=torch.contiguous_format)
    y.view(-1)[y.numel() // 2] += by
    return y


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ("fp16", "bf16", "fp32", "fp64"))
@pytest.mark.parametrize("values", ("normal", "integer"))
def test_a_wrong_element_is_found(fuzz: Any, op: str, dtype: str, values: str) -> None:
    e = first(fuzz, op=op, dtype=dtype, values=values)
    assert fuzz.check(e, "cpu") == ([], [-1])
    (line,) = fuzz.check(e, "cpu", lambda run: lambda row: one_off(run(row), 2.0))[0]
    assert "wrong" in line
    (line,) = fuzz.check(e, "cpu", lambda run: lambda row: one_off(run(row), math.nan))[0]
    assert "wrong" in line


def test_a_loss_of_precision_everywhere_is_found(fuzz: Any) -> None:
    e = first(fuzz, op="fprop", dtype="fp32", values="normal")
    (line,) = fuzz.check(e, "cpu", lambda run: lambda row: run(row).bfloat16().float())[0]
    assert "wrong" in line


def test_runs_that_differ_are_found(fuzz: Any) -> None:
    e = first(fuzz, op="fprop", dtype="fp32", values="normal")
    calls = 0

    def unstable(run: Any) -> Any:
        def call(row: int) -> Tensor:
            nonlocal calls
            calls += 1
            y = run(row)
            return y if calls % 2 else y.nextafter(torch.full_like(y, math.inf))

        return call

    assert fuzz.check(e, "cpu", unstable)[0] == ["the op: two runs differ"]


def test_a_value_that_is_not_finite_must_stay_where_it_belongs(fuzz: Any) -> None:
    e = next(e for e in examples(fuzz, op="fprop", dtype="fp32", values="special") if e.case.stride == (1, 1))
    assert fuzz.check(e, "cpu") == ([], [-1])
    (line,) = fuzz.check(e, "cpu", lambda run: lambda row: torch.nan_to_num(run(row)))[0]
    assert "wrong" in line


def test_an_exception_is_a_failure_and_not_the_end(
    fuzz: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(fuzz, "check", broken)
    try:
        assert fuzz.main(["--device", "cpu", "--cases", "3", "--seed", "9"]) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    out = capsys.readouterr().out
    assert "FAIL --seed 9 --only 2" in out and "RuntimeError: no kernel" in out and "3 cases failed" in out


# ---- sweep -----------------------------------------------------------------------------------------------------------


def problem(sweep: Any, op: str, chosen: float, best: float) -> Any:
    rows = {"a": (chosen, 1.0), "b": (best, 2.0), "c": (9 * best, 3.0)}
    return sweep.Problem("dense", BY_NAME["3x3"], op, "fp16", "nhwc", "a", rows)


def test_regret_is_the_time_of_the_choice_over_the_best(sweep: Any) -> None:
    assert problem(sweep, "fprop", 20.0, 10.0).regret == 2.0
    assert problem(sweep, "fprop", 10.0, 10.0).regret == 1.0
    problems = [problem(sweep, "fprop", 20.0, 10.0), problem(sweep, "dgrad", 10.0, 20.0)]
    found = {name: (count, mean, worst) for name, count, mean, worst, _ in sweep.summary(problems)}
    assert found["all"] == (2, pytest.approx(2**0.5), 2.0)
    assert found["dgrad"] == (1, 1.0, 1.0)
    text = sweep.report(problems)
    assert "the worst ten" in text and "2x16x9x10 24x3x3 s1,1 p1,1" in text and "b 10.0 us" in text
    assert problems[0].to_json()["best"] == "b"
    problems[0].torch_us, problems[1].torch_us = 19.0, 40.0  # 0.95 and 4 times ours
    row = next(line for line in sweep.report(problems).splitlines() if line.startswith("all "))
    assert row.split()[-3:] == ["1.95", "0.95", "1"]


def test_a_sweep_names_the_families_that_its_regret_comes_of(sweep: Any) -> None:
    assert sweep.family("tma_strict_fprop_f32_128x64_im2col") == "tma_strict im2col"
    assert sweep.family("stream_wgrad_bf16_3x3_nchw_s2") == "stream nchw"
    fast, slow = "tma_fprop_f16_128x64_halo", "simt_fprop_f16_64x64_nhwc"
    rows = {slow: (20.0, 8.0), fast: (10.0, 9.0)}
    wrong, right = (sweep.Problem("dense", BY_NAME["3x3"], "fprop", "fp16", "nhwc", row, rows) for row in (slow, fast))
    [cause] = sweep.causes([wrong, right])
    assert cause.cells(cause.loss) == ("fprop nhwc", "simt nhwc", "tma halo", "1", "2.00", "100.0%", "2.50", "1.11")
    assert {(name, round(regret, 3)) for name, _, _, regret in sweep.exact_estimates([wrong])} == {
        ("simt nhwc", 2.0),  # as far off as before
        ("tma halo", 2.0),
    }
    assert "regret: 1 above 1.1, 1 above 1.25, 1 above 1.5" in sweep.report([wrong, right])


def test_a_stored_sweep_is_replayed_without_a_gpu(
    sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    p = sweep.Problem("dense", BY_NAME["3x3"], "fprop", "fp16", "nhwc")
    stored = {"torch_us": None, "kind": p.kind, "case": dataclasses.asdict(p.case), "chosen": "gone", "regret": 1.5}
    stored |= {"op": p.op, "dtype": p.dtype, "layout": p.layout, "rows": {"gone": [9.0, 9.0]}}
    names = torch.ops.conv2d_ext.kernels()
    rows = {names[row]: [10.0, us] for row, us in estimates_of(sweep, p).items()}
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"problems": [stored | {"rows": stored["rows"] | rows}]}))
    assert sweep.main(["--replay", str(file)]) == 0
    assert "1 problems, 1 choices changed, 0 to rows without a time" in capsys.readouterr().out


def estimates_of(sweep: Any, p: Any) -> dict[int, float]:
    x, w, y = (torch.empty(size, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
               for size in (p.case.input_size, p.case.weight_size, p.case.output_size))  # fmt: skip
    return sweep.shapes.plan(p.op, p.case, x, w, y, False)[1]


def test_a_sweep_draws_the_same_layers_for_a_seed(sweep: Any) -> None:
    options = sweep.parser().parse_args(["--shapes", "20", "--kinds", "grouped,depthwise", "--seed", "4"])
    assert list(sweep.drawn(options)) == list(sweep.drawn(options))
    assert {kind for kind, *_ in sweep.drawn(options)} == {"grouped", "depthwise"}


def test_a_cliff_is_the_ratio_of_the_costs_of_two_neighbours(sweep: Any) -> None:
    points = [(1, (10.0, 11.0), 5.0, "k"), (2, (20.0, 20.0), 10.0, "k"), (3, (120.0, 60.0), 15.0, "l")]
    a, b = sweep.steps_of("walk", [sweep.Point(*point) for point in points])
    assert (a.jump, b.jump) == (1.0, 2.0)
    assert (a.noise, b.noise) == (1.1, 2.0)
    assert (b.values, b.kernels) == ((2, 3), ("k", "l"))


def test_the_walks_change_one_thing_by_little(sweep: Any, shapes: Any) -> None:
    for walk, points in sweep.sweeps().items():
        values = [value for value, _ in points]
        assert values == sorted(set(values)), walk
        assert all(max(shapes.elements(case)) < 2**28 and min(case.P, case.Q) > 0 for _, case in points), walk


def test_without_a_gpu_the_sweep_says_so(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert sweep.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


# ---- bounds ----------------------------------------------------------------------------------------------------------


def kernels_of_the_tree() -> set[tuple[str, str]]:
    """(file, namespace::function) of every __global__ function."""
    found = set()
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        names = re.findall(r"__global__[^{]*?\b(?!__)(\w+)\((?=[^()]*\) \{)", text)
        assert len(names) == text.count("__global__"), path.name
        space = re.search(r"namespace conv2d_ext::([\w:]+) \{", text)
        found |= {(path.stem, f"{space[1]}::{name}") for name in names if space}
    return found


def test_every_kernel_has_an_entry(bounds: Any) -> None:
    entries = {(e.file, e.kernel) for e in bounds.ENTRIES}
    assert sorted(kernels_of_the_tree() - entries) == [], "kernels that benchmarks/bounds.py does not profile"
    assert sorted(entries - kernels_of_the_tree()) == [], "entries without a kernel"


def test_every_entry_has_a_row_that_supports_its_layer(bounds: Any, shapes: Any) -> None:
    """As the planner of an H200 sees it."""
    seen = set()
    for e in bounds.ENTRIES:
        like = torch.channels_last if e.layout == "nhwc" else torch.contiguous_format
        sizes = (e.case.input_size, e.case.weight_size, e.case.output_size)
        x, w, y = (torch.empty(size, dtype=shapes.STORAGE[e.dtype], device="meta").to(memory_format=like)
                   for size in sizes)  # fmt: skip
        assert f"_{e.op}_" in torch.ops.conv2d_ext.kernels()[e.chosen(x, w, y)]
        seen.add((e.file, e.kernel, e.op, e.what))
    assert len(seen) == len(bounds.ENTRIES)


def metrics(bounds: Any, **given: float) -> dict[str, float]:
    names = {name.split()[0]: metric for _, name, metric in bounds.BUSY}
    names |= {reason: bounds.STALL.format(reason) for reason in (*bounds.STALLS, *bounds.NO_STALLS)}
    return dict.fromkeys(bounds.metric_names(), 0.0) | {names.get(name, name): value for name, value in given.items()}


def test_the_busiest_part_bounds_a_kernel_or_else_what_warps_wait_for(bounds: Any) -> None:
    assert bounds.bound_by(metrics(bounds, DRAM=61, tensor=74, barrier=3)) == "tensor cores"
    assert bounds.bound_by(metrics(bounds, DRAM=61, L2=74)) == "DRAM"  # through L2
    assert bounds.bound_by(metrics(bounds, DRAM=59, L2=74)) == "L2"
    idle = metrics(bounds, DRAM=59, tensor=40, barrier=1, wait=3, not_selected=4)
    assert bounds.bound_by(idle) == "waits for its last instruction"
    assert bounds.stalls(idle)[:2] == [(37.5, "wait"), (12.5, "barrier")]


def page(bounds: Any, *launches: tuple[int, str, float]) -> str:
    """A raw page as ncu prints it."""
    names = ["ID", "Kernel Name", "Push/Pop_Range", *bounds.metric_names()]
    rows = [names, [""] * len(names)]
    for entry, kernel, ns in launches:
        rest = ["1,000"] * (len(names) - 4)
        rows.append(["0", kernel, f"<default domain>:{bounds.RANGE.format(entry)}:none", f"{ns:,.0f}", *rest])
    return "==PROF== Connected\n" + "\n".join(",".join(f'"{field}"' for field in row) for row in rows) + "\n"


def test_of_an_entrys_launches_the_longest_of_its_kernel_counts(bounds: Any) -> None:
    text = page(bounds, (3, "void conv2d_ext::pack::pack_kernel<2>(Params)", 9000),
                (3, "void conv2d_ext::tma::tma_kernel<__half, 128>(Params)", 2000),
                (3, "void conv2d_ext::tma::tma_kernel<__half, 128>(Params)", 3000),
                (4, "void conv2d_ext::tma::tma_kernel<__half, 128>(Params)", 4000),
                (5, "void kernel<3>(WgradParams)", 5000), (5, "void tma::kernel<3>(WgradParams)", 6000))  # fmt: skip
    launches = bounds.parsed(text)
    assert len(launches) == 6
    assert bounds.longest(launches, 5, "tf32::halo::kernel")[bounds.NANOSECONDS] == 5000
    assert bounds.longest(launches, 3, "tma::tma_kernel")[bounds.NANOSECONDS] == 3000
    assert bounds.longest(launches, 3, "tma::tma_kernel")[bounds.REGISTERS] == 1000
    assert bounds.longest(launches, 4, "pack::pack_kernel") is None


def test_parts_are_joined_into_one_table(bounds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = [bounds.selected([], (i, 3)) for i in (1, 2, 3)]
    assert sorted(sum(numbers, [])) == list(range(len(bounds.ENTRIES)))
    files = []
    for i in (2, 0):
        e = bounds.ENTRIES[i]
        result = {"file": e.file, "kernel": e.kernel, "op": e.op, "layer": e.what, "row": "tma_op_f16_128x128_im2col"}
        measured = metrics(bounds, L2=70, wait=3, barrier=1) | {bounds.NANOSECONDS: 12_340.0}
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps({"machine": {"gpu": "A"}, "results": [result | {"metrics": measured}]}))
    assert bounds.main(["--join", *map(str, files)]) == 0
    gpu, _, _, _, first, second = capsys.readouterr().out.splitlines()
    assert gpu == "gpu A" and "L04" in first and "L08" in second
    assert (
        first.startswith("| tma.cuh: tma_kernel |")
        and "| 128x128_im2col | 12.3 | 0 | 70 |" in first
        and first.endswith("| wait 75, barrier 25 | L2 |")
    )


def test_without_a_gpu_or_ncu_bounds_says_so(bounds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and bounds.shutil.which("ncu"):
        pytest.skip("there is a GPU, and ncu")
    assert bounds.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


# ---- first_call ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "firsts, laters, over",
    [
        ([1500, 1490, 1520, 1510, 1480, 1500, 1490, 1530], [20] * 8, [0]),  # a steady millisecond and more
        ([1500, 1400, 300], [20, 25, 20], []),  # the third process: the first two times were the host's
        ([1500, 1490, 1520, 1510, 1480, 1500, 1490, 1530], [20] + [1400] * 7, [0]),  # slow later calls excuse nothing
        ([900], [20], []),
    ],
)
def test_a_first_call_is_over_the_limit_if_no_process_is_faster(
    first_call: Any, firsts: list[float], laters: list[float], over: list[int]
) -> None:
    answers = iter(zip(firsts, laters, strict=True))

    def again(asked: list[int]) -> list[tuple[float, ...]]:
        first, later = next(answers)
        return [(0, first, 0, later, 0)] * len(asked)

    times = [first_call.Times(*again([0])[0]), first_call.Times(0, 30, 0, 20, 0)]
    assert first_call.repeated(times, 1000, again) == over
    assert times[0].first == min(firsts) and times[1].first == 30
    assert next(answers, None) is None


def test_without_a_gpu_first_call_says_so(first_call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert first_call.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


# ---- eager -----------------------------------------------------------------------------------------------------------


def test_eager_calls_are_timed_beside_torchs(
    eager: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.cuda.is_available():
        assert eager.main([]) == 2
        assert "no GPU" in capsys.readouterr().err
        return
    monkeypatch.setattr(eager, "LAYERS", dict(list(eager.LAYERS.items())[:1]))
    assert eager.main(["--calls", "20"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("1x1") and all(float(word) > 0 for word in line.replace("/", " ").split()[1:])


# ---- networks --------------------------------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--networks", "small", "--batches", "8", "--dtypes", "fp32", "--how", "eager"]


def test_networks_are_those_that_were_published(networks: Any) -> None:
    """By their parameters, in thousands."""
    known = {
        **{"resnet50": 25_557, "resnext50": 25_029, "regnety": 6_433, "mobilenetv2": 3_505, "efficientnet": 5_289},
        **{"densenet121": 7_979, "vgg16": 138_358, "yolo": 11_167},
    }
    for name, (build, size, _) in networks.NETWORKS.items():
        with torch.device("meta"):
            network, x = build(), torch.empty(2, *size)
        assert len(network(x)) == 2 and sum(networks.layers_of(network, x).values()) >= 1
        if name in known:
            assert round(sum(p.numel() for p in network.parameters()) / 1000) == known[name]


def test_networks_are_checked_and_timed(networks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert networks.main([*SMALL, "--json", str(tmp_path / "a.json")]) == 0
    cells = json.loads((tmp_path / "a.json").read_text())["cells"]
    assert [(c["mode"], c["images"], c["status"]) for c in cells] == [("infer", 4, "ok"), ("train", 4, "ok")]
    assert all(0 < c["error"] <= 1 and min(c["ms"]["eager"]) > 0 for c in cells)
    assert all(0 < part < whole for c in cells for part, whole in zip(c["conv_ms"], c["gpu_ms"], strict=True))
    assert "eager: " in capsys.readouterr().out


@pytest.mark.parametrize("gradient_alone", (False, True))
def test_networks_that_differ_have_no_time(
    networks: Any, gradient_alone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Tensor, w: Tensor, *args: Any) -> Tensor:
        if w.shape[1:] != (4, 3, 3):
            return torch.nn.functional.conv2d(x, w, *args)
        scaled = w * torch.tensor([0.99, 1, 1, 1]).reshape(4, 1, 1)
        return torch.nn.functional.conv2d(x, scaled + (w - scaled).detach() if gradient_alone else scaled, *args)

    monkeypatch.setattr("conv2d_ext.modules.conv2d", wrong)
    assert networks.main(SMALL) == 1
    assert "FAIL" in capsys.readouterr().out


def test_networks_layers_are_listed(networks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks.main([*SMALL, "--layers", "--json", str(tmp_path / "a.json")])
    layers = json.loads((tmp_path / "a.json").read_text())["layers"]
    assert len(layers) == 3 * 15 - 1 and {layer["op"] for layer in layers} == set(OPS)  # the images' has no dgrad
    assert max(layer["times"] for layer in layers) == 3
    lost = [layer["lost_us"] for layer in layers]
    assert lost == sorted(lost, reverse=True) and "4x8x8x8 8x3x3" in capsys.readouterr().out


# ---- collect ---------------------------------------------------------------------------------------------------------


def test_convolutions_of_a_network_are_collected_but_for_images_of_one_pixel(programs: tuple[Any, ...]) -> None:
    collect, nn = programs[9], torch.nn
    conv, pixel = nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1))
    layers = [conv, nn.Conv2d(8, 8, (1, 5), padding=(0, 4), dilation=(1, 2), groups=4), nn.ConvTranspose2d(8, 8, 2, 2)]
    found = collect.convolutions(lambda: nn.Sequential(*layers, nn.Conv2d(8, 8, 1), pixel), (3, 9, 9))
    first, second = (3, 9, 9, 8, 3, 3, 2, 2, 1, 1, 1, 1, 1), (8, 5, 5, 8, 1, 5, 1, 1, 0, 4, 1, 2, 4)
    assert found == {first, second, (8, 10, 10, 8, 1, 1, 1, 1, 0, 0, 1, 1, 1)}
    data = json.loads(collect.text(["a", "b"], collections.Counter({second: 1, first: 2}), "torch 2"))
    assert data["layers"] == [[*first, 2], [*second, 1]] and data["networks"] == ["a", "b"]
    assert len(data["columns"]) == len(first) + 1 and bench.data("networks")["columns"] == data["columns"]


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_tables_are_written_from_results_and_others_kept(tables: Any, tmp_path: Path) -> None:
    def cell(op: str, ratio: float | None) -> dict[str, Any]:
        return {"kind": "dense", "dtype": "fp16", "layout": "nhwc", "op": op, "ratio": ratio}

    cells = [cell("fprop", 2.0), cell("fprop", 0.5), cell("dgrad", 4.0), cell("wgrad", None)]
    data = {"machine": {"date": "2026-11-28 05:56 UTC"}, "cells_planned": 4, "cells": cells}
    (tmp_path / "dense-f16-nhwc.json").write_text(json.dumps(data))
    (tmp_path / "dense-f16-nhwc.md").write_text("`python -m conv2d_ext bench --json x`\n\nthe cells\n")
    (tmp_path / "dense-f16-nhwc.commit").write_text("abc1234\n")
    page_file, readme = tmp_path / "bench.md", tmp_path / "README.md"
    kept = tables.TABLES[1].title
    row = "| bfloat16, dense, channels_last | 1.41 | 1.29 | 1.33 | 99 | 0 | 11-28 05:56, b6d1019 |"
    means = "\n".join([f"## {tables.MEANS}", *tables.MEANS_HEAD, row, ""])
    page_file.write_text(f"# Benchmark\n\n{means}\n## {kept}\nold cells\n\n## A table of before\nits cells\n")
    begin, end = tables.BEGIN.format("speed"), tables.END.format("speed")
    readme.write_text("\n".join(["before", begin, "an older table", end, "after", ""]))
    tables.write(tmp_path, page_file, readme)

    page = page_file.read_text()
    assert f"## {kept}\nold cells\n" in page and page.endswith("\n## A table of before\nits cells\n")
    command = "python -m conv2d_ext bench --layers dense --dtypes fp16 --layouts nhwc --budget 80"
    assert f"## {tables.TABLES[0].title}\n`{command}`, commit abc1234\n\nthe cells\n" in page
    new = "| float16, dense, channels_last | 1.00 | 4.00 | - | 3 of 4 | 1, least 0.50 | 11-28 05:56, abc1234 |"
    assert "\n".join([f"## {tables.MEANS}", *tables.MEANS_HEAD, row, new, "", ""]) in page
    table = [
        "| | 16 bits | TF32 | float32 (TF32 off) |",
        "|" + "---|" * 4,
        "| dense | 1.36 (1 of 102, least 0.50) | - | - |",
    ]
    assert readme.read_text().splitlines() == ["before", begin, *table, end, "after"]

    # Drawn layers have a row a layout, of all kinds.
    drawn = {"machine": data["machine"], "cells_planned": 9000, "cells": [*cells, cell("fprop", 3.0) | {"kind": "few"}]}
    (label,) = tables.mean_rows(tables.Table("a", "b", "all", "fp16", "nhwc", 9, drawn=True), drawn, "abc1234").items()
    assert label == (
        "float16, drawn from networks, channels_last",
        "| float16, drawn from networks, channels_last | 1.44 | 4.00 | - | 4 | 1, least 0.50 | 11-28 05:56, abc1234 |",
    )

    readme.write_text("no place for a table\n")
    with pytest.raises(SystemExit, match="expected the lines"):
        tables.write(tmp_path, page_file, readme)


def test_tables_name_kernelbenchs_losses(tables: Any) -> None:
    def row(name: str, eager: float) -> dict[str, Any]:
        return {
            "problem": name,
            "input": "1x1x1x1",
            **dict.fromkeys(("ours", "eager", "compiled"), {"mean": 1.0}),
            "speedup": {"eager": eager, "compile": 2.0},
            "correctness": {"passed": 5, "trials": 5, "float64": {"passed": True, "rounded": False}},
        }

    data = {
        "conditions": {"date": "today", "gpu": None},
        "problems": [row("p82_depthwise_3x3", 4.0), row("p87_pointwise", 0.9)],
        "summary": {
            "problems": 2,
            "correct": {"harness": 2},
            "geometric_mean_speedup": {"eager": 1.9, "compile": 2.0},
        },
    }
    page = tables.kernelbench_section(data, "abc1234")
    assert "harness: 2 of 2" in page and "82 to 86 4.00x of eager" in page
    assert "Slower than eager: p87_pointwise 0.90." in page and "gpu" not in page


def test_tables_of_networks_are_written(tables: Any, networks: Any, tmp_path: Path) -> None:
    def cell(mode: str, **ms: list[float]) -> dict[str, Any]:
        fields = {"error": 0.5, "ms": ms, "gpu_ms": [2.0, 4.0], "conv_ms": [1.0, 3.0], "gib": [0.5, 1.0]}
        return dataclasses.asdict(networks.Cell("resnet50", mode, "fp16", "nhwc", 32, **fields))

    facts = {"date": "2026-11-28 22:12 UTC", "gpu": "H200", "torch": "2.11", "cudnn": 91900}
    cells = [cell("infer", eager=[2.0, 1.0], graph=[1.0, 2.0]), cell("train", eager=[4.0, 5.0])]
    (tmp_path / "networks.json").write_text(json.dumps({"machine": facts, "cells": cells}))
    (tmp_path / "networks.commit").write_text("abc1234\n")
    page, readme = tmp_path / "bench.md", tmp_path / "README.md"
    places = [mark.format(name) for name in ("speed", "networks") for mark in (tables.BEGIN, tables.END)]
    readme.write_text("\n".join([*places, ""]))
    tables.write(tmp_path, page, readme)
    row = (
        "| resnet50 | infer | fp16 | nhwc | 32 | graph | 32000 | 16000 | 2.00 | 50%/75% | 3.00 | 0.50/1.00 | 0.50 |  |"
    )
    assert "## Whole networks" in page.read_text() and row in page.read_text()
    assert "| resnet50 | 0.50 | 2.00 | 1.25 | - | 75% |" in readme.read_text().splitlines()
    options = networks.parser().parse_args(tables.NETWORKS_COMMAND[1:])
    assert options.batches == [32] and options.budget


def test_tables_commands_are_those_that_bench_takes(tables: Any, tmp_path: Path) -> None:
    for table in tables.TABLES:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        options = parser.parse_args(table.arguments[1:])
        assert bench.select_layers(bench.draw_layers(0) if table.drawn else bench.load_layers(), options.layers)
        assert (options.list == "networks") == table.drawn
        assert set(options.dtypes) <= set(bench.STORAGE) and set(options.layouts) <= set(bench.LAYOUTS)
    assert all(Path(tables.command_of(name, tmp_path)[0]).suffix in ("", ".py") for name in tables.NAMES)
    with pytest.raises(SystemExit):
        tables.main(["--run", str(tmp_path), "--only", "no-such-table"])


# ---- large -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", "NHW")
def test_cases_are_scaled_beyond_2_to_the_31_elements_and_differences_are_placed(
    programs: tuple[Any, ...], axis: str
) -> None:
    large = programs[8]
    for case in (BY_NAME["3x3"], BY_NAME["1x1"]):
        scaled = large.scaled(case, axis)
        most = max(scaled.N * scaled.C * scaled.H * scaled.W, scaled.N * scaled.K * scaled.P * scaled.Q)
        assert 2**31 < most < 2**31 * 1.2 and (axis == "N" or scaled.N == 1)
    got, expected = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    got[1, 2, 0:3, 4], got[1, 2, 1, 4] = 1, torch.nan
    assert large.difference(got, expected) == "3 of 120 differ, 1 are NaN; N 1 to 1, C 2 to 2, H 0 to 2, W 4 to 4"
