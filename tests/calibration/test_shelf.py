import resource
import tempfile
from pathlib import Path

import pytest
import torch

from larosa import LarosaError
from larosa.calibration.shelf import Shelf


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def groups():
    generator = torch.Generator().manual_seed(0)
    for width in (1, 5, 3):
        x = torch.randn(4, width, generator=generator)
        yield {"a": x.T, "b": x.double()[:, :1], "c": x.bfloat16()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_gives_back_what_was_put_there(temporary):
    shelf = Shelf()
    for group in groups():
        shelf.append(group)
    assert len(shelf) == 3
    for place, group in enumerate(groups()):
        assert_same(shelf[place], group)
        assert_same(shelf[place - 3], group)
    with pytest.raises(IndexError):
        shelf[3]


def test_takes_away_the_last_and_its_file(temporary):
    shelf, (first, *_, last) = Shelf(), groups()
    shelf.append(first)
    shelf.append(last)
    taken = shelf.pop()
    assert len(list(temporary.rglob("*.safetensors"))) == len(shelf) == 1
    assert_same(taken, last)
    shelf.append(first)
    assert_same(shelf[1], first)


def test_leaves_nothing_behind(temporary):
    shelf = Shelf()
    shelf.append({"a": torch.ones(3)})
    assert any(temporary.iterdir())
    del shelf
    assert not any(temporary.iterdir())


def test_says_where_there_is_no_room(temporary):
    shelf = Shelf()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(LarosaError, match=r"larosa-.*: cannot keep 0.00 GB .* set TMPDIR to a folder"):
            shelf.append({"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(shelf) == 0
    assert Path(shelf._folder.name).is_dir()
