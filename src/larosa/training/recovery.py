"""Recovery: train a converted model towards the dense one through its own selections (knowledge distillation).

Conversion itself trains nothing. Where more sparsity is wanted than a model bears, its weights can learn to do without
the entries that are dropped: the loss is the divergence of its predictions from the dense model's, and gradients pass
where entries are kept.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
import typer

from larosa.architectures import Architecture, find_architecture
from larosa.architectures.context import context_length
from larosa.calibration import calibration_sequences
from larosa.calibration.sources import SELF
from larosa.checkpoints.card import model_card
from larosa.checkpoints.io import check_output, find_device, load, load_config, save
from larosa.config import LarosaConfig, RecoveryRecord
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import Evaluation, RecordedLogits, evaluate_windows, report_windows
from larosa.evaluation.zeros import sparse_prompts
from larosa.models import set_thresholds, thresholds_of
from larosa.sparsity.prices import SteadyShares
from larosa.sparsity.report import inspect_config
from larosa.utils.finite import not_finite
from larosa.utils.memory import peak_memory
from larosa.utils.progress import advance

#: Sequences that are never trained on, by which training is stopped.
_HELD_OUT = 16
#: Evaluations in a row without a gain that end it.
_PATIENCE = 3
#: Positions whose logits are held at a time, to bound memory on large vocabularies.
_POSITIONS = 512
#: Tokens that go through the models at a time on a GPU, which single sequences leave idle.
_TOKENS = 8192
#: Sequences sampled from the model at a time.
_SAMPLED = 64
#: Tokens of a sequence where nobody says how many, or the model's context.
_LENGTH = 512
_STATE_SUFFIX = ".recovery.pt"


@dataclass(frozen=True)
class RecoverySettings:
    """How a recovery trains.

    `data` is a calibration source; `num_sequences` of `sequence_length` tokens are read from it, `batch` of them a
    step; a length of None is 512, or the model's context where that is shorter. The held-out divergence is measured
    every `evaluate_every` steps.
    """

    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="self (sampled from the dense model), wikitext2, alpaca, c4, or a .txt/.json/.jsonl file or folder.",
        ),
    ] = SELF
    num_sequences: Annotated[int, typer.Option(help="Sequences to train on.")] = 512
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in each sequence.")] = None
    steps: Annotated[int, typer.Option(help="Steps at most.")] = 300
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 16
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-4
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between looks at held-out text, which end training when it no longer gains.")
    ] = 25
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0

    def checked(self, context: int) -> RecoverySettings:
        """These, if they make sense, with sequences that a model of so large a context takes.

        Raises:
            LarosaError: a number out of range.
        """
        for name in ("num_sequences", "steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise LarosaError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise LarosaError(f"--learning-rate {self.learning_rate:g}: give a number between 0 and 1, as 1e-4")
        length = min(_LENGTH, context) if self.sequence_length is None else self.sequence_length
        if not 2 <= length <= context:
            raise LarosaError(f"--sequence-length {length} is outside the model's context of 2 to {context}")
        return replace(self, sequence_length=length)


@dataclass(frozen=True)
class RecoveryReport:
    """What a recovery gained: held-out divergences in nats per token, and measurements on the bundled text."""

    output: str
    larosa: dict[str, Any]
    held_out_before: float
    held_out_after: float
    steps: int
    before: Evaluation
    after: Evaluation
    peak_memory_bytes: dict[str, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def recover_checkpoint(
    source: str,
    output: Path,
    *,
    reference: str,
    settings: RecoverySettings,
    device: str = "auto",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> RecoveryReport:
    """Train a converted checkpoint towards the dense one it came from, into a new folder.

    Training keeps its state beside `output`, so that the same call goes on where an interrupted one stopped.

    Args:
        source: folder or hub name of a converted model; it is trained in float32 and written in its own dtype.
        output: a folder that does not exist yet.
        reference: folder or hub name of the dense model, or a GGUF file.
        settings: how to train.
        device: where both models are.

    Raises:
        LarosaError: anything a user can mend, or no step has lowered the held-out divergence.
    """
    started = time.perf_counter()
    check_output(output, max_shard_size)
    # Refuse bad options before a long load.
    config = load_config(source, trust_remote_code=trust_remote_code)
    settings = settings.checked(context_length(config))
    loading: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    model, tokenizer = load(source, dtype="float32", **loading)
    # A CPU multiplies faster in float32; a GPU has better use for the memory.
    dense = load(reference, dtype="float32" if find_device(device).type == "cpu" else "auto", **loading).model
    block = _check_pair(source, reference, model, dense)
    windows = report_windows(model, tokenizer)
    recorded = RecordedLogits(dense, windows)
    dense_loss, before = evaluate_windows(dense, windows, None), evaluate_windows(model, windows, recorded)
    sequences = _sequences(dense, tokenizer, settings)
    state = output.with_name(output.name + _STATE_SUFFIX)
    training = Training(model, dense, sequences, settings, state)
    training.run()
    if training.best >= training.history[0]:
        raise LarosaError(
            f"{settings.steps} steps have not lowered the held-out divergence of {training.history[0]:.4f}: "
            "give another --learning-rate or more text"
        )
    model.to(config.dtype or torch.float32)
    record = RecoveryRecord(
        source=settings.data,
        num_sequences=settings.num_sequences,
        sequence_length=sequences.shape[1],
        steps=training.best_step,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
    )
    changed: dict[str, Any] = {"recovery": record}
    if block.thresholds is not None and training.thresholds is not None:
        changed["thresholds"] = block.thresholds.model_copy(update={"values": training.thresholds})
    block = block.model_copy(update=changed)
    model.config.larosa = block.model_dump(mode="json")
    after = evaluate_windows(model, windows, recorded)
    card = model_card(output.name, reference, block, inspect_config(model.config), dense_loss, after)
    save(model, tokenizer, output, card, max_shard_size, source=source, trust_remote_code=trust_remote_code)
    state.unlink(missing_ok=True)
    return RecoveryReport(
        output=str(output),
        larosa=model.config.larosa,
        held_out_before=training.history[0],
        held_out_after=training.best,
        steps=training.best_step,
        before=before,
        after=after,
        peak_memory_bytes=peak_memory(),
        seconds=time.perf_counter() - started,
    )


def _check_pair(source: str, reference: str, model: Any, dense: Any) -> LarosaConfig:
    if getattr(model.config, "larosa", None) is None:
        raise LarosaError(f"{source}: not a converted model; convert it first, then recover what that lost")
    if getattr(dense.config, "larosa", None) is not None:
        raise LarosaError(f"{reference}: a converted model, but --reference is the dense one")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
        if getattr(model.config, name) != getattr(dense.config, name):
            raise LarosaError(
                f"{reference}: {name} is {getattr(dense.config, name)}, in {source} it is "
                f"{getattr(model.config, name)}: not the model it was converted from"
            )
    block = LarosaConfig.parse(model.config.larosa)
    if block.quantization is not None:
        raise LarosaError(
            f"{source}: weights of few bits are not trained; convert with --weights full, and recover that"
        )
    return block


def _sequences(dense: Any, tokenizer: Any, settings: RecoverySettings) -> torch.Tensor:
    """Token sequences [held out + trained on, length]."""
    wanted = _HELD_OUT + settings.num_sequences
    shared: dict[str, Any] = {"sequence_length": settings.sequence_length}
    if settings.data != SELF:
        return calibration_sequences(
            settings.data, dense, tokenizer, num_sequences=wanted, seed=settings.seed, **shared
        )
    parts = [
        calibration_sequences(
            SELF, dense, tokenizer, num_sequences=min(_SAMPLED, wanted - at), seed=settings.seed + at, **shared
        )
        for at in range(0, wanted, _SAMPLED)
    ]
    return torch.cat(parts)


class Training:
    """Distillation of `dense` into `model`, in place; after `run` the model is the best that was seen.

    Args:
        model: converted, in float32.
        dense: the reference, on the same device.
        sequences: token ids [number, length], of which the first `_HELD_OUT` are held out.
        settings: how to train.
        state: the file that training goes on from and keeps its state in.
    """

    def __init__(
        self, model: Any, dense: Any, sequences: torch.Tensor, settings: RecoverySettings, state: Path
    ) -> None:
        self._model, self._dense, self._settings, self._state = model, dense, settings, state
        self._architecture = find_architecture(model.config.model_type)
        self._device = self._architecture.embedding(model).weight.device
        self._held_out, self._trained = sequences[:_HELD_OUT], sequences[_HELD_OUT:]
        self._weights = dict(_trainable(model, self._architecture))
        #: The settings of the model before it is trained: a state of other counts or thresholds does not fit it.
        self._conversion = json.dumps(model.config.larosa, sort_keys=True)
        self._shares: SteadyShares | None = None
        #: For each site one a layer, of the best weights; None where the model counts.
        self.thresholds: dict[str, list[float]] | None = None
        for weight in self._weights.values():
            weight.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=settings.learning_rate, betas=(0.9, 0.95), fused=self._device.type == "cuda"
        )
        self._optimizer.param_groups[0]["weight_decay"] = 0.0
        #: The held-out divergence before the first step and at each evaluation since.
        self.history: list[float] = []
        self.best = math.inf
        self.best_step = 0
        self._best_weights: dict[str, torch.Tensor] = {}
        self._step = 0

    def run(self) -> None:
        """Train to the end, or until the held-out divergence has not fallen for some evaluations.

        Raises:
            LarosaError: the loss is NaN or Inf, or the state on disk is of other settings.
        """
        settings = self._settings
        with sparse_prompts(self._model):
            if LarosaConfig.parse(self._model.config.larosa).thresholds is not None:
                self._shares = SteadyShares(self._model, self._architecture, self._run_held_out)
        self._resume()
        with advance("Recovering", total=settings.steps) as tick, sparse_prompts(self._model):
            if not self.history:
                self._evaluate()
            for _ in range(self._step):
                tick()
            while self._step < settings.steps and not self._stalled():
                self._train_step()
                tick()
                if self._step % settings.evaluate_every == 0 or self._step == settings.steps:
                    if self._shares is not None:  # other weights make other magnitudes
                        self._shares.restore()
                    self._evaluate()
                    self._save()
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._best_weights[name])
                weight.requires_grad_(False)
                weight.grad = None
        if self.thresholds is not None:
            set_thresholds(self._model, self._architecture, self.thresholds)

    def _stalled(self) -> bool:
        return len(self.history) > _PATIENCE and min(self.history[-_PATIENCE:]) > self.best

    def _train_step(self) -> None:
        settings = self._settings
        chance = torch.Generator().manual_seed(settings.seed + self._step)
        rows = torch.randperm(len(self._trained), generator=chance)[: settings.batch]
        self._optimizer.param_groups[0]["lr"] = settings.learning_rate * _schedule(self._step, settings.steps)
        for some in self._together(self._trained[rows]):
            share = len(some) / len(rows)
            self._divergence(some, backwards=lambda loss: (loss * share).backward())  # noqa: B023 - called at once
        torch.nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1

    def _evaluate(self) -> None:
        with torch.no_grad():
            parts = [self._divergence(some) * len(some) for some in self._together(self._held_out)]
            found = float(sum(parts)) / len(self._held_out)
        if not math.isfinite(found):
            raise not_finite("the divergence while recovering is", torch.float32)
        self.history.append(found)
        if found < self.best:
            self.best, self.best_step = found, self._step
            self._best_weights = {name: weight.detach().clone() for name, weight in self._weights.items()}
            self.thresholds = self._thresholds()

    def _thresholds(self) -> dict[str, list[float]] | None:
        return None if self._shares is None else thresholds_of(self._model, self._architecture)

    def _run_held_out(self) -> None:
        decoder = self._architecture.decoder(self._model)
        with self._arithmetic():
            for some in self._together(self._held_out):
                decoder(some.to(self._device), use_cache=False)

    def _together(self, sequences: torch.Tensor) -> Iterable[torch.Tensor]:
        """The sequences in parts that go through the models at a time; a CPU has nothing from more than one."""
        return sequences.split(max(_TOKENS // sequences.shape[1], 1) if self._device.type == "cuda" else 1)

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")

    def _divergence(self, ids: torch.Tensor, backwards: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """KL divergence from the dense model on sequences [number, length], nats per token.

        `backwards` gets it piece by piece.
        """
        dense, sparse = (self._architecture.decoder(model) for model in (self._dense, self._model))
        ids = ids.to(self._device)
        with self._arithmetic():
            with torch.no_grad():
                expected = dense(ids, use_cache=False).last_hidden_state.flatten(0, 1)
            hidden = sparse(ids, use_cache=False).last_hidden_state.flatten(0, 1)
            total, leaf = torch.zeros((), device=self._device), hidden.detach().requires_grad_(backwards is not None)
            for rows in torch.arange(len(hidden)).split(_POSITIONS):
                log_p = self._architecture.head(self._model)(leaf[rows]).float().log_softmax(-1)
                with torch.no_grad():
                    dense_head = self._architecture.head(self._dense)
                    target = dense_head(expected[rows].to(dense_head.weight.dtype)).float().log_softmax(-1)
                loss = F.kl_div(log_p, target, log_target=True, reduction="sum") / len(hidden)
                if backwards is not None:
                    backwards(loss)
                total += loss.detach()  # read by nobody while training, so that a GPU need not be waited for
        if backwards is not None:
            hidden.backward(leaf.grad)
        return total

    def _identity(self) -> dict[str, Any]:
        first = next(iter(self._weights.values()))
        return {
            **asdict(self._settings),
            "conversion": self._conversion,
            "tokens": int(self._trained.sum()),
            "weights": len(self._weights),
            "shape": list(first.shape),
        }

    def _save(self) -> None:
        content = {
            "settings": self._identity(),
            "step": self._step,
            "history": self.history,
            "best": (self.best, self.best_step),
            "weights": {name: weight.detach() for name, weight in self._weights.items()},
            "best_weights": self._best_weights,
            "thresholds": (self._thresholds(), self.thresholds),
            "optimizer": self._optimizer.state_dict(),
        }
        partial = self._state.with_name(self._state.name + ".partial")
        try:
            torch.save(content, partial)
            os.replace(partial, self._state)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
            partial.unlink(missing_ok=True)
            raise LarosaError(f"{self._state}: the state of training cannot be written ({error})") from None

    def _resume(self) -> None:
        if not self._state.exists():
            return
        try:
            content = torch.load(self._state, map_location=self._device, weights_only=True)
            settings, (now, of_best) = content["settings"], content["thresholds"]
        except Exception:  # of many types: a damaged file
            raise LarosaError(f"{self._state}: not the state of a recovery; delete it") from None
        if settings != self._identity():
            changed = ", ".join(sorted(key for key, value in self._identity().items() if settings.get(key) != value))
            raise LarosaError(
                f"{self._state}: a recovery with other settings ({changed}); delete it or go on with them"
            )
        self._step, self.history = content["step"], content["history"]
        self.best, self.best_step = content["best"]
        self._best_weights = content["best_weights"]
        self._optimizer.load_state_dict(content["optimizer"])
        self.thresholds = of_best
        if now is not None:
            set_thresholds(self._model, self._architecture, now)
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(content["weights"][name])


def _trainable(model: Any, architecture: Architecture) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Weights, biases and gains of the decoder's layers and the last norm; scores decide, and are not trained."""
    for index, layer in enumerate(architecture.layers(model)):
        for name, parameter in layer.named_parameters():
            if parameter.is_floating_point() and name.rpartition(".")[2] not in ("score", "scale"):
                yield f"{index}.{name}", parameter
    for name, parameter in architecture.final_norm(model).named_parameters():
        yield f"norm.{name}", parameter


def _schedule(step: int, steps: int) -> float:
    """The learning rate's factor: a linear warm-up, then half a cosine down to next to nothing."""
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))
