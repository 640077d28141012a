"""The README.md of a converted checkpoint, written from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from larosa.config import LarosaConfig, Method, Rotation, Settings
from larosa.evaluation.perplexity import Evaluation
from larosa.sparsity.report import Inspection

_NAMES = {Method.LAROSA: "LaRoSA", Method.TOPK: "TopK", Method.TEAL: "TEAL", Method.CATS: "CATS"}

_FRONT_MATTER = """---
library_name: transformers{base_model}
tags:
- larosa
- activation-sparsity
pipeline_tag: text-generation
---

# {name}

{base} sparsified by larosa {version}{method}: {weights:.1%} of the decoder's weights are not read
per token{fluctuating}.

This checkpoint needs the larosa package: `pip install larosa`. Tools load it with `trust_remote_code=True`
(`modeling_larosa.py` imports that package and does nothing else), Python code also after `import larosa`:

```python
import larosa
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

It inherits the licence and the limits of the model it was converted from.{rotated}
"""

_ROTATED = " `hidden_states[l]` are in the\nrotated basis of layer l, not in that model's own."


def model_card(
    name: str,
    base: str,
    block: LarosaConfig,
    inspection: Inspection,
    dense: Evaluation | None,
    sparse: Evaluation | None,
) -> str:
    """Markdown with Hugging Face front matter.

    Args:
        name: of the converted model.
        base: folder or hub name of the model it was converted from.
        dense, sparse: the measurement before and after conversion; None where it was left out.
    """
    sparsity = inspection.sparsity
    # A local path means nothing to others, and says more about a machine than a card should.
    local = Path(base).exists()
    text = _FRONT_MATTER.format(
        name=name,
        base=Path(base).resolve().name if local else f"[{base}](https://huggingface.co/{base})",
        base_model="" if local else f"\nbase_model: {base}",
        version=block.larosa_version,
        method="" if block.method is Method.LAROSA else f" with the method {_NAMES[block.method]}",
        weights=sparsity.weights,
        fluctuating=" on average over the calibration text" if block.thresholds is not None else "",
        rotated="" if block.rotation is Rotation.NONE else _ROTATED,
    )
    settings = _settings(block)
    if block.calibration is not None:
        record = block.calibration
        settings["calibration"] = (
            f"{record.source}, {record.num_sequences} x {record.sequence_length} tokens, seed {record.seed}"
        )
    if block.recovery is not None:
        trained = block.recovery
        settings["recovery"] = (
            f"{trained.steps} steps of {trained.batch} x {trained.sequence_length} tokens from {trained.source}, "
            f"learning rate {trained.learning_rate:g}, seed {trained.seed}"
        )
    text += "\n## Settings\n\n" + _table(("setting", "value"), [(k, str(v)) for k, v in settings.items()])
    text += "\n## What is skipped\n\n" + _table(
        ("", ""),
        [
            ("nominal sparsity", f"{sparsity.nominal:.1%}"),
            ("weights skipped", f"{sparsity.weights:.1%}"),
            ("the same net of residual adapters", f"{sparsity.weights_net_of_adapters:.1%}"),
            ("weight bytes per token, dense", f"{inspection.bytes_dense_total:,}"),
            ("weight bytes per token, sparse", f"{inspection.bytes_sparse_total:,}"),
            ("bytes of the head per token", f"{inspection.head_bytes_sparse:,}"),
            ("bits of a weight, scales included", f"{inspection.weight_bits:.3g}"),
            ("bytes of all parameters", f"{inspection.parameter_bytes:,}"),
        ],
    )
    text += "\n" + _selection(block, inspection)
    if dense is not None and sparse is not None:
        text += (
            f"\n## What was lost\n\nMeasured on larosa's bundled text ({sparse.windows} windows of "
            f"{sparse.sequence_length} tokens, a small sample):\n\n"
        )
        rows = [
            ("perplexity", f"{dense.perplexity:.3f}", f"{sparse.perplexity:.3f}"),
            ("KL divergence to dense (nats per token)", "0", f"{sparse.kl_divergence:.4f}"),
            ("same likeliest next token as dense", "100%", f"{sparse.top1_agreement:.1%}"),
            ("weights skipped by a token", "0%", f"{sparse.actual_sparsity:.1%}"),
        ]
        text += _table(("", "dense", "sparse"), rows)
    return text


#: Told elsewhere in the card: the numbers, and what came before and after the conversion.
_ELSEWHERE = ("sparsity", "alphas", "quantization", "calibration")


def _settings(block: LarosaConfig) -> dict[str, Any]:
    """The choices of a conversion as the options are called, but for those that had no effect."""
    given: dict[str, Any] = {name: getattr(block, name) for name in Settings.model_fields if name not in _ELSEWHERE}
    given |= {"adapters": block.adapters, "selection": block.selection}
    if block.quantization is not None:
        given |= {"weights": block.quantization.weights, "head": block.quantization.head}
        given |= {"weight_group": block.quantization.group, "quantizer": block.quantization.quantizer}
    if not block.rotation.has_adapters:
        del given["adapters"]
    if block.rotation is not Rotation.LAYER:
        del given["layers_per_rotation"]
    return {
        name.replace("_", " "): {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        for name, value in given.items()
        if value is not None
    }


def _selection(block: LarosaConfig, inspection: Inspection) -> str:
    """What each site keeps in the first layer."""
    first = [report for report in inspection.sites if report.layer == 0 and report.site in block.method.sites]
    if block.thresholds is not None:
        return _table(
            ("site", "threshold in the first layer", "entries dropped of the calibration text"),
            [(report.site, f"{report.threshold:.4g}", f"{report.sparsity:.1%}") for report in first],
        )
    return _table(
        ("site", "alpha", "entries kept in the first layer"),
        [
            (report.site, f"{block.alphas[report.site]:.3f}" if block.alphas else "-", f"{report.k} of {report.width}")
            for report in first
        ],
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
