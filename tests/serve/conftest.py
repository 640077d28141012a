"""A real server on a loopback port: a dense and a converted tiny model, and what each of their requests gives alone."""

from __future__ import annotations

import copy
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from larosa.checkpoints.io import LoadedModel  # noqa: E402
from larosa.runtime import LLM, Request  # noqa: E402
from larosa.serve import Limits, ServedModel, Server, open_llm  # noqa: E402

KEY = "the key"
LENGTH = 512
WAITING = 24
#: Each message as "<s> role words </s>"; what is named tools is one word a tool.
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}<s> {{ message.content }} </s> "
    "{% if message.role == 'tool' and loop.first %}{{ raise_exception('no call to answer') }}{% endif %}"
    "{% endfor %}<s>"
)


class _Thread(uvicorn.Server):
    """A server in a thread of this process."""

    def __enter__(self) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self.run, kwargs={"sockets": [listener]})
        self._thread.start()
        while not self.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.should_exit = True
        self._thread.join()


def serve(*models, **options):
    """A context with the address of a server over models."""
    return _Thread(uvicorn.Config(Server(list(models), **options).app(), log_level="warning", lifespan="on"))


@pytest.fixture(scope="session")
def loaded(make_model, quick_convert, tokenizer) -> dict[str, LoadedModel]:
    """The models that are served, by name."""
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = TEMPLATE
    dense, sparse = (make_model("llama", seed=seed, max_position_embeddings=2 * LENGTH) for seed in (0, 1))
    for model in (dense, sparse):
        model.generation_config.eos_token_id = 2
    return {
        "dense": LoadedModel(dense, talking),
        "sparse": LoadedModel(quick_convert(sparse, dense_first_token=True), talking),
    }


@pytest.fixture(scope="session")
def served(loaded):
    """The models under their names, and the address of the server."""
    models = [
        ServedModel(name, open_llm(one, max_length=LENGTH), max_sequences=4, max_waiting=WAITING)
        for name, one in loaded.items()
    ]
    with serve(*models, api_key=KEY, limits=Limits(seconds=120, body_bytes=100_000)) as url:
        yield SimpleNamespace(url=url, schedulers={model.name: model.scheduler for model in models})


@pytest.fixture(scope="session")
def http(served) -> Iterator[httpx.Client]:
    """A client that bears the key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=120, verify=False) as client:
        yield client


@pytest.fixture(scope="session")
def alone(loaded):
    """alone(name, prompt, max_tokens, sampling, stop): the events of a request by itself, in a session of its own."""
    models = {name: LLM(*one, max_length=LENGTH) for name, one in copy.deepcopy(loaded).items()}
    turn = threading.Lock()

    def run(name, prompt, *options, **more):
        llm = models[name]
        ids = llm.encode(prompt) if isinstance(prompt, str) else prompt
        with turn:
            return list(llm.stream(Request(ids, *options, **more)))

    return run
