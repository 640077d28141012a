"""Train a small causal language model from scratch: text files in, checkpoint folder out.

    python recipes/train_tiny.py --corpus corpus/ --config recipes/configs/larosa-tiny.json \
        --output larosa-tiny

The architecture is whatever the configuration file says (Llama, Qwen2, Mistral, ...). The same
arguments on the same hardware and library versions give the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# cuBLAS reads this when it starts; without it matrix products may not repeat exactly.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from corpus import RecipeError, read_documents, split_holdout
from tokenization import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Plan:
    """The numbers of one run, after rounding tokens to whole steps of whole windows."""

    sequence_length: int
    windows: int
    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float
    clip: float
    seed: int
    log_every: int

    @property
    def step_tokens(self) -> int:
        return self.windows * self.sequence_length

    def rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero at the last step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (self.steps - step) / max(self.steps - self.warmup, 1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small causal language model from scratch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--corpus", type=Path, nargs="+", required=True, help="*.txt, *.txt.xz, or folders of them")
    add("--config", type=Path, required=True, help="Hugging Face model configuration (JSON)")
    add("--output", type=Path, required=True, help="folder for the checkpoint")
    add("--tokenizer", type=Path, help="reuse this tokenizer folder instead of training one")
    add("--vocab-size", type=int, help="tokenizer size; by default the configuration's vocab_size")
    add("--tokens", type=float, default=180e6, help="training tokens, counting repeats")
    add("--sequence-length", type=int, default=2048)
    add("--batch-tokens", type=int, default=65536, help="tokens per optimizer step")
    add("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    add("--warmup", type=float, default=0.03, help="fraction of the steps")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="gradient norm limit")
    add("--holdout", type=float, default=0.005, help="fraction of documents for validation")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--log-every", type=int, default=100, help="steps between progress lines")
    return parser.parse_args(argv)


def load_config(path: Path) -> PreTrainedConfig:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"model configuration not found: {path}") from None
    except ValueError as error:
        raise RecipeError(f"model configuration {path} is not valid JSON: {error}") from None
    try:
        return AutoConfig.for_model(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"model configuration {path} is not usable: {error}") from None


def make_plan(arguments: argparse.Namespace, config: PreTrainedConfig) -> Plan:
    length = arguments.sequence_length
    if not 2 <= length <= config.max_position_embeddings:
        raise RecipeError(
            f"--sequence-length must be 2 to {config.max_position_embeddings}, "
            f"the configuration's max_position_embeddings; got {length}"
        )
    windows = max(arguments.batch_tokens // length, 1)
    steps = max(int(arguments.tokens) // (windows * length), 1)
    return Plan(
        sequence_length=length,
        windows=windows,
        steps=steps,
        warmup=max(round(steps * arguments.warmup), 1),
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        clip=arguments.clip,
        seed=arguments.seed,
        log_every=max(arguments.log_every, 1),
    )


def prepare_tokenizer(
    arguments: argparse.Namespace, config: PreTrainedConfig, documents: list[str]
) -> PreTrainedTokenizerFast:
    vocab_size = arguments.vocab_size or config.vocab_size
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        tokenizer = train_tokenizer(documents, vocab_size, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise RecipeError(
            f"the tokenizer has {len(tokenizer)} tokens but the configuration's vocab_size is {config.vocab_size}"
        )
    return tokenizer


def make_deterministic(seed: int) -> None:
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a cost, and nothing reads it
    # Stops the compiler from choosing kernels by timing, which varies from run to run.
    with suppress(AttributeError):
        torch._inductor.config.deterministic = True


def batches(stream: torch.Tensor, plan: Plan) -> Iterator[torch.Tensor]:
    """Endless batches of windows of length + 1 tokens, in a fixed order for a given seed."""
    length = plan.sequence_length
    generator = torch.Generator().manual_seed(plan.seed)
    span = torch.arange(length + 1, device=stream.device)
    pending = torch.empty(0, dtype=torch.long)
    while True:
        while len(pending) < plan.windows:
            # A new offset each epoch, so that a window never repeats exactly.
            offset = int(torch.randint(length, (1,), generator=generator))
            starts = torch.arange(offset, len(stream) - length, length)
            order = torch.randperm(len(starts), generator=generator)
            pending = torch.cat([pending, starts[order]])
        chosen, pending = pending[: plan.windows], pending[plan.windows :]
        yield stream[chosen.to(stream.device)[:, None] + span].long()


def window_loss(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def validation_loss(model: PreTrainedModel, stream: torch.Tensor, plan: Plan) -> float:
    """Mean loss over non-overlapping windows of the held-out documents."""
    length = min(plan.sequence_length, len(stream) - 1)
    starts = torch.arange(0, len(stream) - length, length, device=stream.device)
    span = torch.arange(length + 1, device=stream.device)
    total, count = 0.0, 0
    with torch.no_grad():
        for group in starts.split(plan.windows):
            loss = window_loss(model, stream[group[:, None] + span].long())
            total, count = total + loss.item() * len(group), count + len(group)
    return total / count if count else math.nan


def weights_hash(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def build_optimizer(model: PreTrainedModel, plan: Plan, device: torch.device) -> torch.optim.Optimizer:
    # Decay belongs on matrices; on norm gains and biases it only pulls the scale down.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")


def train(model: PreTrainedModel, stream: torch.Tensor, plan: Plan, device: torch.device) -> int:
    """Run the plan and return the steps done; SIGTERM or Ctrl-C ends it early but cleanly."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    optimizer = build_optimizer(model, plan, device)
    source = batches(stream, plan)
    model.train()
    begun, step = time.perf_counter(), 0
    while step < plan.steps and not stopped:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = window_loss(model, next(source))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % plan.log_every == 0 or step in (1, plan.steps):
            value = loss.item()  # waits for the GPU, so the clock below is honest
            seconds = time.perf_counter() - begun
            if not math.isfinite(value):
                raise RecipeError(f"the loss is {value} at step {step}: lower --learning-rate")
            say(
                f"step {step}/{plan.steps} loss {value:.4f} norm {norm.item():.2f} "
                f"lr {plan.rate(step - 1):.2e} {step * plan.step_tokens / seconds:,.0f} tok/s "
                f"{seconds:.0f} s"
            )
    if stopped:
        say(f"stopped early after {step} of {plan.steps} steps")
    return step


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def say(text: str) -> None:
    print(text, flush=True)


