"""`python -m conv2d_ext`: see `conv2d_ext.cli`."""

from __future__ import annotations

import sys

from conv2d_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
