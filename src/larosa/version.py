"""The package version, in one place for code and checkpoints."""

from importlib.metadata import version

__version__ = version("larosa")
