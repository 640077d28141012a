from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from larosa.data.bundled import bundled_model
from larosa.decoding.text import TextStream

TEXT = "The river — Ærø, naïve; 河は流れる 🙂🙂\n\nflows  on.\n"


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """The bundled model's: byte pairs, so that one character can take several tokens."""
    return AutoTokenizer.from_pretrained(bundled_model())


def stream(tokenizer, prompt, tokens, stop=()):
    pieces = []
    output = TextStream(tokenizer, prompt, pieces.append, stop)
    for token in tokens:
        output.put(token)
        if output.stopped:
            break
    output.end()
    assert "".join(pieces) == output.text
    assert output.stopped or output.tokens == len(tokens)
    return output.text, pieces


@pytest.mark.parametrize("cut", [0, 1, 3, 20])
def test_the_pieces_are_the_text(bytes_tokenizer, cut):
    ids = bytes_tokenizer(TEXT)["input_ids"]
    text, pieces = stream(bytes_tokenizer, ids[:cut], ids[cut:])
    assert bytes_tokenizer.decode(ids[:cut]) + text == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10


@given(text=st.text(max_size=80), cut=st.integers(0, 20))
def test_any_text(bytes_tokenizer, text, cut):
    ids = bytes_tokenizer(text)["input_ids"]
    # Only where the prompt ends within a character does the text begin within one.
    before = bytes_tokenizer.decode(ids[:cut], skip_special_tokens=True)
    if not before.endswith("\ufffd"):
        whole = bytes_tokenizer.decode(ids, skip_special_tokens=True)
        assert before + stream(bytes_tokenizer, ids[:cut], ids[cut:])[0] == whole


@given(text=st.text("ab 日🙂é", max_size=30), stop=st.lists(st.text("ab 日🙂é", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string(bytes_tokenizer, text, stop):
    ids = bytes_tokenizer(text)["input_ids"]
    found, _ = stream(bytes_tokenizer, [], ids, stop)
    # One token may hold several: then that which is complete first counts.
    ends = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
    assert found == text[: min(ends)[1] if ends else None]


def test_a_character_cut_off_at_the_end_is_shown_as_such(bytes_tokenizer):
    ids = bytes_tokenizer("flows 🙂")["input_ids"]
    assert stream(bytes_tokenizer, ids[:1], ids[1:-1])[0].endswith("\ufffd")


def test_special_tokens_are_left_out(tokenizer):
    assert stream(tokenizer, [5], [6, 2, 7, 2])[0] == " w6 w7"


def test_the_work_of_a_token_does_not_grow_with_the_text(tokenizer, monkeypatch):
    lengths = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options))
    stream(tokenizer, list(range(4, 100)), list(range(4, 100)))
    assert max(lengths) <= 9


def test_speed_is_of_the_tokens_after_the_first(tokenizer, monkeypatch):
    times = iter([10.0, 10.5, 11.0, 11.5])
    monkeypatch.setattr("larosa.decoding.text.time.perf_counter", lambda: next(times))
    output = TextStream(tokenizer, [], None)
    assert output.tokens_per_second is None
    output.put(5)
    assert output.tokens_per_second is None
    for token in (6, 7, 8):
        output.put(token)
    assert output.tokens_per_second == 2.0


class TestByteFallback:
    """Llama 2's way: what has no token of its own is spelt in bytes, a run of which is decoded as a whole."""

    @pytest.fixture(scope="class")
    def fallback(self):
        vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
        for token in ["▁", *"abcdefgh"]:
            vocabulary[token] = len(vocabulary)
        backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")

    @pytest.mark.parametrize("text", ["ភាសាខ្មែរ ខ្មែរ", "a ភាសា b", "日本語日本語日本語 abc", "abc 🙂🙂🙂🙂"])
    def test_every_cut_between_characters(self, fallback, text):
        ids = fallback(text)["input_ids"]
        for cut in range(len(ids)):
            before = fallback.decode(ids[:cut])
            if "\ufffd" in before:
                continue
            found, pieces = stream(fallback, ids[:cut], ids[cut:])
            assert before + found == text
            assert max(map(len, pieces), default=0) <= 2  # as it comes, not all at the end

    @pytest.mark.parametrize(
        ("text", "stop", "expected"),
        [
            ("abc 🙂🙂 def", "🙂 d", "abc 🙂"),
            ("ភាសាខ្មែរ abc", "ខ្", "ភាសា"),
            ("日本語 abc", "本", "日"),
            ("日本語 abc", "c日", "日本語 abc"),
        ],
    )
    def test_stop_strings_of_several_bytes(self, fallback, text, stop, expected):
        ids = fallback(text)["input_ids"]
        found, pieces = stream(fallback, ids[:1], ids[1:], [stop])
        assert found == expected
        assert not any("\ufffd" in piece for piece in pieces)

    def test_a_long_word_that_the_prompt_ends_in(self, fallback):
        ids = fallback("ភាសាខ្មែរ" * 20)["input_ids"]
        more = fallback("ខ្មែរ")["input_ids"][1:]
        found, pieces = stream(fallback, ids, more)
        assert (found, len(pieces)) == ("ខ្មែរ", 5)

    def test_an_invalid_byte_holds_nothing_up(self, fallback):
        ids = fallback("ab")["input_ids"]
        letters = fallback("c d e f")["input_ids"][1:]
        found, pieces = stream(fallback, ids, [1 + 0xE1, *letters, 1 + 0x9F])
        assert found == "\ufffdc d e f\ufffd"
        assert len(pieces) == 1 + len(letters)

    def test_nothing_but_invalid_bytes(self, fallback):
        found, pieces = stream(fallback, fallback("ab")["input_ids"], [1 + 0xFF] * 40)
        assert found == "\ufffd" * 40
        assert len(pieces) >= 8
