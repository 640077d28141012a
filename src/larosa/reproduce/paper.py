"""The paper's own figures (arXiv 2507.01299), to be shown beside ours for its models.

They are copied as printed, slips included; docs/reproduce.md lists the slips. Cells that cannot be read off
the text of Table 6 and Table 19 are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from larosa.sparsity import SiteSizes


@dataclass(frozen=True)
class PaperModel:
    """One of the paper's models, by the shape that tells it from the others."""

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    @property
    def config(self) -> Any:
        """As much of a configuration as sizes, bytes and FLOPs follow from."""
        return SimpleNamespace(**self.__dict__, dtype=None)

    @property
    def sizes(self) -> SiteSizes:
        """Its activation sites."""
        return SiteSizes.of(self.config)


MODELS = (
    PaperModel("LLaMA2-7B", "llama", 4096, 11008, 32, 32, 32, 32000),
    PaperModel("LLaMA2-70B", "llama", 8192, 28672, 80, 64, 8, 32000),
    PaperModel("LLaMA3-8B", "llama", 4096, 14336, 32, 32, 8, 128256),
    PaperModel("LLaMA3-70B", "llama", 8192, 28672, 80, 64, 8, 128256),
    PaperModel("Mistral-7B", "mistral", 4096, 14336, 32, 32, 8, 32768),
    PaperModel("Qwen2.5-7B", "qwen2", 3584, 18944, 28, 28, 4, 152064),
    PaperModel("Qwen2.5-72B", "qwen2", 8192, 29568, 80, 64, 8, 152064),
)


def find(config: Any) -> PaperModel | None:
    """The paper's model of the same family and shape as `config`, if there is one.

    A shape does not tell a base model from a tuned one, nor LLaMA 3 from 3.1: the reader must.
    """
    for model in MODELS:
        if all(getattr(config, key, None) == getattr(model, key) for key in model.__dict__ if key != "name"):
            return model
    return None


#: Table 1: average accuracy (%) on the seven zero-shot tasks, and 5-shot MMLU; by method, sparsity, model.
TABLE_1 = {
    ("dense", 0.0): {
        "LLaMA2-7B": (66.69, 45.85),
        "LLaMA2-70B": (73.66, 68.80),
        "LLaMA3-8B": (70.05, 65.26),
        "LLaMA3-70B": (76.29, 78.71),
        "Qwen2.5-7B": (70.34, 74.21),
        "Qwen2.5-72B": (75.58, 86.08),
        "Mistral-7B": (70.44, 62.34),
    },
    ("cats", 0.25): {
        "LLaMA2-7B": (63.71, 42.76),
        "LLaMA2-70B": (72.74, 67.50),
        "LLaMA3-8B": (67.66, 61.85),
        "LLaMA3-70B": (75.58, 77.93),
        "Qwen2.5-7B": (69.66, 72.67),
        "Qwen2.5-72B": (72.77, 84.91),
        "Mistral-7B": (64.55, 59.83),
    },
    ("teal", 0.25): {
        "LLaMA2-7B": (65.94, 44.66),
        "LLaMA2-70B": (73.31, 67.70),
        "LLaMA3-8B": (69.40, 63.85),
        "LLaMA3-70B": (73.23, 74.86),
        "Qwen2.5-7B": (69.76, 73.21),
        "Qwen2.5-72B": (75.05, 85.44),
        "Mistral-7B": (70.06, 61.51),
    },
    ("larosa", 0.25): {
        "LLaMA2-7B": (66.39, 45.66),
        "LLaMA2-70B": (73.38, 68.74),
        "LLaMA3-8B": (69.54, 64.85),
        "LLaMA3-70B": (76.30, 78.13),
        "Qwen2.5-7B": (70.12, 73.74),
        "Qwen2.5-72B": (75.53, 85.62),
        "Mistral-7B": (70.25, 61.81),
    },
    ("cats", 0.40): {
        "LLaMA2-7B": (49.55, 24.67),
        "LLaMA2-70B": (62.74, 55.83),
        "LLaMA3-8B": (55.11, 31.82),
        "LLaMA3-70B": (72.07, 72.12),
        "Qwen2.5-7B": (61.83, 63.99),
        "Qwen2.5-72B": (63.12, 80.95),
        "Mistral-7B": (59.62, 44.31),
    },
    ("teal", 0.40): {
        "LLaMA2-7B": (64.92, 43.46),
        "LLaMA2-70B": (72.47, 66.78),
        "LLaMA3-8B": (68.14, 59.84),
        "LLaMA3-70B": (72.24, 73.23),
        "Qwen2.5-7B": (68.61, 71.44),
        "Qwen2.5-72B": (74.65, 84.80),
        "Mistral-7B": (68.76, 60.17),
    },
    ("larosa", 0.40): {
        "LLaMA2-7B": (66.15, 44.66),
        "LLaMA2-70B": (73.31, 68.16),
        "LLaMA3-8B": (68.79, 62.61),
        "LLaMA3-70B": (75.41, 77.62),
        "Qwen2.5-7B": (69.67, 72.33),
        "Qwen2.5-72B": (75.35, 85.53),
        "Mistral-7B": (69.44, 61.15),
    },
    ("teal", 0.50): {
        "LLaMA2-7B": (63.22, 39.57),
        "LLaMA2-70B": (71.92, 64.43),
        "LLaMA3-8B": (64.92, 52.78),
        "LLaMA3-70B": (70.80, 69.20),
        "Qwen2.5-7B": (67.76, 68.53),
        "Qwen2.5-72B": (73.74, 83.54),
        "Mistral-7B": (66.73, 57.34),
    },
    ("larosa", 0.50): {
        "LLaMA2-7B": (64.61, 43.10),
        "LLaMA2-70B": (72.86, 67.57),
        "LLaMA3-8B": (67.19, 58.65),
        "LLaMA3-70B": (73.81, 76.51),
        "Qwen2.5-7B": (69.09, 70.09),
        "Qwen2.5-72B": (75.18, 84.34),
        "Mistral-7B": (68.46, 58.80),
    },
}

