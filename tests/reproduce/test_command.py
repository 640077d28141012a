"""`larosa reproduce` on the command line: what it prints and writes, and the one-line errors."""

from __future__ import annotations

import json

import pytest

from larosa.reproduce import EXPERIMENTS
from tests.cli.conftest import Outcome, cli, contents, refused  # noqa: F401 - fixtures

QUICK = ("--num-sequences", 4, "--sequence-length", 16, "--max-sequences", 2, "--search-sequences", 1)


@pytest.fixture
def options(texts):
    return (*QUICK, "--data", texts["evaluation"], "--calibration", texts["calibration"])


def test_list_has_a_line_for_each_name(cli):  # noqa: F811
    outcome = cli("reproduce", "--list")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines] == [*EXPERIMENTS, "all"]
    assert all(len(line.split()) > 3 for line in lines)


def test_a_table_on_disk_and_as_json(cli, dense, options, tmp_path):  # noqa: F811
    before = contents(dense)
    out = tmp_path / "out"
    outcome = cli("reproduce", "table19", dense, "--out", out, *options, "--json", tmp_path / "r.json")
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == [str(out / f"table19.{kind}") for kind in ("md", "csv", "json")]
    assert contents(dense) == before
    report = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert report["experiments"]["table19"]["tables"][0]["rows"][1][0] == "LLaMA2-7B"
    assert report["settings"]["num_sequences"] == 4
    assert "Qwen2.5-72B" in (out / "table19.md").read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.json"]


def test_unknown_name(refused, dense, options, tmp_path):  # noqa: F811
    message = refused("reproduce", "table99", dense, "--out", tmp_path / "out", *options)
    assert "'table99'" in message
    assert "table2" in message
    assert not (tmp_path / "out").exists()


def test_nothing_named(refused, dense):  # noqa: F811
    assert "--list" in refused("reproduce")
    assert "--out" in refused("reproduce", "table2", dense)


def test_out_that_is_a_file(refused, dense, options, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("mine", "utf-8")
    assert "a file" in refused("reproduce", "table19", dense, "--out", tmp_path / "file", *options)
    assert (tmp_path / "file").read_text("utf-8") == "mine"


def test_out_in_a_missing_folder(refused, dense, options, tmp_path):  # noqa: F811
    assert "no such folder" in refused("reproduce", "table19", dense, "--out", tmp_path / "a" / "b", *options)


def test_missing_task_folder(refused, dense, options, tmp_path):  # noqa: F811
    arguments = ("reproduce", "table1", dense, "--out", tmp_path / "out", *options)
    assert "--task-data" in refused(*arguments, "--task-data", tmp_path / "nowhere")


def test_task_folder_without_its_files(refused, dense, options, tmp_path):  # noqa: F811
    (tmp_path / "tasks").mkdir()
    arguments = ("reproduce", "table1", dense, "--out", tmp_path / "out", *options)
    assert "winogrande" in refused(*arguments, "--task-data", tmp_path / "tasks")


def test_missing_texts_are_found_before_any_work(refused, dense, options, tmp_path):  # noqa: F811
    arguments = ("reproduce", "all", dense, "--out", tmp_path / "out", *options)
    for option in ("--data", "--calibration", "--other-calibration"):
        assert "missing.txt" in refused(*arguments, option, tmp_path / "missing.txt")
    assert not (tmp_path / "out").exists()


def test_a_converted_model(refused, cli, dense, options, tmp_path):  # noqa: F811
    converted = tmp_path / "converted"
    assert cli("convert", dense, converted, "--rotation", "random", "--no-measure").code == 0
    message = refused("reproduce", "table2", converted, "--out", tmp_path / "out", *options)
    assert "converted already" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--num-sequences", 0),
        ("--max-sequences", 0),
        ("--search-sequences", 0),
        ("--limit", 0),
        ("--sequence-length", 1),
        ("--sequence-length", 4096),
        ("--lengths", "128,1"),
        ("--lengths", ","),
        ("--lengths", "128,long"),
    ],
)
def test_sizes_out_of_range(refused, dense, options, tmp_path, option, value):  # noqa: F811
    assert option in refused("reproduce", "table2", dense, "--out", tmp_path / "out", *options, option, value)


def test_the_command_without_a_terminal_prints_no_progress(cli, dense, options, tmp_path):  # noqa: F811
    outcome = cli("reproduce", "table19", dense, "--out", tmp_path / "out", *options)
    assert (outcome.code, outcome.err) == (0, "")
