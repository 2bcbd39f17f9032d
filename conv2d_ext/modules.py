"""Conv2d, the module, and convert(), which swaps it into a model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .functional import conv2d

M = TypeVar("M", bound=nn.Module)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on this package's conv2d: the same constructor, initial parameters and state_dict.

    `padding` may also be (top, bottom, left, right). Input and output are as for conv2d: (N, C, H, W) or (C, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        # Written out, for torch.nn.utils.skip_init looks for `device` among the parameters.
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,  # type: ignore[arg-type]
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        if not isinstance(self.padding, str) and len(self.padding) == 4:
            # What F.pad takes for the other padding modes: the last dimension first.
            top, bottom, left, right = self.padding
            self._reversed_padding_repeated_twice = [left, right, top, bottom]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def convert(module: M) -> M:
    """Makes every torch.nn.Conv2d in `module` a conv2d_ext.Conv2d, in place, and returns `module`.

    `module` itself may be one. Each stays the object that it was, with its Parameters, buffers, hooks and
    parametrizations; only its class changes, that of a LazyConv2d when it is first called. Other subclasses of
    nn.Conv2d are left alone, since they may compute something else. Raises TypeError where `module` is no nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert: module: expected a torch.nn.Module, got {type(module).__name__}")
    for child in module.modules():
        kind = type(child)
        if kind is nn.Conv2d:
            child.__class__ = Conv2d
        elif kind is nn.LazyConv2d:
            child.cls_to_become = Conv2d  # type: ignore[assignment]
        elif kind.__bases__ == (nn.Conv2d,) and parametrize.is_parametrized(child):
            # torch.nn.utils.parametrize gave this module a class of its own, derived from nn.Conv2d, whose properties
            # compute the parameters: the same class is made again, derived from Conv2d.
            members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            child.__class__ = type(kind.__name__, (Conv2d,), members)
    return module
