"""GGUF files: the same model as the one that was written, and one line for each that cannot be read whole."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import larosa
from larosa import LarosaError
from larosa.conversion.checkpoint import convert_checkpoint

from .gguf_files import VOCABULARY, WORDS, write

PLAIN = {
    "llama": {},
    "qwen2": {"use_sliding_window": False, "sliding_window": None},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 5},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def make(make_model):
    """make(family, **overrides): a model that a GGUF file can hold."""
    return lambda family="llama", **own: make_model(family, **{"vocab_size": VOCABULARY, **PLAIN[family], **own})


@pytest.fixture
def refused(make, tmp_path):
    """refused(**changes): the error of reading a llama's file with these changes, which names the file."""

    def run(model=None, **changes):
        file = write(tmp_path / "model.gguf", model or make(), **changes)
        with pytest.raises(LarosaError) as error:
            larosa.load(str(file))
        message = str(error.value)
        assert message.startswith(str(file))
        assert "\n" not in message
        return message

    return run


def ids():
    return torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", PLAIN)
def test_logits_are_the_written_models(make, tmp_path, family, tied):
    model = make(family, tie_word_embeddings=tied)
    file = write(tmp_path / "model.gguf", model)
    loaded = larosa.load(str(file), dtype="float32").model
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert loaded.config.tie_word_embeddings is tied
    for key in ("rms_norm_eps", "rope_parameters", "vocab_size", "max_position_embeddings", "eos_token_id"):
        expected = {"eos_token_id": 0}.get(key, getattr(model.config, key))
        assert getattr(loaded.config, key) == expected


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_weights_are_what_the_files_numbers_stand_for(make, tmp_path, kind):
    model, kind = make(intermediate_size=64), gguf.GGMLQuantizationType[kind]
    file = write(tmp_path / "model.gguf", model, quantized=kind)
    loaded = larosa.load(str(file), dtype="float32").model
    for name, weight in model.named_parameters():
        # Rows are quantized one by one: their order does not matter.
        row = weight.numpy() if weight.ndim == 1 else gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
        assert np.array_equal(loaded.get_parameter(name).numpy(), row)


def test_own_number_format_is_bfloat16(make, tmp_path):
    model = make()
    loaded = larosa.load(str(write(tmp_path / "model.gguf", model))).model
    assert all(torch.equal(weight, model.get_parameter(name).bfloat16()) for name, weight in loaded.named_parameters())


