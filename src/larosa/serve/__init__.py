"""An HTTP server with OpenAI's interface (extra `serve`)."""

from larosa.serve.app import Limits, Server
from larosa.serve.listen import bind, listen
from larosa.serve.model import ServedModel, open_llm

__all__ = ["Limits", "ServedModel", "Server", "bind", "listen", "open_llm"]
