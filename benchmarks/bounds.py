"""What bounds each kernel: a typical layer of each under Nsight Compute, and a table of what was busy.

    python benchmarks/bounds.py                                  # all of them, in one run of ncu
    python benchmarks/bounds.py --only tma,grouped               # those whose file or kernel has one of these words
    python benchmarks/bounds.py --part 1/2 --json a.json         # every second one; with the other half in b.json,
    python benchmarks/bounds.py --join a.json b.json             # the table of both, which needs no GPU

A kernel is profiled within one call of an op, beside whatever else the call launches; of several launches of it the
longest counts. ncu empties the caches before every pass and leaves the clocks alone. Percentages are of the hardware's
peak; a copy reaches some 89 % of DRAM's. `bound_by` is the rule that names a bound. Exit status 1: a kernel was not
launched, since a launcher or the planner decides otherwise than when its entry was written.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]  # Python may have left the script's own folder out

import shapes  # noqa: E402
from cases import Case  # noqa: E402
from sweep import operands  # noqa: E402

from conv2d_ext.cli import bench, markdown_table  # noqa: E402
from conv2d_ext.cli.info import machine  # noqa: E402

# ---- which kernel, on which layer ------------------------------------------------------------------------------------

_LISTED = {
    layer.id: Case(layer.id, layer.N, layer.C, layer.H, layer.W, layer.K, layer.R, layer.S,
                   layer.stride, layer.pad, layer.dilation, layer.groups, bias=False)
    for layer in bench.load_layers()
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kernel, and a call that launches it."""

    file: str  # of csrc/cuda, without its ending
    kernel: str  # namespace and function
    op: str
    layer: str | Case  # of the list, or another
    dtype: str
    layout: str
    row: str = ""  # pattern of its name: of the rows that match, the planner's choice, or else the one estimated best

    @property
    def case(self) -> Case:
        return _LISTED[self.layer] if isinstance(self.layer, str) else self.layer

    @property
    def what(self) -> str:
        shape = self.layer if isinstance(self.layer, str) else shapes.text(self.layer)
        return f"{shape} {self.layout} {self.dtype}"

    def chosen(self, x: Tensor, w: Tensor, y: Tensor) -> int:
        """The row's number, for these tensors. ValueError: no such row supports the layer."""
        planned, estimates = shapes.plan(self.op, self.case, x, w, y, self.dtype == "tf32")
        names = torch.ops.conv2d_ext.kernels()
        fitting = [row for row in estimates if re.search(self.row, names[row])]
        if not fitting:
            raise ValueError(f"{self.kernel}: no row like {self.row!r} supports {self.op} of {self.what}")
        return planned if planned in fitting else min(fitting, key=lambda row: estimates[row])