def run(arguments: argparse.Namespace) -> None:
    begun = time.perf_counter()
    device = torch.device(arguments.device)
    config = load_config(arguments.config)
    plan = make_plan(arguments, config)
    make_deterministic(plan.seed)
    transformers.utils.logging.disable_progress_bar()
    say(f"torch {torch.__version__}, transformers {transformers.__version__}, {device}")

    documents = read_documents(arguments.corpus)
    training, held_out = split_holdout(documents, arguments.holdout, plan.seed)
    tokenizer = prepare_tokenizer(arguments, config, training)
    streams = [
        torch.from_numpy(encode_documents(tokenizer, part) if part else np.zeros(1, np.int32))
        for part in (training, held_out)
    ]
    training_stream, held_out_stream = (part.to(device) for part in streams)
    if len(training_stream) <= 2 * plan.sequence_length:
        raise RecipeError(
            f"the corpus has only {len(training_stream)} tokens; at --sequence-length "
            f"{plan.sequence_length} it needs more than {2 * plan.sequence_length}"
        )
    say(
        f"{len(training):,} documents, {len(training_stream):,} tokens; held out "
        f"{len(held_out):,} documents, {len(held_out_stream):,} tokens; "
        f"ready after {time.perf_counter() - begun:.0f} s"
    )

    torch.manual_seed(plan.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    attention = nullcontext()
    if device.type == "cuda":
        # Only flash attention has both speed and a deterministic backward pass here. Layers are
        # compiled one by one because the mask code around them asks for a mask when compiled.
        attention = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        for layer in model.get_decoder().layers:
            layer.compile()
    count = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{config.model_type}, {count:,} parameters; {plan.steps:,} steps of "
        f"{plan.step_tokens:,} tokens, {plan.steps * plan.step_tokens:,} in all"
    )
    with attention:
        train(model, training_stream, plan, device)
        model.eval()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = validation_loss(model, held_out_stream, plan)
    say(f"validation loss {loss:.4f} (perplexity {math.exp(loss):.2f})")
    say(f"weights sha256 {weights_hash(model)}")
    save(model, tokenizer, arguments.output)
    say(f"saved {arguments.output} after {time.perf_counter() - begun:.0f} s")


def main() -> int:
    try:
        run(parse_arguments())
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
