"""The version of the package, in the one place that setup.py, the command line and the tests read it from."""

__version__ = "0.1.0"