_TABLE_2_MODELS = ("LLaMA3-8B", "LLaMA3-70B", "LLaMA2-7B", "LLaMA2-70B", "Mistral-7B", "Qwen2.5-7B", "Qwen2.5-72B")

#: Table 2: perplexity on WikiText-2 test, 128 x 2048 tokens; by method, sparsity, model.
TABLE_2 = {
    key: dict(zip(_TABLE_2_MODELS, row, strict=True))
    for key, row in {
        ("dense", 0.0): (6.13, 2.85, 5.47, 3.32, 5.31, 6.85, 3.87),
        ("cats", 0.25): (7.22, 3.56, 5.99, 3.81, 6.38, 7.58, 4.74),
        ("teal", 0.25): (6.37, 3.95, 6.31, 3.43, 5.53, 6.93, 3.93),
        ("larosa", 0.25): (6.23, 2.94, 5.51, 3.34, 5.34, 6.90, 3.92),
        ("cats", 0.40): (18.37, 5.97, 45.46, 10.75, 23.44, 11.06, 7.15),
        ("teal", 0.40): (6.83, 4.45, 6.40, 3.61, 5.98, 7.20, 4.07),
        ("larosa", 0.40): (6.60, 3.37, 5.64, 3.44, 5.44, 7.10, 4.06),
        ("teal", 0.50): (7.56, 5.61, 6.80, 3.91, 7.17, 7.81, 4.31),
        ("larosa", 0.50): (7.22, 4.10, 5.87, 3.62, 5.62, 7.42, 4.26),
        ("teal", 0.60): (9.19, 9.97, 7.82, 4.53, 8.05, 9.99, 7.45),
        ("larosa", 0.60): (8.57, 5.51, 6.40, 3.98, 6.04, 8.42, 4.90),
    }.items()
}

_TABLE_3_MODELS = ("LLaMA2-7B", "LLaMA3-8B", "LLaMA3-70B", "Qwen2.5-7B", "Qwen2.5-72B", "Mistral-7B")

