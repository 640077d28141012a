"""An HTTP server with OpenAI's interface (extra `serve`)."""

from larosa.serve.app import Limits, Server
from larosa.serve.listen import listen
from larosa.serve.model import ServedModel, open_model

__all__ = ["Limits", "ServedModel", "Server", "listen", "open_model"]
