"""How kernels are launched: what the driver is told, and when one may begin before those in front of it end."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from larosa.decoding import cuda_graph
from larosa.decoding.sampling import Sampler
from larosa.ops.cuda import kernels, launch

pytest.importorskip("cuda.bindings")


def test_launch_attributes():
    """The structures that go to the driver, as its bindings make them."""
    gpu = launch.Machine((9, 0), 132, 232448)
    with launch.early_launches():
        config = launch._configuration(gpu, launch.Grid(384, 2, 256, 8), 17000, 0)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (384, 2, 1)
    assert (config.blockDimX, config.sharedMemBytes, config.numAttrs) == (256, 17000, 2)
    early, cluster = config.attrs
    assert early.value.programmaticStreamSerializationAllowed == 1
    assert (cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z) == (8, 1, 1)
    ampere = launch.Machine((8, 0), 108, 166912)
    with launch.early_launches():
        assert launch._configuration(ampere, launch.Grid(1, 1, 256), 0, 0).numAttrs == 0


def starts_early() -> bool:
    """Whether a kernel launched now, on a GPU that can do so, begins before those in front of it have finished."""
    config = launch._configuration(launch.Machine((9, 0), 132, 232448), launch.Grid(1, 1, 256), 0, 0)
    return any(attribute.value.programmaticStreamSerializationAllowed == 1 for attribute in config.attrs)


def test_launches_are_early_only_where_asked_for_and_in_that_thread():
    assert not starts_early()
    with launch.early_launches():
        assert starts_early()
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(starts_early).result()
    assert not starts_early()
    with pytest.raises(KeyError), launch.early_launches():
        raise KeyError
    assert not starts_early()


@pytest.mark.usefixtures("selects_from_short_ones")
def test_rows_that_share_a_board_wait_for_each_other(emulator, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "machine", emulator.machine)
    monkeypatch.setattr(launch, "launch", lambda *_: seen.append(starts_early()))
    weight, adapter = (torch.empty_strided((192, width), (1, 192)) for width in (600, 90))
    along = torch.zeros(3, 90), adapter, None, torch.zeros(1, dtype=torch.int64)
    with launch.early_launches():
        kernels.top_k_linear(torch.ones(3, 600), 300, None, [weight], [None], *along)
    assert seen == [True, False, False]
    assert not starts_early()


def test_the_engines_graph_is_captured_with_early_launches(monkeypatch):
    """Without a GPU: what a step would be launched like, where the loop would try and capture it."""
    seen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def capture(*_, **__):
        seen.append(starts_early())
        return SimpleNamespace(replay=lambda: None), None

    monkeypatch.setattr(cuda_graph, "capture", capture)
    engine = SimpleNamespace(device=torch.device("cpu"), vocabulary=5)
    cuda_graph.GraphLoop(engine, Sampler())
    graphs = cuda_graph.StepGraphs(engine)
    for rows in (2, 3, 2):
        graphs.step(rows)
    assert seen == [True] * 3
    assert not starts_early()


def test_behind_anothers_kernel_no_launch_is_early(monkeypatch):
    """Of it nobody knows what it writes."""
    monkeypatch.setattr(launch, "_load", lambda *_: SimpleNamespace(shared=0))
    monkeypatch.setattr(launch, "machine", lambda _: launch.Machine((9, 0), 132, 232448))
    monkeypatch.setattr(launch, "_start", lambda config, *_: seen.append(config.numAttrs))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    seen = []
    with launch.early_launches():
        for _ in range(2):
            launch.launch(torch.device("cpu"), "", "", {}, launch.Grid(1, 1, 256), [])
        launch.next_launch_waits()
        for _ in range(2):
            launch.launch(torch.device("cpu"), "", "", {}, launch.Grid(1, 1, 256), [])
    assert seen == [1, 1, 0, 1]
