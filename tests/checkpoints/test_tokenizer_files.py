"""A converted model's tokenizer gives the same tokens as its source's."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer

import larosa
from larosa.checkpoints.tokenizer_files import save_tokenizer
from larosa.config import LarosaConfig

_TEXTS = ("Hello world", " hello  two", "<s>after<unk> special", "a\n\tb", "ខ្មែរ")


@pytest.fixture
def legacy(tmp_path, make_model):
    """A Llama whose tokenizer is of Llama 2: byte fallback, spaces by a normalizer, `legacy`."""
    folder = tmp_path / "dense"
    make_model("llama", vocab_size=512).save_pretrained(folder)
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzH"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in [*letters, "▁h", "he", "ll", "▁w", "or"]:
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "h"), ("h", "e"), ("l", "l"), ("▁", "w"), ("o", "r")]
    backend = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_a_tokenizer_of_llama_2(legacy, tmp_path):
    from larosa.conversion.checkpoint import convert_checkpoint

    source = larosa.load(str(legacy)).tokenizer
    convert_checkpoint(str(legacy), tmp_path / "out", sparsity=0.5, num_sequences=2, sequence_length=32, measure=False)
    converted = larosa.load(str(tmp_path / "out")).tokenizer
    for text in _TEXTS:
        assert converted(text)["input_ids"] == source(text)["input_ids"]
        ids = source(text)["input_ids"]
        assert converted.decode(ids) == source.decode(ids)
    for file in legacy.glob("tokenizer*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_tokenizer_that_changes_when_saved(legacy, tmp_path, make_model, quick_convert):
    tokenizer = larosa.load(str(legacy)).tokenizer
    (tmp_path / "out").mkdir()
    make_model("llama").config.save_pretrained(tmp_path / "out")
    save_tokenizer(tokenizer, tmp_path / "out", str(legacy))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [loaded(text)["input_ids"] for text in _TEXTS] == [tokenizer(text)["input_ids"] for text in _TEXTS]


def test_one_that_cannot_be_saved_is_refused(tokenizer, tmp_path, make_model, monkeypatch):
    class Shifted(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            found = super().__call__(*args, **kwargs)
            found["input_ids"] = [*found["input_ids"], 5]
            return found

    mine = Shifted(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    make_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(larosa.LarosaError, match="saved and loaded again it gives other tokens"):
        save_tokenizer(mine, tmp_path)


@pytest.mark.parametrize("use", ["sides", "batch"])
def test_a_tokenizer_in_use_can_be_saved(use, legacy, tmp_path, make_model):
    """What lm-eval and batches set on a tokenizer says how it is used, not which tokens it gives."""
    tokenizer = larosa.load(str(legacy)).tokenizer
    if use == "sides":
        tokenizer.padding_side = tokenizer.truncation_side = "left"
    else:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer(["Hello", "Hello world"], padding=True, truncation=True, max_length=3)
    for source in (str(legacy), None):
        out = tmp_path / f"out-{source is None}"
        out.mkdir()
        make_model("llama").config.save_pretrained(out)
        save_tokenizer(tokenizer, out, source)
        assert AutoTokenizer.from_pretrained(out)(_TEXTS[1])["input_ids"] == tokenizer(_TEXTS[1])["input_ids"]
    with pytest.raises(larosa.LarosaError, match="other tokens"):  # its files are gone, and it does not save itself
        save_tokenizer(tokenizer, out, str(tmp_path / "moved"))


def test_save_takes_a_path_as_text(make_model, tokenizer, quick_convert, tmp_path):
    model = quick_convert(make_model("llama"))
    larosa.save(model, tokenizer, str(tmp_path / "out"), "# a card")
    loaded = larosa.load(str(tmp_path / "out"))
    assert LarosaConfig.parse(loaded.model.config.larosa).layers == 3
    assert (tmp_path / "out" / "README.md").read_text("utf-8") == "# a card"
