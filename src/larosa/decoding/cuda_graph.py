"""The loop from token to token on a GPU: one CUDA graph a token, and no waiting in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

import torch

from larosa.decoding.engine import Engine
from larosa.decoding.loop import checked
from larosa.decoding.sampling import Sampler
from larosa.ops.cuda.launch import early_launches

#: Tokens that the GPU may be ahead of the host. It hides the host's pauses; as many are thrown away after a stop.
_AHEAD = 8


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
            self._graph = self._capture()

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
    def _capture(self) -> torch.cuda.CUDAGraph:
        """The graph of one token. What trying it leaves in the cache stands where the next prompt is written."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and takes what workspace libraries want, which capturing must not
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._position.zero_()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._sampler.generator)
        # Beside ranks NCCL's own thread asks the GPU for news meanwhile, which only concerns that thread.
        mode = "global" if self._engine.weights.shard is None else "thread_local"
        with torch.cuda.graph(graph, capture_error_mode=mode):
            self._step()
        return graph

    def _step(self) -> None:
        # After NO_TOKEN, drawn from logits that are not finite, the first token is run: the host will find it and stop.
        token = self._sampler(self._engine.step(self._token, self._position))
        self._token.copy_(token)
        self._position += 1
