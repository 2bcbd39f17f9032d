"""2-D convolution for PyTorch with kernels of its own: the arguments and results of F.conv2d and nn.Conv2d."""

from __future__ import annotations

from . import _library  # noqa: F401  (first: it loads the ops that the other modules name)
from ._version import __version__
from .explain import Explanation, explain
from .functional import conv2d
from .modules import Conv2d, convert

__all__ = ["Conv2d", "Explanation", "__version__", "conv2d", "convert", "explain"]
