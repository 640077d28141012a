"""What a user sees on standard error: larosa's own lines and nothing of the libraries below."""

import subprocess
import sys

import pytest

SHORT = ("--max-sequences", "1", "--sequence-length", "64")


@pytest.fixture(scope="module")
def run():
    """run("eval", ...): a command in a process of its own, where no warning was shown before; its standard error."""

    def run(*arguments: object) -> str:
        command = [sys.executable, "-c", "from larosa.cli.main import main; main()", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


@pytest.fixture(scope="module")
def converting(run, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet") / "out"
    return folder, run("convert", models["dense"], folder, "--num-sequences", "2", "--sequence-length", "32")


@pytest.mark.slow
def test_convert_warns_of_nothing(converting):
    assert converting[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--kv-cache-dtype", "int8")])
def test_eval_warns_of_nothing(run, models, converting, options):
    assert run("eval", converting[0], *SHORT, "--reference", models["dense"], *options) == ""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["larosa", "transformers"])
def test_generate_prints_its_speed_alone(run, models, converting, engine):
    for model in (models["dense"], converting[0]):
        lines = run("generate", model, "--prompt", "w9", "--max-new-tokens", "8", "--engine", engine).splitlines()
        assert len(lines) == 1
        assert lines[0].endswith(f"{engine} engine")
