"""Steps on a GPU as CUDA graphs, and the loop from token to token over one of them, with no waiting in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch

from larosa.decoding.engine import Engine
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.loop import checked
from larosa.decoding.sampling import Sampler
from larosa.ops.cuda.launch import early_launches

_T = TypeVar("_T")

#: Tokens that the GPU may be ahead of the host. It hides the host's pauses; as many are thrown away after a stop.
_AHEAD = 8


class StepGraphs:
    """An engine's steps of 1 to `MAX_ROWS` tokens on a GPU, one CUDA graph for each number of rows.

    Each is captured when it is first wanted. All share one memory, so that they are for one stream.

    Args:
        engine: on a GPU; one `beside` it, with other weights, has graphs of its own over the same cache.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: What the next step runs, the first rows of each [MAX_ROWS] int64: written before it on the same stream.
        self.tokens, self.positions, self.texts = torch.zeros(3, MAX_ROWS, dtype=torch.int64, device=engine.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def step(self, rows: int) -> torch.Tensor:
        """Run the first `rows` of `tokens` at `positions` of `texts`, without waiting; see `Engine.step`.

        Returns:
            [rows, vocabulary] float32 logits, which any later step may overwrite.
        """
        with torch.cuda.device(self._engine.device):
            if rows not in self._graphs:
                with early_launches():
                    self._graphs[rows] = capture(lambda: self._run(rows), self._engine, self._pool)
            graph, logits = self._graphs[rows]
            graph.replay()
        return logits

    def _run(self, rows: int) -> torch.Tensor:
        return self._engine.step(self.tokens[:rows], self.positions[:rows], self.texts[:rows])


def capture(
    run: Callable[[], _T],
    engine: Engine,
    pool: Any = None,
    generator: torch.Generator | None = None,
    before: Callable[[], object] = lambda: None,
) -> tuple[torch.cuda.CUDAGraph, _T]:
    """The graph of `run`, and what it returns, in memory that replays write again.

    It is run twice first, which must do no harm: that compiles kernels and takes what workspace libraries want, which
    capturing must not.

    Args:
        run: operators of `engine`'s step and others, on the current device.
        pool: of memory, which graphs may share that are never replayed side by side.
        generator: that `run` draws from.
        before: puts right what the runs have changed, before the capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    before()
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # Beside ranks NCCL's own thread asks the GPU for news meanwhile, which only concerns that thread.
    mode = "global" if engine.weights.shard is None else "thread_local"
    with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
        result = run()
    return graph, result


class GraphLoop:
    """Continues prompts with an engine on a GPU, its step and the sampling captured as one graph.

    A replay runs the last token, draws the next and moves the position on, all in the same memory. The host
    launches replays a few tokens ahead and reads each token when its copy has arrived.

    Args:
        engine: on a GPU.
        sampler: for that GPU.
    """

    def __init__(self, engine: Engine, sampler: Sampler) -> None:
        self._engine = engine
        self._sampler = sampler
        self._token = torch.zeros(1, dtype=torch.int64, device=engine.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=engine.device)
        # A step's operators follow each other as early launches ask for it.
        with torch.cuda.device(engine.device), sampler.unchanged(), early_launches():
            sampler.start(torch.zeros(1, 0, dtype=torch.int64), engine.vocabulary)  # its memory, before it is captured
            # What trying a step leaves in the cache stands where the next prompt is written.
            self._graph, _ = capture(self._step, engine, generator=sampler.generator, before=self._position.zero_)

    @torch.inference_mode()
    def continue_prompt(self, prompt: torch.Tensor, max_new_tokens: int, stop: Collection[int] = ()) -> Iterator[int]:
        """Continue a prompt token by token; see `larosa.decoding.loop.continue_prompt`.

        Raises:
            LarosaError: the prompt does not fit the engine, or the logits are NaN or Inf.
        """
        tokens = torch.empty(max_new_tokens, 1, dtype=torch.int64, pin_memory=True)
        copies: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
        self.start(prompt)
        for drawn, place in enumerate(tokens, start=1):
            with torch.cuda.device(self._engine.device):
                place.copy_(self._token, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
                copies.append((arrived, place))
                if drawn < max_new_tokens:
                    self.advance()
            while copies and (len(copies) > _AHEAD or drawn == max_new_tokens):
                arrived, first = copies.popleft()
                arrived.synchronize()
                token = checked(first)[0]
                yield token
                if token in stop:
                    return

    @torch.inference_mode()
    def start(self, prompt: torch.Tensor) -> None:
        """Run a prompt [1, length] and draw the first token, without waiting for it."""
        with torch.cuda.device(self._engine.device):
            logits = self._engine.prefill(prompt)
            self._sampler.start(prompt, logits.shape[-1])
            self._token.copy_(self._sampler(logits))
            self._position.fill_(prompt.shape[1])

    def advance(self) -> None:
        """Run the last token and draw the next, without waiting for it."""
        self._graph.replay()

    @torch.inference_mode()
    def _step(self) -> None:
        # After NO_TOKEN, drawn from logits that are not finite, the first token is run: the host will find it and stop.
        token = self._sampler(self._engine.step(self._token, self._position))
        self._token.copy_(token)
        self._position += 1