def test_a_folder_with_one_file(make, tmp_path):
    write(tmp_path / "model.gguf", make())
    assert larosa.inspect(tmp_path).model_type == "llama"
    write(tmp_path / "other.gguf", make())
    with pytest.raises(LarosaError, match=r"2 GGUF files and no config.json; name one, such as .*model.gguf"):
        larosa.load(str(tmp_path))


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}])
def test_rope_scaling(make, tmp_path, rope):
    model = make(rope_parameters=rope, head_dim=64)
    base = rope["rope_theta"] ** -(np.arange(0, 64, 2) / 64)
    if rope["rope_type"] == "linear":
        changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
        file = write(tmp_path / "model.gguf", model, changes)
    else:
        factors = (base / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
        file = write(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": factors})
    loaded = larosa.load(str(file), dtype="float32").model
    assert loaded.config.rope_parameters == pytest.approx(rope)
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits)


def test_other_rope_factors_are_refused(refused, make):
    message = refused(make(head_dim=64), tensors={"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)})
    assert "the factors in 'rope_freqs.weight' are not Llama 3's" in message


def test_tokenizer(make, tmp_path):
    changes = {"tokenizer.chat_template": "{{ messages[0].content }}<|turn|>", "tokenizer.ggml.eot_token_id": 2}
    file = write(tmp_path / "model.gguf", make(), changes)
    model, tokenizer = larosa.load(str(file))
    text = "<|start|>the  thé 12"
    tokens = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(tokens[:4]) == ["<|start|>", "the", "Ġ", "Ġ"]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text.removeprefix("<|start|>")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|turn|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the<|turn|>"
    assert model.generation_config.eos_token_id == [0, 2]
    tokenizer.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    again = larosa.load(str(tmp_path / "saved"))
    assert again.tokenizer(text).input_ids == tokens
    assert again.tokenizer.chat_template == tokenizer.chat_template
    assert again.model.generation_config.eos_token_id == [0, 2]


@pytest.mark.parametrize(
    ("pre", "text", "parts"),
    [
        ("gpt-2", "a  12", ["a", "Ġ", "Ġ12"]),
        ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),
        ("llama-bpe", "a 1234", ["a", "Ġ", "123", "4"]),
        ("qwen2", "a 12", ["a", "Ġ", "1", "2"]),
        ("tekken", "aB 12", ["a", "B", "Ġ", "1", "2"]),
    ],
)
def test_text_is_split_by_the_files_rules(make, tmp_path, pre, text, parts):
    file = write(tmp_path / "model.gguf", make(), {"tokenizer.ggml.pre": pre})
    split = larosa.load(str(file)).tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [part for part, _ in split] == parts


def test_first_and_last_tokens(make, tmp_path):
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = larosa.load(str(write(tmp_path / "model.gguf", make(), changes))).tokenizer
    assert tokenizer("the").input_ids == [1, WORDS.index("the"), 0]


def test_sentencepiece_tokenizer(make, tmp_path):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "t", "h", "e", "th", "▁the", "the"]
    count = len(words)
    model = make(vocab_size=count)
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-i) for i in range(count - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (count - 259)],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": None,
    }
    tokenizer = larosa.load(str(write(tmp_path / "model.gguf", model, changes))).tokenizer
    tokens = tokenizer("the thé").input_ids
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<s>", "▁the", "▁", "th", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the thé"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "gemma2"}, "GGUF architecture 'gemma2' is not supported; supported: llama"),
        ({"changes": {"llama.expert_count": 8}}, "a mixture of experts"),
        ({"changes": {"llama.logit_scale": 2.0}}, "'llama.logit_scale' = 2.0 is not supported"),
        ({"changes": {"llama.attention.sliding_window": 8}}, "'llama.attention.sliding_window' = 8"),
        ({"changes": {"llama.rope.scaling.type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"changes": {"llama.attention.value_length": 4}}, "must all be the same, found [4, 8]"),
        ({"changes": {"llama.feed_forward_length": [56, 56, 56]}}, "not one number for all layers"),
        ({"changes": {"llama.feed_forward_length": None}}, "the metadata lack 'llama.feed_forward_length'"),
        (
            {"changes": {"llama.feed_forward_length": 64}},
            "'blk.0.ffn_gate.weight' is (56, 32), the metadata say (64, 32)",
        ),
        ({"changes": {"split.count": 3}}, "one of several parts"),
        ({"changes": {"tokenizer.ggml.pre": "grunt"}}, "'tokenizer.ggml.pre' = 'grunt' is not supported"),
        ({"changes": {"tokenizer.ggml.model": "bert"}}, "tokenizer 'bert' is not supported"),
        ({"changes": {"tokenizer.ggml.tokens": None}}, "the metadata lack 'tokenizer.ggml.tokens'"),
        (
            {"tensors": {"blk.1.ffn_up.weight": None}},
            "1 weights are missing, the first is 'model.layers.1.mlp.up_proj.weight'",
        ),
        ({"tensors": {"token_embd.weight": None}}, "tensor 'token_embd.weight' is missing"),
        ({"tensors": {"blk.7.ffn_up.weight": np.ones((56, 32), np.float32)}}, "'blk.7.ffn_up.weight' has no place"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "'blk.0.attn_sinks.weight' has no place"),
        (
            {"tensors": {"output_norm.weight": np.ones(32, np.int32)}},
            "'output_norm.weight' is of type I32; not supported",
        ),
    ],
)
def test_what_would_be_lost_is_refused(refused, changes, said):
    assert said in refused(**changes)


def test_more_words_than_rows(refused, make):
    assert f"{len(WORDS)} tokens in the metadata, 200 rows in the embedding" in refused(make(vocab_size=200))


@pytest.mark.parametrize("left", [5, 40, 2000, 8000, -1])
def test_a_truncated_file(make, tmp_path, left):
    file = write(tmp_path / "model.gguf", make())
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(LarosaError, match="truncated or corrupt GGUF file"):
        larosa.load(str(file))


@pytest.mark.parametrize(("content", "said"), [(b"", "an empty file"), (b"PK\x03\x04 zip", "not a GGUF file")])
def test_no_gguf_file(tmp_path, content, said):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(LarosaError, match=said):
        larosa.load(str(file))
    with pytest.raises(LarosaError, match="no such file"):
        larosa.load(str(tmp_path / "none.gguf"))


def test_without_the_package(make, tmp_path, monkeypatch):
    file = write(tmp_path / "model.gguf", make())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LarosaError, match=r"model.gguf: GGUF files need a package: pip install 'larosa\[gguf\]'"):
        larosa.load(str(file))


def test_a_file_written_anew_is_read_anew(make, tmp_path):
    file = tmp_path / "model.gguf"
    for seed in (0, 1):
        model = make(seed=seed)
        write(file, model)
        assert torch.equal(larosa.load(str(file), dtype="float32").model(ids()).logits, model(ids()).logits)


def test_convert(make, tmp_path):
    file, text = write(tmp_path / "model.gguf", make()), tmp_path / "text.txt"
    text.write_text("the " * 300, "utf-8")
    out = tmp_path / "out"
    convert_checkpoint(
        str(file), out, sparsity=0.5, calibration=str(text), num_sequences=2, sequence_length=32, measure=False
    )
    converted, tokenizer = larosa.load(str(out))
    assert converted.config.larosa is not None
    assert converted.dtype == torch.bfloat16
    assert tokenizer("the").input_ids == [WORDS.index("the")]
    assert not (Path(out) / "model.gguf").exists()
