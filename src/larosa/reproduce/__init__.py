"""The paper's tables and figures, each by name, on any supported model."""

from larosa.reproduce.run import ALL, EXPERIMENTS, Reproduction, reproduce
from larosa.reproduce.settings import ReproduceSettings

__all__ = ["ALL", "EXPERIMENTS", "ReproduceSettings", "Reproduction", "reproduce"]
