"""The parts of `python -m conv2d_ext bench` that need no GPU: layers, limits, statistics, and a small run on a CPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conv2d_ext import cli
from conv2d_ext.cli import UsageError, bench
from conv2d_ext.cli.bench import Cell, Layer

LAYERS = bench.load_layers()
DRAWN = bench.draw_layers(0)
CONV2 = Layer("X", "ResNet-50", "layer1.0.conv2", 2, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1, False)


def cell(
    ours_ms: float | None,
    theirs_ms: float | None,
    layer: Layer = CONV2,
    dtype: str = "fp16",
    layout: str = "nchw",
    op: str = "fprop",
) -> Cell:
    return Cell(layer, dtype, layout, op, ours_ms=ours_ms, theirs_ms=theirs_ms, limit_ms=0.5)


@pytest.mark.parametrize(
    "layer", [*LAYERS, *DRAWN[:40], *map(bench.shrink, LAYERS)], ids=lambda layer: f"{layer.id}-{layer}"
)
def test_output_sizes_are_those_of_torch(layer: Layer) -> None:
    x = torch.empty(layer.N, layer.C, layer.H, layer.W, device="meta")
    w = torch.empty(layer.K, layer.C // layer.groups, layer.R, layer.S, device="meta")
    y = F.conv2d(x, w, None, layer.stride, layer.pad, layer.dilation, layer.groups)
    assert y.shape == (layer.N, layer.K, layer.P, layer.Q)
    assert layer.elements == x.numel() + w.numel() + y.numel()
    assert layer.flops == 2 * y.numel() * layer.reduction("fprop")
    assert layer.flops == 2 * w.numel() * layer.reduction("wgrad")


def test_layers_have_ids_of_their_own_and_cover_all_kinds_and_subsets() -> None:
    assert len({layer.id for layer in LAYERS}) == len(LAYERS) > 0
    assert {layer.kind for layer in LAYERS} == set(bench.KINDS)
    assert {name for layer in LAYERS for name in layer.subsets} == set(bench.SUBSETS)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.id)
def test_a_shrunk_layer_keeps_kind_and_geometry(layer: Layer) -> None:
    small = bench.shrink(layer)
    assert small.kind == layer.kind
    assert (small.R, small.S, small.stride, small.dilation, small.pad) == (
        layer.R,
        layer.S,
        layer.stride,
        layer.dilation,
        layer.pad,
    )
    assert small.P >= 1 and small.Q >= 1 and small.flops <= layer.flops


@pytest.mark.parametrize(
    ("channels", "filters", "groups", "kind"),
    [
        (64, 64, 1, "dense"),
        (3, 64, 1, "few"),
        (64, 16, 1, "few"),
        (64, 64, 64, "depthwise"),
        (64, 128, 64, "depthwise"),
        (64, 64, 32, "grouped"),
    ],
)
def test_kind_follows_from_channels_and_groups(channels: int, filters: int, groups: int, kind: str) -> None:
    assert replace(CONV2, C=channels, K=filters, groups=groups).kind == kind


def test_layers_are_selected_by_id_kind_and_subset() -> None:
    assert bench.select_layers(LAYERS, ["all"]) == LAYERS
    assert [layer.id for layer in bench.select_layers(LAYERS, ["L03", "L01"])] == ["L01", "L03"]
    assert {layer.kind for layer in bench.select_layers(LAYERS, ["dense"])} == {"dense"}
    assert all(layer.N == 1 for layer in bench.select_layers(LAYERS, ["batch1"]))
    with pytest.raises(UsageError, match="'densest'"):
        bench.select_layers(LAYERS, ["densest"])


def test_layers_of_networks_are_drawn_by_how_many_networks_have_them() -> None:
    assert bench.draw_layers(0) == DRAWN != bench.draw_layers(1)
    found = bench.data("networks")
    assert len(DRAWN) > 2.5 * len(found["layers"]) and len({layer.id for layer in DRAWN}) == len(DRAWN)
    assert all(len(row) == len(found["columns"]) and 1 <= row[-1] <= len(found["networks"]) for row in found["layers"])
    assert all(min(layer.P, layer.Q) >= 1 and layer.N in bench.BATCHES for layer in DRAWN)
    early, all_of_them = (
        sum(float(layer.network.split()[0]) for layer in some) / len(some) for some in (DRAWN[: len(DRAWN) // 4], DRAWN)
    )
    assert early > 1.5 * all_of_them
    assert {layer.kind for layer in bench.select_layers(DRAWN, ["grouped"])} == {"grouped"}


def test_the_limit_is_the_larger_of_both_times() -> None:
    assert bench.limit(flops=100, nbytes=10, peak=10, bandwidth=10) == (10, "math")
    assert bench.limit(flops=100, nbytes=1000, peak=10, bandwidth=10) == (100, "memory")


def test_geomean_is_the_root_of_the_product_and_none_of_nothing() -> None:
    assert bench.geomean([0.5, 2.0]) == pytest.approx(1.0)
    assert bench.geomean([1.0, 8.0, 1.0]) == pytest.approx(2.0)
    assert bench.geomean([]) is None


def test_repeats_fill_40_ms_within_bounds() -> None:
    assert bench.repeats_for(1e-6, None) == 50
    assert bench.repeats_for(2e-3, None) == 20
    assert bench.repeats_for(2e-2, None) == 5
    assert bench.repeats_for(0.5, None) == 3
    assert bench.repeats_for(0.5, 7) == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tolerance_passes_one_rounding_and_fails_half_precision_sums(dtype: torch.dtype) -> None:
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    terms = torch.randn(576, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = terms.sum(0)
    chain = torch.zeros(1000, dtype=dtype)
    for row in terms.to(dtype):
        chain += row
    allowed = bench.tolerance(name, 576)
    assert bench.relative_error(exact.to(dtype), exact) < allowed
    assert bench.relative_error(chain, terms.to(dtype).double().sum(0)) > allowed


def test_the_tolerance_of_tf32_fails_truncated_operands_and_passes_rounded_ones() -> None:
    source = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 200, generator=source) for _ in range(2))
    exact = a.double() @ b.double()

    def cut(t: torch.Tensor, add: int) -> torch.Tensor:
        return ((t.view(torch.int32) + add) & ~0x1FFF).view(torch.float32).double()

    allowed = bench.tolerance("tf32", 200)
    assert bench.relative_error(cut(a, 0x1000) @ cut(b, 0x1000), exact) < allowed
    assert bench.relative_error(cut(a, 0) @ cut(b, 0), exact) > allowed


def test_nan_and_a_wrong_shape_are_errors_that_no_tolerance_passes() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    assert math.isnan(bench.relative_error(torch.tensor([1.0, math.nan, 1.0]), ones))
    assert math.isnan(bench.relative_error(torch.ones(1), ones))


def test_ratio_and_shares_follow_from_the_times() -> None:
    one = cell(1.0, 2.0)
    assert one.ratio == 2.0 and one.share == 0.5 and one.share_theirs == 0.25
    assert one.tflops == pytest.approx(CONV2.flops / 1e-3 / 1e12)
    assert cell(None, 2.0).ratio is None and cell(1.0, None).ratio is None


def test_the_summary_groups_cells_and_counts_the_slower_ones() -> None:
    few = replace(CONV2, C=3)
    cells = [cell(1.0, 4.0), cell(1.0, 1.0, op="dgrad"), cell(1.0, 0.5, few, "bf16", "nhwc"), cell(None, 1.0)]
    found = {(row["group"], row["value"]): row for row in bench.summarize(cells)}
    assert found["all", ""]["cells"] == 3 and found["all", ""]["slower"] == 1
    assert found["all", ""]["ratio"] == pytest.approx(2.0 ** (1 / 3))
    assert found["dtype", "fp16"]["ratio"] == pytest.approx(2.0)
    assert found["kind", "few"]["least_ratio"] == 0.5
    assert ("op", "wgrad") not in found and ("subset", "batch1") not in found
    columns, rows = bench.cross(cells, "ratio")
    assert columns == ["fprop/dgrad", "fp16 nchw", "bf16 nhwc"]
    assert rows == [["dense", "4.00/1.00", "-/-"], ["few", "-/-", "0.50/-"]]


def test_a_summary_of_nothing_is_empty() -> None:
    assert bench.cross([], "share")[1] == []
    assert bench.summarize([cell(None, None)]) == []
    assert bench.markdown([cell(None, None)], "line", "interrupted", "command").count("Not complete: interrupted.") == 1


def test_cells_that_share_data_are_neighbours() -> None:
    cells = bench.plan_cells([CONV2], ["fp16", "tf32", "fp32"], ["nchw", "nhwc"], ["fprop", "wgrad"])
    assert len(cells) == 12
    keys = [(bench.STORAGE[c.dtype], c.op) for c in cells]
    assert len({key for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key}) == len(set(keys)) == 4


def run(*words: str) -> int:
    return cli.main(["bench", "--device", "cpu", "--small", "--repeats", "1", *words])


def test_a_small_run_on_a_cpu_writes_all_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "bench.json", tmp_path / "bench.md"
    assert run("--layers", "L08,L20", "--json", str(file), "--markdown", str(page)) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found["cells"]) == 12 and {c["status"] for c in found["cells"]} == {"ok"}
    assert found["stopped"] == "" and found["machine"]["torch"] == torch.__version__
    assert page.read_text(encoding="utf-8").count("| L08 |") == 6
    assert "12 of 12 cells" in capsys.readouterr().out


def test_drawn_layers_are_timed_as_drawn_and_shown_slowest_first(tmp_path: Path) -> None:
    images = next(layer for layer in DRAWN if layer.C == 3)
    wanted = [layer for layer in DRAWN if layer.id in (images.id, DRAWN[0].id, DRAWN[1].id)]
    file, page = tmp_path / "bench.json", tmp_path / "bench.md"
    words = ["--list", "networks", "--layers", ",".join(layer.id for layer in reversed(wanted))]
    assert run(*words, "--json", str(file), "--markdown", str(page)) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found["cells"]) == found["cells_planned"] == 6 * len(wanted) - 2
    assert list(dict.fromkeys(c["layer"] for c in found["cells"])) == [layer.id for layer in wanted]
    assert all(c["op"] != "dgrad" for c in found["cells"] if c["layer"] == images.id)
    rows = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if " | cpu | " in line]
    ratios = [float(row[8]) for row in rows]
    assert ratios == sorted(ratios) and len(ratios) == len(found["cells"])


def test_a_wrong_result_is_shown_without_a_time_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: torch.Tensor, w: torch.Tensor, *rest: Any) -> torch.Tensor:
        return F.conv2d(x, w, *rest) * 1.001

    monkeypatch.setattr(bench.conv2d_ext, "conv2d", wrong)
    file = tmp_path / "bench.json"
    assert run("--layers", "L08", "--ops", "fprop", "--layouts", "nchw", "--json", str(file)) == 1
    (found,) = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert found["status"] == "FAIL" and found["ours_ms"] is None
    assert "FAIL: error 1.00e-03 against float64" in capsys.readouterr().out


def test_an_error_of_one_cell_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*rest: object) -> torch.Tensor:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(bench.conv2d_ext, "conv2d", broken)
    assert run("--layers", "L08", "--ops", "fprop") == 1
    out = capsys.readouterr().out
    assert "error: no such thing" in out and "2 of 2 cells" in out


def test_a_spent_budget_stops_before_the_next_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--layers", "L08", "--budget", "0") == 0
    assert "0 of 6 cells" in (out := capsys.readouterr().out) and "budget of 0 s is spent" in out


@pytest.mark.parametrize(
    "words",
    [("--dtypes", "fp8"), ("--dtypes", "tf32"), ("--layouts", "hwcn"), ("--ops", ""), ("--kernel", "no_such_row")],
)
def test_what_cannot_be_run_is_refused_by_name(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert words[0] in capsys.readouterr().err
