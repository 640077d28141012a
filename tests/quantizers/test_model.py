"""Whole models of few bits: what they compute, how they load, what they refuse."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import larosa
from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import SITES, LarosaConfig
from larosa.conversion.checkpoint import Conversion
from larosa.evaluation.zeros import ZeroCounter
from larosa.formats import SCALE_DTYPE, ColumnFormat, Quantization
from larosa.models import QuantizedLinear, head_selector, selectors
from larosa.quantizers import gptq, quantize, round_to_nearest

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
RTN = {"weights": "int4", "weight_group": 32, "quantizer": "rtn"}


def linears(model):
    """Each linear by (layer, site, number), and the head by None."""
    architecture = find_architecture(model.config.model_type)
    found = {None: architecture.head(model)}
    for index, layer in enumerate(architecture.layers(model)):
        for site in SITES:
            for number, linear in enumerate(architecture.linears(layer, site)):
                found[index, site, number] = linear
    return found


def dense_weight(linear):
    """W [N, D] float64 of codes and scales, by loops over bytes."""
    rows, group = [], linear.format.group
    for codes, scales in zip(linear.codes.tolist(), linear.scales.tolist(), strict=True):
        if linear.format.name == "int4":
            codes = [digit - 8 for byte in codes for digit in (byte & 15, byte >> 4)]
        if linear.format.name == "int6":
            pieces = [codes[at : at + 24] for at in range(0, len(codes), 24)]
            codes = [digit - 32 for piece in pieces for b in range(16) for digit in six_bits(piece, b)]
        rows.append([scales[n // group] * codes[n] for n in range(linear.out_features)])
    return torch.tensor(rows, dtype=torch.float64).T


def six_bits(piece, b):
    """The codes of the two outputs in byte b of the 16 that have four bits of each."""
    leading = piece[16 + b % 8] >> 4 * (b // 8)
    return piece[b] & 15 | (leading & 3) << 4, piece[b] >> 4 | (leading >> 2 & 3) << 4


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(
    ("family", "weights"),
    [(family, weights) for family in FAMILIES for weights in ("int8", "int4")] + [("llama", "int6")],
)
def test_computes_what_its_codes_say(make_model, quick_convert, token_ids, family, weights):
    options = {"sparsity": 0.4, "rotation": "block"}
    model = quick_convert(make_model(family, torch.float64), **RTN | {"weights": weights}, **options)
    plain = quick_convert(make_model(family, torch.float64), **options)
    for at, linear in linears(plain).items():
        quantized = linears(model)[at]
        expected = round_to_nearest(linear.weight, quantized.format, "")
        assert torch.equal(quantized.codes, expected[0])
        assert torch.equal(quantized.scales, expected[1])
        linear.weight.copy_(dense_weight(quantized))
    assert {site: [s.k for s in found] for site, found in selectors(model, find_architecture(family)).items()} == {
        site: plain.config.larosa["keep"][site] for site in SITES
    }
    ids = token_ids(2, 15)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)


@pytest.fixture
def planes(make_model, quick_convert):
    """A model whose linears are in two planes of 4 bits, and the same in full."""
    options = {"sparsity": 0.6, "selection": "threshold", "search": "fisher", "dense_first_token": False}
    both = (quick_convert(make_model("llama", torch.float64), **options, **few) for few in (PLANES, {}))
    return tuple(both)


PLANES = {"weights": "int4+4", "weight_group": 32, "head": "full", "quantizer": "rtn"}


def halves(linear):
    """The two planes of a linear, [N, D] float64 each."""
    return dense_weight(linear).chunk(2, dim=1)


def test_planes_are_what_rounding_leaves(planes):
    model, plain = planes
    form = replace(linears(model)[0, "h4", 0].format, planes=1)
    for at, linear in linears(plain).items():
        if at is None:
            continue
        first, second = halves(linears(model)[at])
        for found, wanted in ((first, linear.weight), (second, linear.weight - first)):
            codes, scales = round_to_nearest(wanted, form, "")
            assert torch.equal(found.T, form.dequantize(codes, scales, len(wanted), torch.float64))
        assert (linear.weight - first - second).norm() < 0.015 * linear.weight.norm()


def test_an_entry_reads_the_planes_whose_scores_it_is_worth(planes, token_ids):
    """Against every product by itself, with masks by loops."""
    model, plain = planes
    architecture = find_architecture("llama")
    found, before = selectors(model, architecture), selectors(plain, architecture)
    seen: dict = {}
    for at, linear in linears(model).items():
        if at is not None:
            linear.register_forward_hook(lambda _m, x, y, at=at: seen.update({at: (x[0], y)}))
    for site in SITES:
        for index, selector in enumerate(found[site]):
            assert torch.equal(selector.score[: len(selector.score) // 2], before[site][index].score)
            selector.register_forward_pre_hook(lambda _m, x, at=(index, site): seen.update({at: x[0]}))
    model(token_ids(2, 9))
    read = total = 0
    for (index, site, number), linear in ((at, each) for at, each in linears(model).items() if at is not None):
        x, selector = seen[index, site], found[site][index]
        first, second = selector.score.chunk(2)
        masks = [x.abs() * score > selector.threshold for score in (first, second)]
        expected = sum((x * mask) @ plane.T for mask, plane in zip(masks, halves(linear), strict=True))
        expected = expected if linear.bias is None else expected + linear.bias
        torch.testing.assert_close(seen[index, site, number][1], expected, rtol=1e-10, atol=1e-10)
        assert not (masks[1] & ~masks[0]).any()
        read += sum(int(mask.sum()) for mask in masks) * linear.out_features
        total += 2 * masks[0].numel() * linear.out_features
    assert read / total == pytest.approx(0.4, abs=0.1)  # on other text
    with ZeroCounter(model) as zeros:
        model(token_ids(2, 9))
        assert float(zeros.skipped().mean()) == pytest.approx(1 - read / total)


def test_scores_of_the_second_plane_are_lengths_in_the_unit_of_the_first(planes):
    model, plain = planes
    architecture = find_architecture("llama")
    found = selectors(model, architecture)
    for site in SITES:
        for index, selector in enumerate(found[site]):
            first, second = selector.score.chunk(2)
            layer = architecture.layers(plain)[index]
            weights = torch.cat([linear.weight for linear in architecture.linears(layer, site)])
            quantized = [linears(model)[at] for at in linears(model) if at is not None and at[:2] == (index, site)]
            left = torch.cat([halves(linear)[1] for linear in quantized])
            unit = first.norm() / weights.norm()
            torch.testing.assert_close(second, left.norm(dim=0) * unit, rtol=1e-6, atol=0)


@pytest.fixture
def head_in_planes(make_model, quick_convert):
    """A model whose linears and head are in two planes of 4 bits, and the same in full."""
    options = {"sparsity": 0.6, "selection": "threshold", "search": "fisher", "dense_first_token": True}
    forms = (PLANES | {"head": "int4+4"}, {})
    return tuple(quick_convert(make_model("llama", torch.float64), **options, **few) for few in forms)


def test_a_head_in_planes_is_what_rounding_leaves_and_reads_what_scores_say(head_in_planes, token_ids):
    model, plain = head_in_planes
    weight, head, selector = plain.lm_head.weight, model.lm_head, head_selector(model, find_architecture("llama"))
    form = replace(head.format, planes=1)
    first, second = halves(head)
    for found, wanted in ((first, weight), (second, weight - first)):
        codes, scales = round_to_nearest(wanted, form, "")
        assert torch.equal(found.T, form.dequantize(codes, scales, len(wanted), torch.float64))
    of_first, of_second = selector.score.chunk(2)
    unit = of_first.norm() / weight.norm()
    torch.testing.assert_close(of_second, second.norm(dim=0) * unit, rtol=1e-6, atol=0)
    seen = []
    head.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    with ZeroCounter(model) as zeros:
        logits = model(token_ids(2, 9)).logits
    (x,) = seen
    masks = [x.abs() * score > selector.threshold for score in (of_first, of_second)]
    # The first token too, which is dense at every other site: no token reads what a head reads of another.
    assert not masks[1][:, 0].all()
    expected = sum((x * mask) @ plane.T for mask, plane in zip(masks, (first, second), strict=True))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    dropped = 1 - torch.cat(masks, dim=-1).double().mean()
    assert 0.1 < float(dropped) < 0.9
    assert zeros.fractions()["head"].mean == pytest.approx(float(dropped))
    assert model.config.larosa["thresholds"]["head"] == {
        "value": selector.threshold,
        "dropped": pytest.approx(float(dropped), abs=0.1),  # on other text
    }


def test_a_head_in_planes_counts_bytes_as_it_is_stored(head_in_planes):
    model, _ = head_in_planes
    report, head = larosa.inspect(model), model.lm_head
    dropped = model.config.larosa["thresholds"]["head"]["dropped"]
    assert report.head_bytes == head.codes.nbytes + head.scales.nbytes
    assert report.head_bytes_sparse == round((1 - dropped) * report.head_bytes)
    assert report.score_bytes == 8 * 2 * (sum(each.in_features for each in site_heads(model)) + head.in_features)


def test_a_head_in_planes_is_saved_with_scores_and_threshold(head_in_planes, token_ids, tmp_path):
    (model, _), ids = head_in_planes, token_ids(2, 9)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
    assert AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state.shape == (2, 9, 32)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["larosa"]["thresholds"]["head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LarosaError, match=r"key 'larosa.thresholds': .*a head in planes needs 'head'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_planes_count_bytes_as_they_are_stored(planes):
    model, _ = planes
    report = larosa.inspect(model)
    stored = sum(each.codes.nbytes + each.scales.nbytes for at, each in linears(model).items() if at is not None)
    assert report.bytes_dense_total == stored
    assert report.score_bytes == 8 * 2 * sum(each.in_features for each in site_heads(model))
    read = report.bytes_sparse_total - report.adapter_bytes - report.score_bytes
    assert read / stored == pytest.approx(0.4, abs=0.01)


def site_heads(model):
    """One linear of each site."""
    return [linear for at, linear in linears(model).items() if at is not None and at[2] == 0]


def test_planes_without_thresholds_are_all_read(make_model, quick_convert, token_ids):
    options = {"sparsity": 0.0, "selection": "threshold", "search": "fisher"}
    model, plain = (quick_convert(make_model("qwen2", torch.float64), **options, **few) for few in (PLANES, {}))
    for at, linear in linears(plain).items():
        if at is not None:
            linear.weight.copy_(sum(halves(linears(model)[at])))
    ids = token_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"dense_first_token": True}, {"selection": "threshold", "search": "fisher"}])
def test_gptq_sees_whole_inputs_behind_rounded_layers(make_model, quick_convert, text_file, tokenizer, options):
    """Against hooks on the whole model with nothing dropped, which runs anew for each layer."""
    options = {"sparsity": 0.5, **options}
    model = quick_convert(make_model("llama", torch.float64), weights="int4", weight_group=32, **options)
    assert model.config.larosa["quantization"]["quantizer"] == "gptq"
    plain, architecture = quick_convert(make_model("llama", torch.float64), **options), find_architecture("llama")
    for layer in architecture.layers(plain):
        layer.dense.first, layer.dense.prompts = False, True
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"]).view(4, 32)
    form = LarosaConfig.parse(model.config.larosa).linear_format
    for index, layer in enumerate(architecture.layers(plain)):
        seen = {site: [] for site in SITES}
        for site in SITES:
            linear = architecture.linears(layer, site)[0]
            linear.register_forward_pre_hook(lambda _m, x, at=seen[site]: at.append(x[0].flatten(0, -2)) or None)
        plain(ids, use_cache=True)  # a prompt
        for site in SITES:
            s = torch.cat(seen[site])
            for number, linear in enumerate(architecture.linears(layer, site)):
                columns = linear.weight.T.reshape(linear.in_features, -1)
                filling = -columns.shape[1] % 32
                columns = torch.cat([columns, columns.new_zeros(len(columns), filling)], dim=1)
                scales, q = gptq(columns.unflatten(1, (-1, 32)), s.T @ s / len(s), form)
                quantized = linears(model)[index, site, number]
                assert torch.equal(quantized.scales, scales)
                assert torch.equal(quantized.codes, form.pack(q.flatten(1)[:, : linear.out_features]))
                linear.weight.copy_(dense_weight(quantized))


@pytest.fixture
def saved(make_model, quick_convert, tokenizer, tmp_path):
    """A converted model of few bits, and the folder that it is in."""
    model = quick_convert(make_model("llama", torch.bfloat16), **RTN)
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    return model, tmp_path / "out"


def test_loads_bit_by_bit(saved, token_ids):
    model, folder = saved
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), larosa.load(str(folder), device="cpu").model):
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            assert state[name].dtype is weight.dtype
            assert torch.equal(state[name], weight), name
        assert torch.equal(loaded(token_ids(1, 9)).logits, model(token_ids(1, 9)).logits)
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base.layers[0].mlp.down_proj, QuantizedLinear)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert larosa.inspect(model).parameter_bytes == sum(p.nbytes for p in model.parameters()) < files
    assert larosa.inspect(str(folder)).parameter_bytes == larosa.inspect(model).parameter_bytes


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_codes_and_scales_are_the_same_in_every_dtype(saved, dtype):
    model, folder = saved
    wanted = getattr(torch, dtype)
    moved = copy.deepcopy(model).to(wanted)
    for other in (larosa.load(str(folder), dtype=dtype, device="cpu").model, moved):
        assert other.model.norm.weight.dtype is wanted
        for at, linear in linears(other).items():
            assert linear.scales.dtype is SCALE_DTYPE
            assert torch.equal(linear.scales, linears(model)[at].scales)
            assert torch.equal(linear.codes, linears(model)[at].codes)


def test_counts_bytes_as_they_are_stored(saved):
    model, _ = saved
    report, found = larosa.inspect(model), linears(model)
    stored = {at: linear.codes.nbytes + linear.scales.nbytes for at, linear in found.items()}
    assert report.head_bytes == stored.pop(None)
    assert report.bytes_dense_total == sum(stored.values())
    assert report.weight_bits == 8 * sum(stored.values()) / sum(
        found[at].in_features * found[at].out_features for at in stored
    )
    read = 0
    for (index, site, _), size in ((at, stored[at]) for at in stored):
        width, k = found[index, site, 0].in_features, model.config.larosa["keep"][site][index]
        read += size * k // width
    assert report.bytes_sparse_total == read + report.adapter_bytes + report.score_bytes
    lost = report.sparsity.weights - report.sparsity.weights_net_of_adapters
    assert lost == pytest.approx(report.adapter_bytes / report.bytes_dense_total)


def change(folder: Path, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(UP + "codes"), f"weights are missing, 1 in all; the first is '{UP}codes'"),
        (lambda w: w.pop(UP + "scales"), f"weights are missing, 1 in all; the first is '{UP}scales'"),
        (lambda w: w.update({UP + "weight": torch.ones(56, 32)}), f"'{UP}weight' is stored, but config.json makes"),
        (lambda w: w.update({UP + "codes": w[UP + "codes"][:-1].clone()}), f"'{UP}codes' is stored as .31, 28., but"),
        (
            lambda w: w.update({UP + "scales": w[UP + "scales"][:, :1].clone()}),
            f"'{UP}scales' is stored as .32, 1., but",
        ),
        (
            lambda w: w.update({UP + "scales": w[UP + "scales"].float()}),
            f"'{UP}scales' is stored as F32, but config.json makes it BF16",
        ),
        (
            lambda w: w.update({UP + "codes": w[UP + "codes"].to(torch.int32)}),
            f"'{UP}codes' is I32, a quantized weight",
        ),
        (
            lambda w: w.update({UP + "codes": w[UP + "codes"].view(torch.int8)}),
            f"'{UP}codes' is stored as I8, but config.json makes it U8",
        ),
    ],
)
def test_tensors_that_are_not_what_the_settings_say(saved, edit, message):
    _, folder = saved
    change(folder, edit)
    with pytest.raises(LarosaError, match=message) as caught:
        larosa.load(str(folder))
    assert "\n" not in str(caught.value)


def test_settings_that_are_not_what_is_stored(saved):
    _, folder = saved
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    for quantization in (None, {"weights": "int8", "head": "int8", "group": 32, "quantizer": "rtn"}):
        config["larosa"]["quantization"] = quantization
        file.write_text(json.dumps(config), "utf-8")
        with pytest.raises(LarosaError, match=r"22 in all; the first is 'lm_head\.weight'|_proj\.codes' is stored"):
            larosa.load(str(folder))


@pytest.mark.parametrize(("head", "tied"), [("full", True), ("int8", False)])
def test_a_tied_head_of_few_bits_leaves_the_embedding_as_it_is(
    make_model, quick_convert, tokenizer, token_ids, tmp_path, head, tied
):
    dense = make_model("llama", tie_word_embeddings=True)
    embedding = dense.model.embed_tokens.weight.detach().clone()
    model = quick_convert(dense, rotation="none", weights="int4", quantizer="rtn", head=head)
    assert model.config.tie_word_embeddings == tied
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    larosa.save(model, tokenizer, str(tmp_path / "out"), "card")
    loaded, _ = larosa.load(str(tmp_path / "out"))
    assert (getattr(loaded.lm_head, "weight", None) is loaded.model.embed_tokens.weight) == tied
    ids = token_ids(1, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_head_alone(make_model, quick_convert, token_ids):
    plain, model = quick_convert(make_model("qwen2")), quick_convert(make_model("qwen2"), head="int8")
    assert not isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    hidden = plain.model(token_ids(1, 9)).last_hidden_state
    expected = hidden.double() @ dense_weight(model.lm_head).T
    torch.testing.assert_close(model(token_ids(1, 9)).logits.double(), expected, rtol=1e-4, atol=1e-5)


def test_weights_stay_when_the_sparsity_changes(make_model, tokenizer, text_file, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = {"calibration": str(text_file), "num_sequences": 4, "sequence_length": 32}
    conversion = Conversion(str(tmp_path / "dense"), [], sparsity=0.5, weights="int4", device="cpu", **options)
    before = {at: linear.codes.clone() for at, linear in linears(conversion._converted.model).items()}
    points = [conversion.sweep_point(sparsity) for sparsity in (0.5, 0.0)]
    assert points[0].bytes_per_token < points[1].bytes_per_token
    for at, linear in linears(conversion._converted.model).items():
        assert torch.equal(linear.codes, before[at])


class Ternary(ColumnFormat):
    """A format that the package does not know."""

    name, bits, lowest, highest, targets, codes_dtype = "ternary", 2, -1, 1, (1.0, 1.4), torch.int8

    def codes_width(self, outputs):
        return outputs

    def pack(self, q):
        return q.to(torch.int8)

    def unpack(self, codes, outputs):
        return codes


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_another_format_is_a_class(make_model, quick_convert, token_ids, monkeypatch, quantizer):
    monkeypatch.setattr(Quantization, "linear_format", property(lambda self: Ternary(self.group)))
    model = quick_convert(make_model("llama"))
    quantization = Quantization(weights="int4", group=32, quantizer=quantizer)
    quantize(model, find_architecture("llama"), quantization, token_ids(2, 16), torch.device("cpu"))
    for at, linear in linears(model).items():
        if at is not None:
            assert set(linear.codes.unique().tolist()) <= {-1, 0, 1}
    assert model(token_ids(1, 5)).logits.isfinite().all()
    assert larosa.inspect(model).weight_bits > 8


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["full", "int8"])
@pytest.mark.parametrize("weights", ["full", "int4"])
@pytest.mark.one_of(3)
def test_asks_for_the_space_that_it_takes(make_model, tokenizer, tmp_path, monkeypatch, tied, head, weights):
    make_model("llama", torch.bfloat16, tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = {"method": "topk", "weights": weights, "head": head, "measure": False, "device": "cpu"}
    options |= {"quantizer": "rtn"} if weights == "int4" else {}

    def convert(free):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        return Conversion(str(tmp_path / "dense"), [tmp_path / "out"], sparsity=0.5, search="none", **options)

    taken = larosa.inspect(convert(2**30)._converted.model).parameter_bytes
    with pytest.raises(LarosaError, match="no space left on the disk"):
        convert(taken - 1)
    convert(taken)
