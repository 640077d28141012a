import copy
import math

import pytest
import torch
from transformers import DynamicCache

import larosa
from larosa import LarosaError, PerSite
from larosa.architectures import cache_argument, find_architecture
from larosa.config import SITES
from larosa.evaluation.zeros import ZeroCounter
from larosa.models import selectors

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


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@pytest.mark.one_of(2)
def test_exact_at_zero_sparsity_in_float64(make_model, quick_convert, token_ids, family, overrides, rotation):
    model, ids = make_model(family, torch.float64, **overrides), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation, **EXTENSIONS)
    assert relative_error(converted(ids).logits, expected) < 1e-10


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@pytest.mark.one_of(3)
def test_exact_at_zero_sparsity_in_float32(make_model, quick_convert, token_ids, family, overrides, rotation):
    model, ids = make_model(family, **overrides), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation, **EXTENSIONS)
    assert relative_error(converted(ids).logits, expected) < 1e-4


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("layers_per_rotation", [2, 3, 4])
@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.one_of(4)
def test_exact_where_layers_share_a_rotation(make_model, quick_convert, token_ids, family, layers, layers_per_rotation):
    model, ids = make_model(family, torch.float64, num_hidden_layers=layers), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, layers_per_rotation=layers_per_rotation)
    assert relative_error(converted(ids).logits, expected) < 1e-10
    behind = [layer.residual_adapter is not None for layer in converted.model.layers]
    assert behind == [after > 0 and after % layers_per_rotation == 0 for after in reversed(range(layers))]


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("covariance", ["h1", "h3", "joint"])
def test_exact_with_a_padded_batch_and_self_calibration(make_model, token_ids, covariance):
    model, ids = make_model("qwen2", torch.float64), token_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = model(ids, attention_mask=mask).logits
    larosa.convert(model, sparsity=0.0, covariance=covariance, num_sequences=3, sequence_length=20)
    found = model(ids, attention_mask=mask).logits
    assert relative_error(found[mask.bool()], expected[mask.bool()]) < 1e-10


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


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
@pytest.mark.parametrize(
    ("rotation", "covariance"),
    [("layer", "h1"), ("layer", "h3"), ("layer", "joint"), ("block", "joint"), ("model", "h1"), ("model", "joint")],
)
def test_equals_the_papers_equations(
    make_model, quick_convert, token_ids, text_file, tokenizer, family, sparsity, rotation, covariance
):
    model, ids = make_model(family, torch.float64, **plain(family)), token_ids(20, seed=5)
    reference = Reference(model)
    reference.calibrate(calibration_ids(text_file, tokenizer), rotation, covariance)
    keep = {site: width - round(sparsity * width) for site, width in (("h1", 32), ("h2", 32), ("h3", 32), ("h4", 56))}
    expected = reference(ids, keep)
    dense = model(ids[None]).logits[0]

    converted = quick_convert(model, sparsity=sparsity, rotation=rotation, covariance=covariance, **PLAIN)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8
    assert relative_error(expected, dense) > 0.01  # sparsity of this size is far from rounding


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("keys", [2, 4], ids=["gqa", "mha"])
@pytest.mark.parametrize("rotation", ["layer", "block"])
@pytest.mark.parametrize(
    "parts",
    [
        {"score": "weights"},
        {"value_rotation": True},
        {"rotation_objective": "outputs"},
        EXTENSIONS,
    ],
    ids=["score", "values", "outputs", "all"],
)
def test_equals_the_equations_of_the_extensions(
    make_model, quick_convert, token_ids, text_file, tokenizer, family, keys, rotation, parts
):
    options = {**PLAIN, **parts}
    model = make_model(family, torch.float64, num_key_value_heads=keys, **plain(family))
    ids = token_ids(20, seed=5)
    reference = Reference(model, scored=options["score"] == "weights")
    sequences = calibration_ids(text_file, tokenizer)
    reference.calibrate(sequences, rotation, "joint", options["rotation_objective"], options["value_rotation"])
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(model, rotation=rotation, **options)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("values", [False, True])
def test_scores_and_values_without_a_rotation_of_the_stream(
    make_model, quick_convert, token_ids, text_file, tokenizer, values
):
    model, ids = make_model("llama", torch.float64), token_ids(20, seed=8)
    reference = Reference(model, rotated=False, scored=True)
    if values:
        for sequence in calibration_ids(text_file, tokenizer):
            reference(sequence)
        for i in reference.layers:
            rows = torch.cat(reference.moments[i, "h2"])
            reference.bases[i, "h2"] = torch.block_diag(*reference.value_bases(rows))
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(
        model, rotation="none", score="weights", value_rotation=values, rotation_objective="inputs"
    )
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"rotation": "model"}, [(0, 1, 2)]),
        ({"layers_per_rotation": 2}, [(0,), (1, 2)]),
        ({"layers_per_rotation": 3}, [(0, 1, 2)]),
    ],
)
def test_one_basis_for_a_group_of_layers_from_the_sum_of_what_each_layer_wants(
    make_model, quick_convert, token_ids, text_file, tokenizer, options, groups
):
    model, ids = make_model("llama", torch.float64), token_ids(20, seed=9)
    reference = Reference(model)
    for sequence in calibration_ids(text_file, tokenizer):
        reference(sequence)
    for group in groups:
        target = 0
        for i in group:
            rows = torch.cat([*reference.moments[i, "h1"], *reference.moments[i, "h3"]])
            grams = sum(m.T @ m for site in ("h1", "h3") for m in reference.matrices(i, site))
            target = target + rows.T @ rows / rows.square().sum() + grams / grams.trace()
        for i in group:
            reference.bases[i, "h1"] = reference.bases[i, "h3"] = torch.linalg.eigh(target)[1]
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(model, **{**PLAIN, "rotation_objective": "outputs", **options})
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.parametrize("layers_per_rotation", [3, 100])
@pytest.mark.parametrize("objective", ["inputs", "outputs", "fisher"])
def test_one_group_of_all_layers_is_rotation_model(make_model, quick_convert, layers_per_rotation, objective):
    options = {"rotation_objective": objective}
    whole = quick_convert(make_model("qwen3"), rotation="model", **options).state_dict()
    group = quick_convert(make_model("qwen3"), layers_per_rotation=layers_per_rotation, **options).state_dict()
    assert group.keys() == whole.keys()
    assert all(torch.equal(weight, whole[name]) for name, weight in group.items())


