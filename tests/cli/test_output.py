"""What commands print is what there is, and what cannot be written is found before the work."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest

from larosa.cli.main import main
from larosa.data.bundled import bundled_model

from .conftest import QUICK

PROMPT = "a\tb\r\n[bold]c[/bold] :100: :smiley: \x07 [/] d"


@pytest.mark.parametrize("columns", ["20", "200"])
def test_text_comes_as_it_is(cli, monkeypatch, columns, tmp_path):
    monkeypatch.setenv("COLUMNS", columns)
    outcome = cli(
        "generate", bundled_model(), "--prompt", PROMPT, "--max-new-tokens", 40, "--json", tmp_path / "a.json"
    )
    assert outcome.code == 0
    text = json.loads((tmp_path / "a.json").read_text("utf-8"))["text"]
    assert outcome.out == PROMPT + text + "\n"


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "a [/] :100: b", "[link=x]"])
def test_names_in_tables(cli, checkpoint, tmp_path, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = checkpoint.rename(tmp_path / name.replace("/", "|"))
    outcome = cli("inspect", folder)
    assert outcome.code == 0
    assert "".join(folder.name.split()) in "".join(outcome.out.split())  # a long title is wrapped


def test_a_prompt_that_is_not_utf_8(refused, checkpoint):
    message = refused("generate", checkpoint, "--prompt", os.fsdecode(b"w5 \xff w6"))
    assert message == "--prompt: not UTF-8 text (character 4)"


def test_streams_that_are_not_utf_8(checkpoint, tmp_path, monkeypatch):
    """Commands one after the other in a process whose standard streams are ASCII."""
    renamed = checkpoint.rename(tmp_path / "ខ្មែរ")
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii", errors) for errors in ("strict", "backslashreplace"))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for *command, code in (
        ("generate", bundled_model(), "--prompt", "日本 é", "--max-new-tokens", 4, 0),
        ("convert", renamed, tmp_path / "日本", *QUICK, 0),
        ("inspect", tmp_path / "日本", 0),
        ("inspect", tmp_path / "nowhere é", 1),
    ):
        monkeypatch.setattr(sys, "argv", ["larosa", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code, err.buffer.getvalue()
    assert out.buffer.getvalue()


@pytest.mark.parametrize("size", ["5G", "5", "GB", "-1GB", "0GB", "1.5GB", ""])
def test_shard_sizes(refused, checkpoint, tmp_path, size):
    (checkpoint / "model.safetensors").write_bytes(b"not read")
    assert "--max-shard-size" in refused("convert", checkpoint, tmp_path / "out", *QUICK, "--max-shard-size", size)


def test_a_small_shard_size(cli, checkpoint, tmp_path):
    options = (*QUICK, "--no-measure", "--max-shard-size", "20kb")
    assert cli("convert", checkpoint, tmp_path / "out", *options).code == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


class TestPlacesThatCannotBeWritten:
    """Found before the weights are even looked at."""

    @pytest.fixture(autouse=True)
    def _weights_that_must_not_be_read(self, checkpoint):
        (checkpoint / "model.safetensors").write_bytes(b"not read")

    @pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write to")
    def test_a_parent(self, refused, checkpoint):
        assert "/proc: cannot be written to" in refused("convert", checkpoint, "/proc/out", *QUICK)

    @pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write to")
    def test_a_json_file(self, refused, checkpoint, tmp_path):
        for command in (("convert", checkpoint, tmp_path / "out"), ("inspect", checkpoint), ("eval", checkpoint)):
            assert "(--json)" in refused(*command, "--json", "/proc/a.json")

    @pytest.mark.parametrize("length", [250, 256, 5000])
    def test_a_name_that_is_too_long(self, refused, checkpoint, tmp_path, length):
        assert "too long" in refused("convert", checkpoint, tmp_path / ("n" * length), *QUICK)

    def test_a_link_to_nowhere(self, refused, checkpoint, tmp_path):
        (tmp_path / "out").symlink_to(tmp_path / "gone")
        assert "exists already" in refused("convert", checkpoint, tmp_path / "out", *QUICK)

    def test_nothing_is_left(self, refused, checkpoint, tmp_path):
        refused("convert", checkpoint, tmp_path / "out", *QUICK, "--json", tmp_path / "a.json")
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_name_of_240_bytes(cli, checkpoint, tmp_path):
    options = ("--search", "grid", *QUICK, "--no-measure", "--calibration", "bundled")
    assert cli("convert", checkpoint, tmp_path / ("n" * 240), *options).code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "dense"] == ["n" * 240]
