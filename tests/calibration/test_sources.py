import json
from pathlib import Path

import pytest
import torch

from larosa import LarosaError
from larosa.calibration import calibration_sequences
from larosa.data.text import TextSplit, read_text, tokenize


@pytest.fixture
def write(tmp_path):
    """write(name, content): the path of a new file, as a string."""

    def make(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, "utf-8")
        return str(path)

    return make


def lines(*rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def read(source):
    return read_text(source, TextSplit.TRAIN)


def test_text_file_is_read_as_it_is(write):
    text = "  One.\n\nTwo: žluťoučký 漢字 \u2028 end\n"
    assert read(write("a.txt", text)) == text


def test_jsonl_texts_are_joined_by_an_empty_line(write):
    assert read(write("a.jsonl", lines({"text": "One", "id": 7}, {"text": "Two\nlines"}))) == "One\n\nTwo\nlines"


def test_alpaca_rows(write):
    rows = (
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Part.", "output": "Bye"},
    )
    assert read(write("a.jsonl", lines(*rows))) == "Add.\n1 + 1\n2\n\nGreet.\nHi\n\nPart.\nBye"


def test_empty_lines_of_jsonl_are_skipped(write):
    assert read(write("a.jsonl", '\n{"text": "One"}\n\n  \n{"text": "Two"}\n\n')) == "One\n\nTwo"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_jsonl_lines_end_at_newlines_alone(write, separator):
    # Valid inside a JSON string (those below U+0020 only escaped), and common in web text.
    text = f"One{separator}two"
    assert read(write("a.jsonl", lines({"text": text}, ensure_ascii=ord(separator) < 0x20))) == text


def test_byte_order_mark_is_no_text(write):
    assert read(write("a.jsonl", b"\xef\xbb\xbf" + lines({"text": "One"}).encode())) == "One"


def test_folder_is_read_in_the_order_of_names(write, tmp_path):
    write("folder/b.txt", "second")
    write("folder/a.jsonl", lines({"text": "first"}))
    write("folder/c.md", "not this")
    assert read(str(tmp_path / "folder")) == "first\n\nsecond"


def test_folder_without_text_files(write, tmp_path):
    write("folder/c.md", "not this")
    with pytest.raises(LarosaError, match=r"no .txt, .json or .jsonl file"):
        read(str(tmp_path / "folder"))


@pytest.mark.parametrize(
    "bad", ["{", "[]", "7", "null", '"text"', '{"title": "x"}', '{"text": null}', '{"text": 3}', '{"instruction": "x"}']
)
def test_bad_row_is_named_by_its_line(write, bad):
    # Line 2 is empty and still counts.
    path = write("a.jsonl", f'{{"text": "x"}}\n\n{{"text": "y"}}\n{bad}\n{{"text": "z"}}\n')
    with pytest.raises(LarosaError, match=r"a\.jsonl, line 4"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_of_another_encoding(write, name):
    with pytest.raises(LarosaError, match=r"not UTF-8 text \(byte 3\)"):
        read(write(name, "caf\xe9 au lait".encode("latin-1")))


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", ""), ("a.jsonl", "\n")])
def test_empty_text(write, name, content):
    with pytest.raises(LarosaError, match="no text in it"):
        read(write(name, content))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(LarosaError, match=r"'wikitext'.*alpaca.*bundled.*c4.*wikitext2"):
        read("wikitext")


@pytest.fixture
def sequences(make_model, tokenizer, write):
    """sequences(text, number, length, seed, vocab_size): calibration sequences from a file with this text."""

    def make(text, number, length, seed=0, vocab_size=128):
        model = make_model("llama", num_hidden_layers=1, vocab_size=vocab_size)
        source = write("calibration.txt", text)
        return calibration_sequences(source, model, tokenizer, num_sequences=number, sequence_length=length, seed=seed)

    return make


EVERY_WORD = " ".join(f"w{i}" for i in range(4, 128))


def test_windows_are_disjoint_pieces_of_the_text(sequences):
    found = sequences(EVERY_WORD, 12, 10)
    assert found.shape == (12, 10)
    assert found.dtype == torch.int64
    assert len(found.unique()) == 120
    for window in found.tolist():
        assert (window[0] - 4) % 10 == 0
        assert window == list(range(window[0], window[0] + 10))


def test_windows_follow_the_seed(sequences):
    first = sequences(EVERY_WORD, 5, 10, seed=1)
    assert torch.equal(sequences(EVERY_WORD, 5, 10, seed=1), first)
    assert not torch.equal(sequences(EVERY_WORD, 5, 10, seed=2), first)


def test_every_window_can_be_chosen(sequences):
    starts = {int(row[0]) for seed in range(20) for row in sequences(EVERY_WORD, 2, 31, seed=seed)}
    assert starts == {4, 35, 66, 97}


def test_all_windows_may_be_asked_for(sequences):
    assert len(sequences(EVERY_WORD, 4, 31)) == 4


@pytest.mark.parametrize(("number", "length", "enough"), [(13, 10, 12), (5, 31, 4), (2, 100, 1)])
def test_too_few_tokens_says_how_many_windows_there_are(sequences, number, length, enough):
    with pytest.raises(LarosaError, match=rf"has 124 tokens, but {number} x {length} .*--num-sequences to {enough} "):
        sequences(EVERY_WORD, number, length)


def test_too_short_for_one_window_does_not_suggest_zero_of_them(sequences):
    with pytest.raises(LarosaError, match="--sequence-length") as error:
        sequences(EVERY_WORD, 1, 125)
    assert "--num-sequences to 0" not in str(error.value)


def test_tokens_that_the_model_lacks(sequences):
    with pytest.raises(LarosaError, match="token id 127 but the model's vocabulary has 100"):
        sequences(EVERY_WORD, 1, 10, vocab_size=100)


def test_a_model_may_have_spare_tokens(sequences):
    assert len(sequences(EVERY_WORD, 1, 10, vocab_size=200)) == 1


class TestEndings:
    """What a file holds is known by its ending; nothing else is taken for text."""

    @pytest.mark.parametrize("name", ["a.json", "a.JSON"])
    @pytest.mark.parametrize(
        "content",
        [
            [{"text": "one"}, {"text": "two"}],
            {"train": [{"text": "one"}, {"text": "two"}]},
            {"text": "one\n\ntwo"},
            [{"instruction": "one", "output": ""}, {"instruction": "two", "input": "", "output": ""}],
        ],
    )
    def test_records_of_json(self, write, name, content):
        assert read(write(name, json.dumps(content, indent=1))) == "one\n\ntwo"

    @pytest.mark.parametrize(
        "content", ["[1, 2]", '[["text"]]', '{"a": 1, "b": 2}', "null", '[{"text": 1}]', '{"text": ']
    )
    def test_other_json(self, write, content):
        with pytest.raises(LarosaError, match=r"a\.json"):
            read(write("a.json", content))

    def test_capital_letters(self, write):
        assert read(write("a.JSONL", '{"text": "one"}\n{"text": "two"}\n')) == "one\n\ntwo"
        assert read(write("a.TXT", '{"text": "one"}')) == '{"text": "one"}'

    @pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl.gz", "a.zip", "a.html"])
    def test_unknown_ones(self, write, name):
        with pytest.raises(LarosaError, match=r"of an unknown format '.+'; give \.txt, \.json or \.jsonl"):
            read(write(name, "text"))

    @pytest.mark.parametrize("name", ["corpus", "wiki.train.tokens", "wiki.raw", "notes.md"])
    def test_texts(self, write, name):
        assert read(write(name, "as it is")) == "as it is"

    def test_a_folder(self, write):
        path = Path(write("folder/a.json", '[{"text": "one"}]'))
        write("folder/b.TXT", "two")
        write("folder/c.csv", "three")
        assert read(path.parent) == "one\n\ntwo"


def test_text_that_is_no_unicode(write, tokenizer):
    source = str(write("a.jsonl", '{"text": "w5 \\ud800"}'))
    with pytest.raises(LarosaError, match=r"not UTF-8 text \(character 4\)"):
        tokenize(read(source), tokenizer, 128)