@pytest.mark.usefixtures("exact_norms")
def test_equals_the_papers_equations_without_rotation_and_with_coefficients(make_model, quick_convert, token_ids):
    model, ids = make_model("llama", torch.float64), token_ids(20, seed=6)
    reference = Reference(model, rotated=False)
    alphas = PerSite(h1=0.9, h2=1.3, h3=0.8, h4=1.2)
    keep = {"h1": 32 - 14, "h2": 32 - 21, "h3": 32 - 13, "h4": 56 - 34}  # alpha x 50% of 32 and 56, rounded
    expected = reference(ids, keep)
    converted = quick_convert(model, sparsity=0.5, rotation="none", alphas=alphas, **PLAIN)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("prefill", ["sparse", "dense"])
def test_decoding_after_a_prompt_equals_the_papers_equations(
    make_model, quick_convert, token_ids, text_file, tokenizer, prefill
):
    model, ids = make_model("qwen2", torch.float64, **plain("qwen2")), token_ids(20, seed=7)
    reference = Reference(model)
    reference.calibrate(calibration_ids(text_file, tokenizer), "layer", "joint")
    keep = {"h1": 16, "h2": 16, "h3": 16, "h4": 28}
    expected = reference(ids, keep, dense_tokens=12 if prefill == "dense" else 0)

    converted = quick_convert(model, sparsity=0.5, prefill=prefill, **PLAIN)
    kept = cache_argument(converted, DynamicCache())
    logits = [converted(ids[None, :12], use_cache=True, **kept).logits[0]]
    for i in range(12, 20):
        logits.append(converted(ids[None, i : i + 1], use_cache=True, **kept).logits[0])
    assert relative_error(torch.cat(logits), expected) < 1e-8


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.77, 0.9])
@pytest.mark.one_of(3)
def test_every_site_keeps_exactly_its_count(make_model, quick_convert, token_ids, family, sparsity):
    model = quick_convert(make_model(family), sparsity=sparsity)
    seen = []

    def check(site, index):
        def hook(module, inputs, output):
            assert bool((inputs[0] != 0).all())  # so that a zero in the output was dropped
            kept = output != 0
            assert bool((kept.sum(-1) == model.config.larosa["keep"][site][index]).all())
            assert torch.equal(output[kept], inputs[0][kept])
            seen.append((site, index))

        return hook

    for site, parts in selectors(model, find_architecture(family)).items():
        for index, selector in enumerate(parts):
            selector.register_forward_hook(check(site, index))
    model(token_ids(2, 11))
    assert sorted(seen) == sorted((site, index) for site in SITES for index in range(3))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_do_not_change_the_count(make_model, quick_convert, token_ids, value):
    # Every activation alike, or all zero: thresholds would keep all or nothing, Top-K keeps k.
    model = make_model("llama", attention_bias=False, mlp_bias=False)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else value)
    model = quick_convert(model, sparsity=0.5, rotation="none", value_rotation=False, search="none")
    with ZeroCounter(model) as zeros:
        model(token_ids(2, 11))
    expected = 1.0 if value == 0 else 0.5
    for site in SITES:
        fraction = zeros.fractions()[site]
        assert (fraction.min, fraction.mean, fraction.max) == (expected, expected, expected)