#: Table 3: tokens a second of a single stream, and how many times the dense model's; by GPU, method, sparsity, model.
TABLE_3 = {
    key: dict(zip(_TABLE_3_MODELS, row, strict=True))
    for key, row in {
        ("A100", "dense", 0.0): (
            *((109.95, 1.00), (101.25, 1.00), (22.05, 1.00)),
            *((107.54, 1.00), (19.32, 1.00), (105.88, 1.00)),
        ),
        ("A100", "larosa", 0.0): (
            *((96.75, 0.88), (92.13, 0.89), (20.32, 0.90)),
            *((100.97, 0.90), (56.33, 0.92), (56.33, 0.88)),
        ),
        ("A100", "larosa", 0.25): (
            *((125.34, 1.14), (111.37, 1.10), (24.70, 1.12)),
            *((123.67, 1.15), (22.60, 1.17), (118.59, 1.12)),
        ),
        ("A100", "larosa", 0.50): (
            *((151.73, 1.38), (131.62, 1.30), (29.77, 1.35)),
            *((152.71, 1.42), (29.17, 1.51), (148.23, 1.40)),
        ),
        ("A100", "larosa", 0.75): (
            *((188.01, 1.72), (174.15, 1.72), (38.59, 1.75)),
            *((180.67, 1.68), (33.42, 1.73), (186.35, 1.76)),
        ),
        ("H20", "dense", 0.0): (
            *((72.47, 1.00), (67.19, 1.00), (15.75, 1.00)),
            *((71.70, 1.00), (14.80, 1.00), (72.89, 1.00)),
        ),
        ("H20", "larosa", 0.0): (
            *((65.95, 0.91), (60.47, 0.90), (14.33, 0.91)),
            *((63.81, 0.89), (13.62, 0.92), (72.89, 0.90)),
        ),
        ("H20", "larosa", 0.25): (
            *((85.51, 1.18), (79.28, 1.18), (19.21, 1.22)),
            *((83.17, 1.16), (18.35, 1.24), (65.60, 1.16)),
        ),
        ("H20", "larosa", 0.50): (
            *((104.36, 1.44), (94.74, 1.41), (22.84, 1.45)),
            *((98.95, 1.38), (21.46, 1.45), (84.55, 1.40)),
        ),
        ("H20", "larosa", 0.75): (
            *((136.97, 1.89), (126.99, 1.89), (29.92, 1.90)),
            *((132.64, 1.85), (28.42, 1.92), (102.05, 1.90)),
        ),
    }.items()
}

#: The columns of `TABLE_4`.
TABLE_4_SETS = ("math500", "gpqa_diamond", "aime24")

#: Table 4: accuracy (%) of DeepSeek-R1's distilled models of these shapes, dense as the paper reproduces it at 0.
TABLE_4 = {
    "LLaMA3-8B": {0.0: (87.6, 45.9, 40.0), 0.25: (85.0, 44.9, 40.0), 0.4: (80.6, 43.1, 36.7), 0.5: (78.8, 41.2, 33.3)},
    "Qwen2.5-7B": {0.0: (93.4, 43.9, 50.0), 0.25: (91.0, 43.5, 46.7), 0.4: (88.5, 41.0, 43.3), 0.5: (85.1, 40.2, 43.3)},
}

#: Table 5, LLaMA2-7B at 50%: actual sparsity (%) at h1 to h4 and of the model, and perplexity; None where the
#: text of the table cannot be read.
TABLE_5_MODEL = "LLaMA2-7B"
TABLE_5 = {
    "TEAL": ("47.9±1.2", "52.0±4.7", "48.4±1.4", "54.9±1.5", "48.8", 6.80),
    "TopK": ("50.0±0.0", None, None, None, None, 6.25),
    "TopK+GS": ("45.0±0.0", None, None, None, None, 6.02),
    "LaRoSA": ("45.0±0.0", None, None, None, None, 5.87),
}

#: Table 6: perplexity by rotation level, sparsity and model, as far as it can be read.
TABLE_6 = {
    "LLaMA3-8B": {
        ("none", 0.25): 6.29,
        ("model", 0.25): 6.35,
        ("block", 0.25): 6.23,
        ("layer", 0.25): 6.23,
        ("none", 0.50): 7.71,
        ("model", 0.50): 7.76,
        ("block", 0.50): 7.21,
        ("layer", 0.50): 7.22,
        ("none", 0.60): 9.39,
        ("model", 0.60): 9.43,
        ("block", 0.60): 8.56,
        ("layer", 0.60): 8.57,
    },
    "LLaMA2-7B": {("block", 0.25): 5.51, ("block", 0.50): 5.86, ("block", 0.60): 6.40},
}