def dense(N: int, C: int, H: int, K: int, R: int, stride: int = 1) -> Case:
    return Case("dense", N, C, H, H, K, R, R, (stride, stride), (R // 2, R // 2), bias=False)


def depthwise(N: int, C: int, H: int, R: int, stride: int = 1, dilation: int = 1) -> Case:
    pad = R // 2 * dilation
    return Case("dw", N, C, H, H, C, R, R, (stride, stride), (pad, pad), (dilation, dilation), C, bias=False)


STRIDED = depthwise(64, 96, 28, 3, 2)
ODD_STRIDED = depthwise(32, 192, 75, 5, 2)
DILATED = depthwise(32, 256, 32, 3, 1, 2)
TRIPLE = depthwise(64, 96, 56, 3, 3)  # a stride of 3
ODD_TRIPLE = depthwise(32, 128, 57, 3, 3)  # and rows that no vector fits
APART = depthwise(168, 16, 60, 9, 9)  # filters that do not meet
SPARSE = depthwise(8, 240, 18, 5, 3, 2)  # few outputs, far apart
ONE_OUTPUT = Case("dw", 128, 512, 7, 7, 512, 7, 7, groups=512, bias=False)
LONG_ROWS = Case("dw", 4, 64, 64, 3000, 64, 11, 11, (3, 3), (4, 4), (2, 2), 64, bias=False)  # too long to be staged
FAR = Case("dense", 4, 128, 64, 300, 128, 3, 3, (1, 1), (1, 140), (1, 140), bias=False)  # beyond im2col's reach
ONE_IMAGE = Case("groups", 1, 512, 14, 14, 512, 3, 3, padding=(1, 1), groups=32, bias=False)
STRIDED_GROUPS = Case("groups", 64, 128, 20, 20, 128, 3, 3, (2, 2), (1, 1), groups=4, bias=False)
SMALL_GROUPS = Case("groups", 64, 672, 7, 7, 672, 3, 3, padding=(1, 1), groups=42, bias=False)
PATCHES = Case("dense", 32, 64, 224, 224, 64, 7, 7, (7, 7), bias=False)
ODD_PLANES = dense(8, 64, 149, 96, 1)
UNPADDED = Case("dw", 16, 64, 512, 512, 64, 3, 3, groups=64, bias=False)  # KernelBench's 82

ENTRIES = (
    Entry("tma", "tma::tma_kernel", "fprop", "L04", "fp16", "nhwc", "im2col"),
    Entry("tma", "tma::tma_kernel", "dgrad", "L04", "fp16", "nhwc", "im2col"),
    Entry("tma", "tma::tma_kernel", "fprop", "L08", "fp16", "nhwc", "im2col"),
    Entry("tma", "tma::tma_kernel", "fprop", "L07", "fp16", "nhwc", "im2col"),
    Entry("tma_small", "tma::small_kernel", "fprop", dense(2, 1920, 16, 1280, 1), "fp16", "nhwc", "64x"),
    Entry("tma_matrix", "tma::matrix_kernel", "fprop", dense(8, 1920, 14, 896, 1), "fp16", "nhwc", "lines"),
    Entry("tma_matrix", "tma::matrix_sums", "wgrad", dense(32, 672, 24, 160, 1), "fp16", "nhwc", "lines"),
    Entry("tma_matrix", "tma::matrix_sums_shifted", "wgrad", dense(128, 570, 14, 106, 1), "fp16", "nhwc", "lines"),
    Entry("tma_resident", "tma::resident_kernel", "fprop", "L07", "fp16", "nhwc", "64x128"),
    Entry("tma_lean", "tma::lean_kernel", "fprop", dense(2, 1920, 16, 1280, 1), "fp16", "nhwc", "lean"),
    Entry("tma_lean", "tma::lean_groups_kernel", "fprop", STRIDED_GROUPS, "fp16", "nhwc", "lean"),
    Entry("tma_lean_gather", "tma::lean_gather_kernel", "fprop", dense(8, 1024, 14, 256, 1), "fp16", "nchw", "lean"),
    Entry("tma_lean_tf32", "tma::lean_turned_kernel", "dgrad", dense(1, 1024, 14, 256, 1), "tf32", "nhwc", "lean"),
    Entry("tma_lean_tf32", "tma::lean_turned_groups_kernel", "dgrad", ONE_IMAGE, "tf32", "nhwc", "lean"),
    Entry("tma_lean_tf32", "tma::lean_phases_kernel", "dgrad", dense(1, 256, 28, 512, 3, 2), "tf32", "nhwc", "lean"),
    Entry("tma_lean_tf32", "tma::lean_sums_kernel", "wgrad", dense(8, 1024, 14, 256, 1), "tf32", "nhwc", "lean"),
    Entry("tma_lean_tf32", "tma::lean_sums_second", "wgrad", dense(8, 128, 64, 64, 1), "tf32", "nhwc", "lean"),
    Entry("tma_lean_tf32", "tma::lean_sums_shifted", "wgrad", dense(128, 117, 14, 702, 1), "tf32", "nhwc", "lean"),
    Entry("tma", "tma::tma_kernel", "fprop", "L07", "fp16", "nchw", "pointwise"),
    Entry("tma_planes", "tma::planes_kernel", "fprop", "L06", "fp16", "nchw", "240x64_nchw"),
    Entry("tma_planes", "tma::planes_kernel", "fprop", "L48", "fp16", "nchw", "240x64_nchw"),
    Entry("tma", "tma::tma_kernel", "fprop", "L09", "fp16", "nchw", "im2col"),
    Entry("tma", "tma::tma_kernel", "fprop", "L09", "tf32", "nhwc", "im2col"),
    Entry("tma", "tma::tma_reduce", "fprop", "L47", "fp16", "nhwc", "128x128_im2col"),
    Entry("tma_swap", "tma::tma_swap_kernel", "fprop", "L06", "fp16", "nhwc", "256x64_halo"),
    Entry("tma_swap", "tma::tma_swap_kernel", "fprop", "L06", "fp16", "nchw", "256x64_halo"),
    Entry("tma_swap", "tma::tma_swap_kernel", "dgrad", "L08", "fp16", "nhwc", "256x64_halo"),
    Entry("tma_swap", "tma::tma_swap_kernel", "fprop", "L06", "tf32", "nhwc", "256x64_halo"),
    Entry("tma_swap_wide", "tma::tma_swap_wide_kernel", "fprop", "L12", "fp16", "nhwc", "144x192_im2col"),
    Entry("tma_swap_wide", "tma::tma_swap_wide_kernel", "dgrad", dense(64, 256, 14, 256, 3), "fp16", "nhwc", "192x128"),
    Entry("tma_phases", "tma::phases_kernel", "dgrad", "L39", "fp16", "nhwc", "phases"),
    Entry("tma_classes", "tma::classes_kernel", "dgrad", "L08", "fp16", "nhwc", "256x128_halo"),
    Entry("tma_held", "tma::held_kernel", "dgrad", "L08", "fp16", "nhwc", "256x96_halo"),
    Entry("tma_held_ahead", "tma::ahead_kernel", "fprop", "L06", "fp16", "nhwc", "256x96_halo"),
    Entry("tma_held_part", "tma::part_kernel", "fprop", dense(128, 128, 28, 128, 3), "fp16", "nhwc", "256x96_halo"),
    Entry("tma_lag", "tma::lag_kernel", "fprop", dense(64, 512, 28, 512, 1), "fp16", "nhwc", "128x256_im2col"),
    Entry("tma_zeros", "tma::zeros_kernel", "dgrad", "L10", "fp16", "nhwc", "tma_.*128x256_im2col"),
    Entry("tma_wgrad", "tma::wgrad_kernel", "wgrad", "L04", "fp16", "nhwc", "im2col"),
    Entry("tma_wgrad", "tma::wgrad_kernel", "wgrad", "L06", "fp16", "nhwc", "halo"),
    Entry("tma_wgrad", "tma::wgrad_kernel", "wgrad", "L39", "fp16", "nhwc", "narrow"),
    Entry("tma_wgrad", "tma::wgrad_reduce", "wgrad", "L08", "fp16", "nhwc", "im2col"),
    Entry("tma_wgrad", "tma::wgrad_lag_kernel", "wgrad", "L46", "fp16", "nhwc", "128x256_im2col"),
    Entry("tma_sums", "tma::sums_kernel", "wgrad", dense(64, 128, 28, 512, 1), "fp16", "nhwc", "lean"),
    Entry("tma_sums", "tma::sums_reduce", "wgrad", dense(256, 64, 56, 64, 1), "fp16", "nhwc", "lean"),
    Entry("tma_planes_wgrad", "tma::planes_wgrad_kernel", "wgrad", "L03", "fp16", "nchw", "576x64_nchw"),
    Entry("tma_tf32", "tf32::raw_kernel", "dgrad", "L46", "tf32", "nhwc", "raw"),
    Entry("tma_tf32", "tf32::prepare_kernel", "dgrad", "L04", "tf32", "nhwc", "im2col|halo"),
    Entry("tma_planes_tf32", "planes_tf32::kernel", "fprop", "L03", "tf32", "nchw", "512x64_nchw"),
    Entry("tma_planes_tf32", "planes_tf32::kernel", "dgrad", "L49", "tf32", "nchw", "256x128_nchw"),
    Entry("tma_planes_tf32", "planes_tf32::pack_kernel", "fprop", "L49", "tf32", "nchw", "256x128_nchw"),
    Entry("tma_wgrad_tf32", "tf32::wgrad_kernel", "wgrad", "L04", "tf32", "nhwc", "im2col"),
    Entry("tma_wgrad_tf32", "tf32::wgrad_reduce", "wgrad", "L09", "tf32", "nhwc", "im2col"),
    Entry("tma_wgrad_tf32_halo", "tf32::halo::kernel", "wgrad", "L06", "tf32", "nhwc", "halo"),
    Entry("tma_wgrad_tf32_halo", "tf32::halo::reduce", "wgrad", "L06", "tf32", "nhwc", "halo"),
    Entry("tma_strict_wgrad", "strict_wgrad::kernel", "wgrad", "L04", "fp32", "nhwc", "strict_wgrad_f32_128x128"),
    Entry("winograd", "winograd::points_kernel", "wgrad", "L04", "fp32", "nchw", "tma_strict_wgrad_f32_2x2"),
    Entry("winograd", "winograd::weights_kernel", "wgrad", "L04", "fp32", "nchw", "tma_strict_wgrad_f32_2x2"),
    Entry("winograd", "winograd::outputs_kernel", "fprop", "L04", "fp32", "nhwc", "tma_strict_fprop_f32_2x2"),
    Entry("tma_strict", "strict::split_turned_kernel", "fprop", "L47", "fp32", "nchw", "tma_strict_fprop_f32_128x128"),
    Entry("tma_strict_turned", "turned_sums::weights_kernel", "wgrad", "L19", "fp32", "nhwc", "narrow"),
    Entry("tma_strict_phases", "phases_at_once::filters_kernel", "dgrad", "L01", "fp32", "nchw", "phases"),
    Entry("tma_strict_phases", "phases_at_once::pixels_kernel", "dgrad", "L01", "fp32", "nchw", "phases"),
    Entry("few_depth", "few_depth::few_depth_kernel", "fprop", dense(32, 8, 112, 16, 1), "fp32", "nchw", "1024x16"),
    Entry("small_images_wgrad", "small_images::small_images_kernel", "wgrad", "L11", "fp32", "nchw", "32x16_halo"),
    Entry("tma_strict_wgrad", "strict_wgrad::kernel", "wgrad", "L06", "fp32", "nhwc", "strict_wgrad_f32_192x64"),
    Entry("tma_strict_wgrad", "strict_wgrad::finish", "wgrad", "L06", "fp32", "nhwc", "strict_wgrad_f32_192x64"),
    Entry("pack", "pack::pack_kernel", "fprop", "L06", "fp16", "nchw", "halo"),
    Entry("pack", "pack::pack_kernel", "dgrad", "L08", "fp16", "nchw", "tma"),
    Entry("pack", "pack::pack_kernel", "fprop", "L06", "tf32", "nchw", "halo"),
    Entry("patch", "patch::copy", "fprop", "L31", "fp16", "nchw"),
    Entry("patch", "patch::fill_planes", "dgrad", PATCHES, "fp16", "nchw", "tma"),
    Entry("pixels", "pixels::main_kernel", "fprop", "L07", "tf32", "nchw", "pixels"),
    Entry("pixels", "pixels::prepare_kernel", "fprop", "L07", "tf32", "nchw", "pixels"),
    Entry("tma_matrix", "tma::matrix_kernel", "fprop", dense(8, 2560, 16, 1280, 1), "fp16", "nchw", "160x128_lines"),
    Entry("pixels_runs", "pixel_runs::main_kernel", "fprop", dense(4, 3072, 40, 672, 1), "fp16", "nchw", "256x160"),
    Entry("pixels_turns", "pixel_turns::main_kernel", "fprop", "L07", "fp16", "nchw", "64x256_nchw"),
    Entry("pixels_gather", "pixels_gather::main_kernel", "fprop", ODD_PLANES, "tf32", "nchw", "raw"),
    Entry("pixels_windows", "pixels_windows::main_kernel", "fprop", ODD_PLANES, "fp16", "nchw", "248_raw"),
    Entry("pixels_halves", "pixels_halves::main_kernel", "dgrad", dense(64, 1024, 14, 256, 1), "fp16", "nchw", "196"),
    Entry("pixels_halves", "pixels_halves::turn_kernel", "fprop", dense(64, 1024, 14, 256, 1), "fp16", "nchw", "196"),
    Entry("pixels_pairs", "pixels_pairs::main_kernel", "fprop", dense(64, 512, 7, 2048, 1), "fp16", "nchw", "narrow"),
    Entry("pixels_pairs", "pixels_pairs::main_kernel", "fprop", dense(64, 512, 7, 2048, 1), "tf32", "nchw", "narrow"),
    Entry("pixels_gather_wgrad", "pixels_gather::sums_kernel", "wgrad", ODD_PLANES, "fp16", "nchw", "raw"),
    Entry("pixels_wgrad", "pixels_wgrad::main_kernel", "wgrad", "L07", "fp16", "nchw", "pixels"),
    Entry("pixels_wgrad", "pixels_wgrad::main_kernel", "wgrad", "L07", "tf32", "nchw", "pixels"),
    Entry("pixels_wgrad", "pixels_wgrad::sum_kernel", "wgrad", "L07", "fp16", "nchw", "pixels"),
    Entry("pixels_strict", "strict_pixels::main_kernel", "fprop", "L22", "fp32", "nchw", "pixels_fprop"),
    Entry("pixels_strict_wgrad", "strict_pixels_wgrad::main_kernel", "wgrad", "L07", "fp32", "nchw", "pixels_wgrad"),
    Entry("pixels_few_wgrad", "pixels_few::sum_pixels", "wgrad", "L22", "tf32", "nhwc", "pixels_wgrad"),
    Entry("pixels_few_wgrad", "pixels_few::sum_pixels", "wgrad", "L22", "fp32", "nchw", "pixels_wgrad"),
    Entry("pixels_few_wgrad", "pixels_few::add_parts", "wgrad", "L22", "tf32", "nhwc", "pixels_wgrad"),
    Entry("pixels_lines", "pixel_lines::kernel", "fprop", dense(64, 116, 28, 116, 1), "fp16", "nhwc", "pixels"),
    Entry("pixels_lines", "pixel_lines::kernel", "dgrad", dense(64, 116, 28, 116, 1), "fp16", "nhwc", "pixels"),
    Entry("pixels_any", "any_pixels::product_kernel", "dgrad", dense(1, 1024, 14, 256, 1), "tf32", "nhwc", "any"),
    Entry("pixels_direct", "direct_pixels::product_kernel", "fprop", dense(1, 116, 28, 116, 1), "fp16", "nhwc", "any"),
    Entry("pixels_flow", "pixels_flow::flow_kernel", "fprop", dense(32, 32, 112, 16, 1), "fp16", "nhwc", "16x32_lean"),
    Entry("pixels_phases", "pixel_phases::main_kernel", "fprop", dense(128, 570, 14, 106, 1), "fp16", "nhwc", "phases"),
    Entry("pixels_phases", "pixel_phases::lines_kernel", "dgrad", dense(64, 570, 14, 106, 1), "fp16", "nhwc", "phases"),
    Entry("pixels_sums", "pixel_sums::main_kernel", "wgrad", dense(64, 116, 28, 116, 1), "fp16", "nhwc", "pixels"),
    Entry("pixels_sums", "pixel_sums::reduce_kernel", "wgrad", dense(64, 116, 28, 116, 1), "fp16", "nhwc", "pixels"),
    Entry("tma_strict", "strict::strict_kernel", "fprop", "L04", "fp32", "nhwc", "tma_strict.*128x128"),
    Entry("tma_strict", "strict::strict_kernel", "fprop", "L06", "fp32", "nhwc", "tma_strict.*128x64"),
    Entry("tma_strict", "strict::split_kernel", "dgrad", "L04", "fp32", "nhwc", "tma_strict.*128x128"),
    Entry("igemm", "igemm::igemm_kernel", "fprop", "L09", "fp16", "nhwc", "igemm"),
    Entry("igemm", "igemm::igemm_kernel", "wgrad", "L09", "fp16", "nhwc", "igemm"),
    Entry("igemm", "igemm::igemm_reduce", "wgrad", "L09", "fp16", "nhwc", "igemm"),
    Entry("igemm_tf32", "igemm_tf32::kernel", "fprop", FAR, "tf32", "nhwc", "igemm"),
    Entry("igemm_tf32", "igemm_tf32::reduce", "wgrad", FAR, "tf32", "nhwc", "igemm"),
    Entry("simt", "simt::simt_gemm", "fprop", "L02", "fp32", "nchw", "simt.*any"),
    Entry("simt_copy", "simt::simt_copy", "fprop", "L09", "fp32", "nhwc", "simt.*nhwc"),
    Entry("simt_copy", "simt::simt_copy", "wgrad", "L06", "fp32", "nhwc", "simt.*nhwc"),
    Entry("simt_copy", "simt::simt_copy", "fprop", dense(16, 128, 56, 128, 3), "fp64", "nhwc", "simt.*nhwc"),
    Entry("simt_tile", "simt::simt_fold", "wgrad", "L06", "fp32", "nhwc", "simt.*nhwc"),
    Entry("simt_tile", "simt::simt_reduce", "wgrad", "L06", "fp32", "nhwc", "simt.*nhwc"),
    Entry("grouped", "grouped::grouped_kernel", "fprop", "L15", "fp16", "nchw", "grouped.*8x8_nchw"),
    Entry("grouped_wgrad", "grouped::sum_kernel", "wgrad", "L15", "fp16", "nchw", "grouped.*8x8_nchw"),
    Entry("grouped_wgrad", "grouped::add_kernel", "wgrad", "L15", "fp16", "nchw", "grouped.*8x8_nchw"),
    Entry("plane_filters", "planes::prepare_kernel", "fprop", "L17", "fp16", "nchw", "grouped.*64x256_nchw"),
    Entry("grouped_planes", "planes::planes_kernel", "fprop", "L17", "fp16", "nchw", "grouped.*64x256_nchw"),
    Entry("grouped_planes", "planes::planes_kernel", "dgrad", "L17", "fp16", "nchw", "grouped.*64x256_nchw"),
    Entry("grouped_planes_wgrad", "planes::sums_kernel", "wgrad", "L17", "fp16", "nchw", "grouped.*64x64_nchw"),
    Entry("grouped_planes_wgrad", "planes::add_kernel", "wgrad", "L17", "fp16", "nchw", "grouped.*64x64_nchw"),
    Entry("plane_filters", "planes::prepare_kernel", "fprop", "L17", "tf32", "nchw", "grouped.*128x256_nchw"),
    Entry("grouped_turned", "turned::turned_kernel", "fprop", "L17", "tf32", "nchw", "grouped.*128x256_nchw"),
    Entry("grouped_turned", "turned::turned_kernel", "dgrad", "L18", "fp16", "nchw", "grouped.*128x256_nchw"),
    Entry("grouped_plain", "plain::rows_kernel", "fprop", "L15", "fp16", "nchw", "grouped.*32x64_nchw"),
    Entry("grouped_plain", "plain::rows_kernel", "dgrad", "L15", "tf32", "nchw", "grouped.*32x64_nchw"),
    Entry("grouped_plain_wgrad", "plain::sums_kernel", "wgrad", "L15", "tf32", "nchw", "grouped.*16x64_nchw"),
    Entry("grouped_plain_wgrad", "plain::add_kernel", "wgrad", "L15", "tf32", "nchw", "grouped.*16x64_nchw"),
    Entry("grouped_images", "images::images_kernel", "fprop", "L16", "fp16", "nchw", "grouped.*256x32_any"),
    Entry("grouped_images", "images::images_kernel", "dgrad", "L16", "tf32", "nchw", "grouped.*256x32_any"),
    Entry("grouped_parts", "tma::group_parts_kernel", "wgrad", "L16", "fp16", "nhwc", "grouped.*192x64_halo"),
    Entry("grouped_few", "few_groups_outputs::few_kernel", "fprop", ONE_IMAGE, "fp16", "nhwc", "grouped.*16x16_nhwc"),
    Entry("grouped_few", "few_groups_outputs::few_kernel", "dgrad", ONE_IMAGE, "fp16", "nhwc", "grouped.*16x16_nhwc"),
    Entry("grouped_slabs", "slabs::slabs_kernel", "fprop", SMALL_GROUPS, "fp16", "nhwc", "grouped.*64x64_nhwc"),
    Entry("grouped_slabs", "slabs::slabs_kernel", "dgrad", SMALL_GROUPS, "fp16", "nhwc", "grouped.*64x64_nhwc"),
    Entry("grouped_lines", "grouped::lines_kernel", "fprop", "L15", "fp16", "nhwc", "lines"),
    Entry("grouped_lines", "grouped::lines_kernel", "fprop", "L16", "fp16", "nhwc", "lines"),
    Entry("grouped_lines", "grouped::lines_kernel", "fprop", "L15", "fp16", "nchw", "lines"),
    Entry("grouped_lines", "grouped::lines_kernel", "fprop", "L15", "tf32", "nhwc", "lines"),
    Entry("grouped_lines", "grouped::lines_kernel", "fprop", "L15", "fp32", "nhwc", "lines"),
    Entry("grouped_lines_wgrad", "grouped::sum_lines_kernel", "wgrad", "L15", "fp16", "nhwc", "lines"),
    Entry("grouped_lines_wgrad", "grouped::sum_lines_kernel", "wgrad", "L15", "fp16", "nchw", "lines"),
    Entry("grouped_lines_wgrad", "grouped::sum_lines_kernel", "wgrad", "L15", "tf32", "nhwc", "lines"),
    Entry("grouped_lines_wgrad", "grouped::add_lines_kernel", "wgrad", "L15", "fp16", "nhwc", "lines"),
    Entry("stem", "stem::gather", "fprop", "L05", "fp16", "nhwc", "stem.*_nhwc"),
    Entry("stem", "stem::gather", "fprop", "L02", "fp16", "nchw", "stem"),
    Entry("stem", "stem::gather", "fprop", "L05", "tf32", "nhwc", "stem"),
    Entry("stem", "stem::gather", "fprop", "L05", "fp32", "nhwc", "stem"),
    Entry("stem", "stem::gather", "dgrad", "L44", "fp16", "nhwc", "stem.*_nhwc"),
    Entry("stem_lean", "stem::windows", "fprop", "L02", "fp16", "nhwc", "stem.*_lean"),
    Entry("stem_halo", "stem::halo_windows", "fprop", "L05", "fp16", "nhwc", "stem.*64x64_halo"),
    Entry("stem_vectors", "stem::vectors_windows", "fprop", "L39", "fp16", "nhwc", "stem.*64x32_halo"),
    Entry("stem_narrow", "stem::gather_narrow", "fprop", "L44", "fp16", "nhwc", "any"),
    Entry("stem_narrow", "stem::gather_narrow", "dgrad", "L05", "fp16", "nhwc", "any"),
    Entry("stem_lines", "stem::spread_lines", "dgrad", "L01", "fp32", "nchw", "lines"),
    Entry("stem_lines", "stem::spread_lines", "dgrad", "L02", "tf32", "nchw", "lines"),
    Entry("stem_taps", "stem::taps_kernel", "fprop", "L51", "fp16", "nhwc", "lines"),
    Entry("stem_taps", "stem::taps_kernel", "fprop", "L44", "fp16", "nchw", "lines"),
    Entry("stem_wgrad", "stem::sum", "wgrad", "L05", "fp16", "nhwc", "stem"),
    Entry("stem_wgrad", "stem::sum", "wgrad", "L02", "fp32", "nchw", "stem"),
    Entry("stem_wgrad", "stem::add_parts", "wgrad", "L05", "fp16", "nhwc", "stem"),
    Entry("band", "band::gather", "fprop", "L29", "fp16", "nchw", "band"),
    Entry("band", "band::gather", "fprop", "L29", "fp16", "nhwc", "band"),
    Entry("band_wgrad", "band::wgrad", "wgrad", "L29", "fp16", "nchw", "band"),
    Entry("band_wgrad", "band::wgrad", "wgrad", "L29", "fp16", "nhwc", "band"),
    Entry("band_wgrad", "band::wgrad", "wgrad", "L29", "fp32", "nchw", "band"),
    Entry("strip", "strip::gather", "fprop", "L29", "fp32", "nchw", "strip"),
    Entry("strip_rows", "strip_rows::gather", "fprop", depthwise(32, 96, 56, 9), "fp32", "nchw", "strip.*7x8"),
    Entry("strip_sums", "strip_sums::wgrad", "wgrad", "L29", "fp32", "nchw", "strip"),
    Entry("band_split", "band_split::gather", "fprop", "L29", "fp32", "nchw", "band.*8x8"),
    Entry("band_split", "band_split::gather", "dgrad", "L29", "fp32", "nhwc", "band.*8x8"),
    Entry("column", "column::slide", "fprop", depthwise(256, 576, 14, 3), "fp16", "nhwc", "column"),
    Entry("column", "column::slide", "fprop", "L26", "fp32", "nhwc", "column"),
    Entry("column", "column::gather", "fprop", "L20", "fp16", "nhwc", "column"),
    Entry("column", "column::wgrad", "wgrad", "L20", "fp16", "nhwc", "column"),
    Entry("depthwise_tiles", "depthwise::gather", "fprop", "L21", "fp32", "nchw", "depthwise"),
    Entry("depthwise", "depthwise::add_splits", "wgrad", "L20", "fp32", "nchw", "stream"),
    Entry("depthwise_spread", "depthwise::spread", "dgrad", "L20", "fp32", "nchw", "depthwise.*s2"),
    Entry("depthwise_any", "depthwise::gather_any", "fprop", LONG_ROWS, "fp32", "nchw", "0x0_nchw"),
    Entry("depthwise_any", "depthwise::wgrad_any", "wgrad", LONG_ROWS, "fp32", "nchw", "0x0_nchw"),
    Entry("depthwise_few", "depthwise::gather_few", "fprop", ODD_TRIPLE, "fp32", "nchw", "0x0_nchw"),
    Entry("depthwise_few", "depthwise::spread_few", "dgrad", ODD_TRIPLE, "fp32", "nchw", "0x0_nchw"),
    Entry("depthwise_few", "depthwise::wgrad_few", "wgrad", ODD_TRIPLE, "fp32", "nchw", "0x0_nchw"),
    Entry("depthwise_patches", "depthwise::gather_patches", "fprop", APART, "fp16", "nchw", "0x0_nchw"),
    Entry("depthwise_patches", "depthwise::spread_patches", "dgrad", APART, "fp16", "nchw", "0x0_nchw"),
    Entry("depthwise_patches", "depthwise::wgrad_patches", "wgrad", ONE_OUTPUT, "fp16", "nchw", "0x0_nchw"),
    Entry("depthwise_staged", "depthwise::gather_staged", "fprop", DILATED, "fp32", "nchw", "0x0_nchw"),
    Entry("depthwise_staged", "depthwise::wgrad_staged", "wgrad", DILATED, "fp32", "nchw", "0x0_nchw"),
    Entry("depthwise_lines", "depthwise::gather_lines", "fprop", TRIPLE, "fp16", "nhwc", "0x0_nhwc"),
    Entry("depthwise_lines", "depthwise::wgrad_lines", "wgrad", TRIPLE, "fp16", "nhwc", "0x0_nhwc"),
    Entry("depthwise_walk", "depthwise::walk", "fprop", depthwise(64, 100, 56, 3), "fp16", "nhwc", "column|depthwise"),
    Entry("depthwise_walk", "depthwise::walk", "fprop", "L26", "fp32", "nhwc", "depthwise"),
    Entry("depthwise_wide", "depthwise::wide", "fprop", depthwise(32, 160, 32, 3), "fp16", "nhwc", "column"),
    Entry("depthwise_flat", "depthwise::flat", "fprop", depthwise(32, 129, 56, 3), "fp16", "nhwc", "column"),
    Entry("depthwise_flat", "depthwise::flat_wgrad", "wgrad", depthwise(32, 129, 56, 3), "fp16", "nhwc", "depthwise"),
    Entry("depthwise_near", "depthwise::near", "fprop", depthwise(4, 96, 14, 5), "fp16", "nhwc", "0x2"),
    Entry("depthwise_few_sums", "depthwise::wgrad_few_pixels", "wgrad", depthwise(1, 96, 14, 5), "fp16", "nhwc", "0x4"),
    Entry("depthwise_lanes", "depthwise::lanes_forward", "fprop", depthwise(4, 192, 28, 3), "fp16", "nchw", "0x2"),
    Entry("depthwise_lanes", "depthwise::lanes_spread", "dgrad", depthwise(4, 192, 28, 3, 2), "fp16", "nchw", "0x2"),
    Entry("depthwise_lanes", "depthwise::lanes_sums", "wgrad", depthwise(4, 184, 14, 3), "fp16", "nchw", "0x2"),
    Entry("depthwise_copied", "depthwise::copied", "fprop", depthwise(32, 120, 65, 5), "fp32", "nchw", "0x2"),
    Entry("depthwise_copied", "depthwise::copied_spread", "dgrad", depthwise(32, 120, 65, 5, 2), "fp32", "nchw", "0x2"),
    Entry("depthwise_copied", "depthwise::copied_sums", "wgrad", depthwise(32, 120, 65, 5), "fp32", "nchw", "0x2"),
    Entry("depthwise_single", "depthwise::scale", "fprop", depthwise(128, 96, 56, 1, 2), "fp16", "nhwc", "0x2"),
    Entry("depthwise_single", "depthwise::single_sums", "wgrad", depthwise(128, 192, 28, 1), "fp32", "nhwc", "0x4"),
    Entry("depthwise_met", "depthwise::gather_met", "fprop", SPARSE, "fp16", "nchw", "0x1"),
    Entry("depthwise_met", "depthwise::gather_met", "dgrad", SPARSE, "fp32", "nhwc", "0x1"),
    Entry("depthwise_met", "depthwise::sums_met", "wgrad", SPARSE, "fp16", "nhwc", "0x1"),
    Entry("depthwise_walk", "depthwise::walk_wgrad", "wgrad", "L26", "fp32", "nhwc", "depthwise"),
    Entry("toeplitz", "toeplitz::gather", "fprop", "L23", "fp16", "nhwc", "toeplitz"),
    Entry("toeplitz_gather", "toeplitz::gather_pieces", "fprop", "L26", "fp16", "nhwc", "toeplitz"),
    Entry("toeplitz_wgrad", "toeplitz::wgrad", "wgrad", "L26", "fp16", "nhwc", "toeplitz"),
    Entry("toeplitz_pairs", "toeplitz::wgrad_pairs", "wgrad", "L23", "fp16", "nhwc", "toeplitz"),
    Entry("stream", "stream::gather", "fprop", "L21", "fp16", "nchw", "stream"),
    Entry("stream", "stream::gather", "fprop", "L26", "fp16", "nchw", "stream"),
    Entry("stream", "stream::spread", "dgrad", "L20", "fp16", "nchw", "stream"),
    Entry("stream", "stream::wgrad", "wgrad", "L21", "fp16", "nchw", "stream"),
    Entry("stream_planes", "stream::gather_planes", "fprop", "L24", "fp16", "nchw", "stream"),
    Entry("stream_rows", "stream::row_planes", "fprop", depthwise(256, 576, 14, 3), "fp16", "nchw", "stream"),
    Entry("stream_rows", "stream::odd_row_planes", "fprop", depthwise(256, 768, 7, 7), "fp16", "nchw", "stream"),
    Entry("stream_planes", "stream::turned_planes", "fprop", depthwise(64, 96, 57, 3), "fp16", "nchw", "stream"),
    Entry("stream_planes", "stream::wgrad_planes", "wgrad", "L24", "fp16", "nchw", "stream.*5x5"),
    Entry("stream_products", "stream::wgrad_products", "wgrad", depthwise(256, 768, 7, 7), "fp16", "nchw", "16x16"),
    Entry("stream_planes", "stream::spread_planes", "dgrad", STRIDED, "fp16", "nchw", "stream"),
    Entry("stream_taller", "stream::gather_taller", "fprop", depthwise(32, 64, 56, 13), "fp16", "nchw", "stream"),
    Entry("stream_runs", "stream::runs", "fprop", depthwise(32, 128, 65, 3), "fp16", "nchw", "stream"),
    Entry("stream_runs", "stream::spread_runs", "dgrad", depthwise(32, 128, 65, 3, 2), "fp16", "nchw", "stream"),
    Entry("stream_units", "stream::gather_units", "fprop", ODD_STRIDED, "fp16", "nchw", "stream"),
    Entry("stream_units", "stream::spread_units", "dgrad", ODD_STRIDED, "fp16", "nchw", "stream"),
    Entry("stream_sums", "stream::sum_planes", "wgrad", STRIDED, "fp16", "nchw", "stream"),
    Entry("stream_ring", "stream::gather_ring", "fprop", depthwise(64, 96, 57, 3), "fp16", "nchw", "stream"),
    Entry("stream_ring", "stream::spread_ring", "dgrad", depthwise(64, 96, 113, 3, 2), "fp16", "nchw", "stream"),
    Entry("stream_f32", "stream::gather_f32", "fprop", depthwise(16, 96, 112, 7), "fp32", "nchw", "stream"),
    Entry("stream_f32", "stream::gather_f32", "fprop", UNPADDED, "fp32", "nchw", "stream"),
    Entry("stream_f32", "stream::wgrad_f32", "wgrad", depthwise(16, 96, 112, 5), "fp32", "nchw", "stream"),
    Entry("stream_quads_f32", "stream::gather_quads", "fprop", "L26", "fp32", "nchw", "stream"),
    Entry("stream_quads_f32", "stream::wgrad_quads", "wgrad", "L26", "fp32", "nchw", "stream"),
    Entry("stream_planes_f32", "stream::gather_planes_f32", "fprop", "L24", "fp32", "nchw", "stream"),
    Entry("stream_planes_f32", "stream::wgrad_planes_f32", "wgrad", "L24", "fp32", "nchw", "stream"),
    Entry("stream_planes_f32", "stream::spread_planes_f32", "dgrad", STRIDED, "fp32", "nchw", "stream"),
)  # fmt: skip


def selected(only: Sequence[str], part: tuple[int, int]) -> list[int]:
    """Numbers of the entries that have one of the words, or all; of these every count-th, from the first on."""
    first, count = part
    numbers = [i for i, e in enumerate(ENTRIES) if not only or any(word in f"{e.file} {e.kernel}" for word in only)]
    return numbers[first - 1 :: count]


# ---- what is measured ------------------------------------------------------------------------------------------------

# How busy parts of the GPU are, per cent of their peak: (column of the table, which shows the busiest; name; metric).
BUSY = (
    ("DRAM", "DRAM", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    ("L2", "L2", "lts__throughput.avg.pct_of_peak_sustained_elapsed"),
    ("L1", "L1 and shared memory", "l1tex__throughput.avg.pct_of_peak_sustained_active"),
    ("tensor", "tensor cores", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"),
    ("FMA", "FMA units", "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active"),
    ("FMA", "FP64 units", "sm__inst_executed_pipe_fp64.avg.pct_of_peak_sustained_active"),
    ("issue", "issue slots", "sm__inst_issued.avg.pct_of_peak_sustained_active"),
)
NANOSECONDS = "gpu__time_duration.sum"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"

# What a warp that does not issue waits for.
STALLS = {
    "barrier": "other warps at a barrier",
    "branch_resolving": "a branch",
    "dispatch_stall": "the dispatcher (register banks)",
    "drain": "stores that drain",
    "gmma": "wgmma's products",
    "imc_miss": "constants",
    "lg_throttle": "room in the queue to L1",
    "long_scoreboard": "loads, or an mbarrier",
    "math_pipe_throttle": "room in an arithmetic unit",
    "membar": "a fence",
    "mio_throttle": "room in the queue to shared memory",
    "misc": "something else",
    "no_instruction": "instructions",
    "short_scoreboard": "shared memory",
    "sleeping": "a sleep",
    "tex_throttle": "room in the queue to the texture unit",
    "wait": "its last instruction",
}
NO_STALLS = ("selected", "not_selected")  # warps that issue, or could
FULL = 60  # per cent of its peak from which on a part of the GPU bounds a kernel


def metric_names() -> list[str]:
    stalls = [STALL.format(reason) for reason in (*STALLS, *NO_STALLS)]
    return [NANOSECONDS, *(metric for _, _, metric in BUSY), WARPS, REGISTERS, *stalls]


def stalls(metrics: Mapping[str, float]) -> list[tuple[float, str]]:
    """(per cent of all cycles of resident warps, reason), the most frequent first."""
    total = sum(metrics[STALL.format(reason)] for reason in (*STALLS, *NO_STALLS))
    shares = [(100 * metrics[STALL.format(reason)] / total, reason) for reason in STALLS] if total else []
    return sorted(shares, reverse=True)


def bound_by(metrics: Mapping[str, float]) -> str:
    """The busiest part of the GPU if it is FULL, else what warps wait for most. What DRAM moves passes L2, which says
    nothing of its own where DRAM is FULL."""
    busy = {name: metrics[metric] for _, name, metric in BUSY}
    if busy["DRAM"] >= FULL:
        del busy["L2"]
    name, value = max(busy.items(), key=lambda item: item[1])
    if value >= FULL:
        return name
    found = stalls(metrics)
    return f"waits for {STALLS[found[0][1]]}" if found else "nothing"


# ---- ncu -------------------------------------------------------------------------------------------------------------

RANGE = "entry-{}-of-bounds"  # NVTX range around a call


def launch(numbers: Iterable[int]) -> None:
    """The calls of these entries, each in a range of its own. This is what runs under ncu."""
    names, rows = torch.ops.conv2d_ext.kernels(), {}
    for number in numbers:
        e = ENTRIES[number]
        x, w, y = operands(e.case, e.dtype, e.layout, "cuda")
        rows[number] = e.chosen(x, w, y)
        run = shapes.call(e.op, e.case, x, w, None, y, e.dtype == "tf32")
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        with torch.cuda.nvtx.range(RANGE.format(number)):
            run(rows[number])
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(json.dumps({number: names[row] for number, row in rows.items()}))


def profile(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """One result for each of these entries: its words, its row and its kernel's metrics, None if it did not run."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        script = [sys.executable, str(Path(__file__).resolve()), "--launch", ",".join(map(str, numbers))]
        measured = ["--metrics", ",".join(metric_names()), "--clock-control", "none", "--profile-from-start", "off"]
        printed = ["--nvtx", "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        ran = subprocess.run(["ncu", *measured, *printed, *script], stdout=subprocess.PIPE, text=True, check=False)
        text = log.read_text() if log.exists() else ""
        if ran.returncode:
            raise RuntimeError(f"ncu ended with {ran.returncode}:\n{ran.stdout[-2000:]}\n{text[-2000:]}")
        rows = json.loads(ran.stdout.splitlines()[-1])
    launches = parsed(text)
    return [
        dataclasses.asdict(dataclasses.replace(ENTRIES[n], layer=ENTRIES[n].what))
        | {"row": rows[str(n)], "metrics": longest(launches, n, ENTRIES[n].kernel)}
        | {"launches": [name for entry, name, _ in launches if entry == n]}
        for n in numbers
    ]


def parsed(text: str) -> list[tuple[int, str, dict[str, float]]]:
    """(entry, kernel, metrics) of every launch in a raw page of ncu as CSV; its second line has the units."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = []
    for row in list(csv.DictReader(lines[begin:]))[1:]:
        ranges = [m for value in row.values() for m in re.findall(RANGE.format(r"(\d+)"), value or "")]
        if ranges:
            metrics = {name: number(row[name]) for name in metric_names() if name in row}
            found.append((int(ranges[0]), row["Kernel Name"], metrics))
    return found


def number(text: str) -> float:
    """A field of ncu's; a metric that this GPU has not counts as 0."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0


def longest(launches: Iterable[tuple[int, str, dict[str, float]]], entry: int, kernel: str) -> dict[str, float] | None:
    """The metrics of the kernel's longest launch by that entry. ncu leaves out namespaces, at times all of them."""
    *_, space, function = kernel.split("::")
    pattern = re.compile(rf"(?:\b{space}::|[^:\w]){function}\b(?!::)")
    found = [metrics for index, name, metrics in launches if index == entry and pattern.search(name)]
    return max(found, key=lambda metrics: metrics[NANOSECONDS], default=None)


# ---- the table -------------------------------------------------------------------------------------------------------

CALL = ("kernel", "op, layer", "row")
REASONS = ("stalls, %", "bound by")
COLUMNS = (*CALL, "us", *dict.fromkeys(column for column, _, _ in BUSY), "warps", "registers", *REASONS)


def table(results: Iterable[dict[str, Any]]) -> str:
    lines = []
    for r in results:
        name = f"{r['file']}.cuh: {r['kernel'].rpartition('::')[2]}"
        m, first = r["metrics"], (name, f"{r['op']} {r['layer']}", re.sub(r"^.*?_(?=\d+x)", "", r["row"]))
        if m is None:
            lines.append((*first, *[""] * (len(COLUMNS) - len(first) - 1), f"not launched: {', '.join(r['launches'])}"))
            continue
        top = ", ".join(f"{reason} {share:.0f}" for share, reason in stalls(m)[:2])
        busy: dict[str, float] = {}
        for column, _, metric in BUSY:
            busy[column] = max(busy.get(column, 0), m[metric])
        rest = [f"{value:.0f}" for value in (*busy.values(), m[WARPS], m[REGISTERS])]
        lines.append((*first, f"{m[NANOSECONDS] / 1e3:.1f}", *rest, top, bound_by(m)))
    return markdown_table(COLUMNS, lines, (*CALL, *REASONS))


def joined(files: Iterable[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(machine of the first file, results of all in the order of ENTRIES); of results of the same entry, the last."""
    order = [(e.file, e.kernel, e.op, e.what) for e in ENTRIES]
    facts: dict[str, Any] = {}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for data in (json.loads(file.read_text()) for file in files):
        facts = facts or data["machine"]
        found |= {(r["file"], r["kernel"], r["op"], r["layer"]): r for r in data["results"]}
    return facts, [found[key] for key in order if key in found]


# ---- command line ----------------------------------------------------------------------------------------------------


def words(given: str) -> list[str]:
    return given.split(",")


def fraction(given: str) -> tuple[int, int]:
    first, _, count = given.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected one of so many, such as 1/2, got {given}")
    return int(first), int(count)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--only", type=words, default=[], metavar="A,B", help="words of files or kernels")
    found.add_argument("--part", type=fraction, default=(1, 1), metavar="I/N", help="every Nth entry, from the Ith on")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the metrics here")
    found.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="print the table of such files")
    found.add_argument("--launch", type=words, help=argparse.SUPPRESS)  # numbers of entries, under ncu
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.join:
        facts, results = joined(options.join)
    else:
        if not torch.cuda.is_available() or not shutil.which("ncu"):
            print("bounds: needs a GPU and Nsight Compute's ncu on the PATH", file=sys.stderr)
            return 2
        if options.launch:
            with torch.no_grad():
                launch(map(int, options.launch))
            return 0
        facts, results = machine(), profile(selected(options.only, options.part))
        if options.json:
            options.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    print(", ".join(f"{name} {facts[name]}" for name in ("gpu", "driver", "torch", "conv2d_ext") if facts.get(name)))
    print(f"\n{table(results)}")
    return 1 if any(r["metrics"] is None for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