def test_the_callers_configuration_is_left_alone(family_config, quick_convert):
    from transformers import AutoModelForCausalLM

    config = family_config("llama", tie_word_embeddings=True)
    before, kind = copy.deepcopy(config.to_dict()), type(config)
    model = AutoModelForCausalLM.from_config(config)
    given, before_use = model.config, model.config.to_dict()
    converted = quick_convert(model)
    assert converted is model
    assert (type(config), config.to_dict()) == (kind, before)
    assert (type(given), given.to_dict()) == (kind, before_use)
    assert converted.config is not given
    assert converted.config.model_type == "larosa_llama"
    assert converted.model.layers[0].self_attn.config is converted.config


def test_what_the_configuration_records(make_model, quick_convert, text_file):
    model = quick_convert(make_model("qwen3"), sparsity=0.25, seed=3, prefill="dense", rotation="block", search="none")
    block = model.config.larosa
    assert (block["sparsity"], block["rotation"], block["prefill"], block["recipe"]) == (0.25, "block", "dense", "best")
    assert block["larosa_version"] == larosa.__version__
    assert block["calibration"] == {
        "source": str(text_file),
        "num_sequences": 4,
        "sequence_length": 32,
        "seed": 3,
    }
    assert block["keep"]["h2"] == [64 - 16] * 3  # 4 heads of 16, a quarter dropped
    assert model.config.tie_word_embeddings is False


def test_the_same_seed_gives_the_same_model(make_model, token_ids):
    def logits(seed):
        model = larosa.convert(make_model("llama"), num_sequences=2, sequence_length=40, seed=seed)
        return model(token_ids(1, 9)).logits

    torch.manual_seed(1)
    first = logits(0)
    torch.manual_seed(2)
    assert torch.equal(logits(0), first)
    assert not torch.equal(logits(1), first)


