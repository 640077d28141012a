"""Text generation: engines that run one token after the other, the loop around them, sampling and streaming."""

from larosa.decoding.conversation import Conversation
from larosa.decoding.engine import Engine
from larosa.decoding.forward import ForwardEngine
from larosa.decoding.generation import EngineName, Generation, generate
from larosa.decoding.sampling import Sampling
from larosa.formats import CacheDtype

__all__ = ["CacheDtype", "Conversation", "Engine", "EngineName", "ForwardEngine", "Generation", "Sampling", "generate"]
