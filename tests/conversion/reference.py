"""The paper's equations on a plain dense decoder, and models and options to hold conversions to them."""

import math

import pytest
import torch

from larosa.config import SITES

PLAIN = {"score": "magnitude", "value_rotation": False, "rotation_objective": "inputs"}  # the paper's own
EXTENSIONS = {"score": "weights", "value_rotation": True, "rotation_objective": "outputs"}

ROTATIONS = ("none", "random", "model", "layer", "block")

# With the family's features of conftest.py: GQA and untied, then MHA and tied.
VARIANTS = [
    pytest.param(family, overrides, id=f"{family}-{name}")
    for family in ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    for name, overrides in (("gqa", {}), ("mha-tied", {"num_key_value_heads": 4, "tie_word_embeddings": True}))
]
VARIANTS += [
    pytest.param("llama", {"attention_bias": False, "mlp_bias": False}, id="llama-no-bias"),
    pytest.param("smollm3", {"use_sliding_window": True, "sliding_window": 8}, id="smollm3-sliding"),
    pytest.param("llama", {"num_hidden_layers": 1}, id="llama-one-layer"),
]


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


class Reference:
    """LaRoSA from the paper's equations 7 to 10 on a plain dense decoder, in float64 and without the package.

    Nothing is merged or folded: at h1 and h3 the normed input is rotated, sparsified, rotated back and only then
    multiplied by the norm's gain and the dense weights; there are no adapters. Llama and Qwen2, no sliding window.
    Without any rotation the linears' own input is sparsified, gain included (the paper's TopK baseline).
    Of the extensions, the value rotation is one of h2 head by head, the score is how far an entry of the rotated
    input moves the outputs, and the output-aware objective is another matrix to take the eigenvectors of.
    """

    def __init__(self, model, rotated=True, scored=False):
        self.rotated, self.scored = rotated, scored
        self.weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        self.config = model.config
        self.layers = range(model.config.num_hidden_layers)
        self.bases = {(i, site): torch.eye(model.config.hidden_size).double() for i in self.layers for site in SITES}
        self.moments = {}

    def linear(self, name, x):
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def rope(self, x):
        """Rotate [heads, T, d]; transformers takes the cosines in float32 whatever the model's dtype."""
        d = x.shape[-1]
        frequencies = 1 / self.config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
        angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
        cos, sin = (torch.cat([f, f], -1).double() for f in (angles.cos(), angles.sin()))
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    def sparsify(self, x, i, site, keep, dense_tokens):
        """Equations 8 to 10 for a [T, D] input of a site; the first `dense_tokens` rows pass whole."""
        Q = self.bases[i, site] if site != "h4" else torch.eye(x.shape[-1]).double()
        rotated = x @ Q
        score = torch.stack([self.moved(i, site, direction) for direction in Q.T]) if self.scored else 1
        # Stable: under GQA the first token's attention output holds each value once per query head, exact ties.
        order = (rotated.abs() * score).argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(rotated).scatter(-1, order[:, : keep[site]], 1.0)
        kept[:dense_tokens] = 1
        return (rotated * kept) @ Q.T

    def matrices(self, i, site):
        """What multiplies the input of a site, the norm's gain included where it is rotated."""
        names = {"h1": ("q", "k", "v"), "h2": ("o",), "h3": ("gate", "up"), "h4": ("down",)}[site]
        layer, block = f"model.layers.{i}.", "self_attn" if site in ("h1", "h2") else "mlp"
        norm = {"h1": "input_layernorm", "h3": "post_attention_layernorm"}.get(site) if self.rotated else None
        gain = self.weights[f"{layer}{norm}.weight"] if norm else 1
        return [self.weights[f"{layer}{block}.{name}_proj.weight"] * gain for name in names]

    def moved(self, i, site, direction):
        """How far the outputs of the linears that read a site move, together, with a step in a direction."""
        return torch.cat([matrix @ direction for matrix in self.matrices(i, site)]).norm()

    def __call__(self, ids, keep=None, dense_tokens=0):
        """Logits [T, vocabulary] of one row of token ids; `keep` None is dense and gathers the moments."""
        c = self.config
        head_dim, T = c.hidden_size // c.num_attention_heads, len(ids)
        causal = torch.ones(T, T).triu(1).bool()

        def site(x, i, name):
            if keep is None:
                self.moments.setdefault((i, name), []).append(x)
                return x
            return self.sparsify(x, i, name, keep, dense_tokens)

        def unit(x):
            return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()

        def normed(x, i, name, norm):
            gain = self.weights[f"model.layers.{i}.{norm}.weight"]
            return site(unit(x), i, name) * gain if self.rotated else site(unit(x) * gain, i, name)

        x = self.weights["model.embed_tokens.weight"][ids]
        for i in self.layers:
            layer = f"model.layers.{i}."
            h1 = normed(x, i, "h1", "input_layernorm")
            q, k, v = (
                self.linear(f"{layer}self_attn.{name}_proj", h1).view(T, -1, head_dim).transpose(0, 1) for name in "qkv"
            )
            q, k = self.rope(q), self.rope(k)
            k, v = (t.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 0) for t in (k, v))
            scores = (q @ k.transpose(1, 2) / math.sqrt(head_dim)).masked_fill(causal, -torch.inf)
            heads = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
            x = x + self.linear(f"{layer}self_attn.o_proj", site(heads, i, "h2"))
            h3 = normed(x, i, "h3", "post_attention_layernorm")
            gate, up = self.linear(f"{layer}mlp.gate_proj", h3), self.linear(f"{layer}mlp.up_proj", h3)
            x = x + self.linear(f"{layer}mlp.down_proj", site(gate * gate.sigmoid() * up, i, "h4"))
        return self.linear("lm_head", unit(x) * self.weights["model.norm.weight"])

    def calibrate(self, sequences, rotation, covariance, objective="inputs", values=False):
        """Equation 7: eigenvectors of the second moments over all calibration tokens."""
        for ids in sequences:
            self(ids)
        rows = {at: torch.cat(x) for at, x in self.moments.items() if at[1] in ("h1", "h3")}
        C = {at: x.T @ x / len(x) for at, x in rows.items()}
        for i in self.layers:
            for site in ("h1", "h3"):
                sources = {"block": [(i, site)], "layer": [(i, "h1"), (i, "h3")], "model": list(C)}[rotation]
                target = sum(C[at] for at in sources if rotation == "block" or covariance in (at[1], "joint"))
                if objective == "outputs":
                    grams = [matrix.T @ matrix for at in sources for matrix in self.matrices(*at)]
                    target = target / target.trace() + sum(grams) / sum(grams).trace()
                self.bases[i, site] = torch.linalg.eigh(target)[1]
            if values:
                self.bases[i, "h2"] = torch.block_diag(*self.value_bases(torch.cat(self.moments[i, "h2"])))

    def value_bases(self, rows):
        """For each query head the eigenvectors of the second moment of all that share its key-value head."""
        heads = rows.view(len(rows), self.config.num_attention_heads, -1).transpose(0, 1)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        for first in range(0, len(heads), group):
            shared = heads[first : first + group].flatten(0, 1)
            yield from [torch.linalg.eigh(shared.T @ shared)[1]] * group


def plain(family):
    return {"llama": {}, "qwen2": {"use_sliding_window": False}}[family]


def calibration_ids(text_file, tokenizer):
    return torch.tensor(tokenizer(text_file.read_text())["input_ids"]).view(4, 32)
