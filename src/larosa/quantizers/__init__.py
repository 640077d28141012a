"""How weights become few bits: rounding with searched scales, and GPTQ."""

from larosa.quantizers.gptq import gptq
from larosa.quantizers.model import quantize, quantize_linears
from larosa.quantizers.scales import round_groups, round_to_nearest

__all__ = ["gptq", "quantize", "quantize_linears", "round_groups", "round_to_nearest"]