#: Table 9: perplexity with weights of 4 bits, by model, sparsity of LaRoSA and quantizer; None for none.
TABLE_9 = {
    "LLaMA3-8B": {
        0.0: {None: 6.13, "rtn": 8.52, "gptq": 6.54, "awq": 6.48, "omniquant": 6.50},
        0.25: {None: 6.13, "rtn": 8.64, "gptq": 6.58, "awq": 6.56, "omniquant": 6.60},
        0.50: {None: 7.22, "rtn": 9.54, "gptq": 7.64, "awq": 7.58, "omniquant": 7.62},
    },
    "LLaMA2-7B": {
        0.0: {None: 5.47, "rtn": 5.73, "gptq": 5.69, "awq": 5.60, "omniquant": 5.58},
        0.25: {None: 5.51, "rtn": 5.81, "gptq": 5.74, "awq": 5.70, "omniquant": 5.68},
        0.50: {None: 5.87, "rtn": 6.10, "gptq": 6.07, "awq": 6.01, "omniquant": 5.96},
    },
}

#: Table 6: TFLOPs by rotation level.
TABLE_6_TFLOPS = {
    "LLaMA3-8B": {"none": 32.94, "model": 32.94, "block": 37.22, "layer": 34.91},
    "LLaMA2-7B": {"none": 29.26, "model": 29.26, "block": 33.06},
}

#: Table 7: perplexity by calibration set, sparsity and model.
TABLE_7 = {
    "LLaMA3-8B": {
        ("WikiText2", 0.25): 6.13,
        ("WikiText2", 0.40): 6.60,
        ("WikiText2", 0.50): 7.22,
        ("Alpaca", 0.50): 7.23,
    },
    "LLaMA2-7B": {
        ("WikiText2", 0.25): 5.51,
        ("Alpaca", 0.25): 5.52,
        ("WikiText2", 0.40): 5.64,
        ("Alpaca", 0.40): 5.72,
        ("WikiText2", 0.50): 5.87,
        ("Alpaca", 0.50): 5.94,
    },
}

#: Table 8: cosine similarity to Alpaca's covariances, DS-R1-Distill-Qwen2.5-7B.
TABLE_8_MODEL = "Qwen2.5-7B"
TABLE_8 = {"Alpaca": 1.0, "WikiText2": 0.998, "C4": 0.997}

#: Table 10: LLaMA3-8B at 60%: method, (alpha 1, alpha 3), perplexity.
TABLE_10_MODEL = "LLaMA3-8B"
TABLE_10 = (
    ("TopK", (1.00, 1.00), 9.09),
    ("TopK+GS", (0.90, 0.90), 8.98),
    ("TopK+GS", (0.85, 0.70), 8.94),
    ("TopK+GS", (0.80, 0.80), 8.86),
    ("TopK+GS", (0.75, 0.75), 8.93),
    ("LaRoSA", (0.80, 0.80), 8.57),
)

#: Table 11: the coefficients (h1, h2, h3, h4) of each model.
TABLE_11 = {
    "LLaMA2-7B": (0.90, 1.30, 0.80, 1.15),
    "LLaMA2-70B": (0.80, 1.60, 0.80, 1.12),
    "LLaMA3-8B": (0.80, 1.60, 0.80, 1.12),
    "LLaMA3-70B": (0.85, 1.45, 0.75, 1.14),
    "Mistral-7B": (1.00, 1.00, 0.80, 1.12),
    "Qwen2.5-7B": (0.80, 1.60, 0.80, 1.08),
    "Qwen2.5-72B": (0.80, 1.60, 0.80, 1.11),
}

#: Table 19, prefill: TFLOPs of the dense and of the converted model; None where it cannot be read.
TABLE_19: dict[str, tuple[float | None, float | None]] = {
    "LLaMA2-7B": (29.26, None),
    "LLaMA2-70B": (292.44, None),
    "LLaMA3-8B": (None, 35.14),
    "LLaMA3-70B": (None, 317.66),
    "Mistral-7B": (31.34, 33.53),
    "Qwen2.5-7B": (30.64, 32.11),
    "Qwen2.5-72B": (303.69, 32.57),
}