def test_result_is_in_evaluation_mode_and_needs_no_gradient(make_model, quick_convert, token_ids):
    model = make_model("llama").train().requires_grad_(True)
    converted = quick_convert(model)
    assert not any(module.training for module in converted.modules())
    assert not any(weight.requires_grad for weight in converted.parameters())
    assert converted(token_ids(1, 5)).logits.grad_fn is None


def test_a_model_in_training_mode_is_calibrated_without_dropout(make_model, quick_convert, token_ids):
    ids = token_ids(1, 9)
    expected = quick_convert(make_model("llama", attention_dropout=0.5))(ids).logits
    assert torch.equal(quick_convert(make_model("llama", attention_dropout=0.5).train())(ids).logits, expected)


@pytest.mark.parametrize("adapters", [None, "full", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_stay_close_to_the_dense_model(make_model, quick_convert, token_ids, dtype, adapters):
    model, ids = make_model("llama", dtype), token_ids(2, 24)
    expected = model(ids).logits.float()
    converted = quick_convert(model, sparsity=0.0, adapters=adapters)
    assert {weight.dtype for weight in converted.parameters()} == {dtype} | (
        {torch.int8} if adapters != "full" else set()
    )
    # A handful of roundings of 2^-8 and 2^-11.
    assert relative_error(converted(ids).logits.float(), expected) < {torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]


def test_refuses_a_converted_model(make_model, quick_convert):
    with pytest.raises(LarosaError, match="converted already"):
        quick_convert(quick_convert(make_model("llama")))


def test_refuses_text_without_a_tokenizer(make_model, text_file):
    with pytest.raises(LarosaError, match="needs a tokenizer"):
        larosa.convert(make_model("llama"), calibration=str(text_file), num_sequences=1, sequence_length=8)


def test_refuses_sequences_longer_than_the_context(make_model, quick_convert):
    with pytest.raises(LarosaError, match="--sequence-length 129 is over the model's context of 128"):
        quick_convert(make_model("llama"), sequence_length=129, num_sequences=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_bad_weights_by_name(make_model, quick_convert, value):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(LarosaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quick_convert(model)


@pytest.mark.parametrize(
    ("model_type", "reason"), [("gemma2", "normalises after"), ("gpt2", "LayerNorm"), ("made_up", "not known")]
)
def test_refuses_other_families_with_the_reason(make_model, quick_convert, model_type, reason):
    model = make_model("llama")
    model.config.model_type = model_type
    with pytest.raises(LarosaError, match=rf"'{model_type}' .*{reason}.*supported: llama"):
        quick_convert(model)


def test_refuses_to_search_on_sequences_of_one_token(make_model, quick_convert):
    # A search scores next tokens, of which these have none.
    with pytest.raises(LarosaError, match="sequence-length"):
        quick_convert(make_model("llama"), search="grid", num_sequences=2, sequence_length=1)


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_exact_at_zero_sparsity_on_cuda(make_model, quick_convert, token_ids, family, overrides, rotation):
    model, ids = make_model(family, **overrides).cuda(), token_ids(2, 24).cuda()
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation)
    assert all(weight.is_cuda for weight in converted.parameters())
    assert relative_error(converted(ids).logits, expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_model_on_the_cpu_converts_layer_by_layer_on_cuda(make_model, quick_convert, token_ids, family, rotation):
    model, ids = make_model(family), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation, device="cuda")
    assert not any(weight.is_cuda for weight in converted.parameters())
    assert relative_error(converted(ids).logits, expected) < 1e-4


@pytest.mark.gpu
def test_cuda_equals_cpu_at_half_sparsity(make_model, quick_convert, token_ids):
    ids = token_ids(2, 24)
    expected = quick_convert(make_model("llama", torch.float64), rotation="random")(ids).logits
    found = quick_convert(make_model("llama", torch.float64).cuda(), rotation="random")(ids.cuda()).logits.cpu()
    assert relative_error(found, expected) < 1e-4  # float32 norms
