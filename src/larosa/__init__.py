"""Training-free activation sparsity for LLM inference: LaRoSA (arXiv 2507.01299).

Importing the package registers the sparsified model types with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads converted checkpoints.
"""

from larosa.checkpoints.inspection import inspect
from larosa.checkpoints.io import load, save
from larosa.config import LarosaConfig, PerSite
from larosa.conversion import convert
from larosa.decoding import Engine, Generation, generate
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import Evaluation, evaluate
from larosa.runtime import LLM
from larosa.sparsity.report import Inspection
from larosa.version import __version__

__all__ = [
    "LLM",
    "Engine",
    "Evaluation",
    "Generation",
    "Inspection",
    "LarosaConfig",
    "LarosaError",
    "PerSite",
    "__version__",
    "convert",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "save",
]
