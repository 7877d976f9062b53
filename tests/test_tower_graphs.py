"""CUDA graphs of towers: what is captured when, and that a graph makes what the tower makes without one."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from engine.vision import graphs
from engine.vision.graphs import TowerGraphs

GRID = frozenset({"grid"})


def arguments_of(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what `see` is called with: a tensor made of the grid, which stays as it is in a graph."""
    return {**inputs, "factors": torch.full((3,), float(inputs["grid"].sum()), device=inputs["pixels"].device)}


def see(arguments: dict[str, Any]) -> torch.Tensor:
    made: torch.Tensor = arguments["pixels"] * arguments["factors"]
    return made


def inputs(value: float, num: int = 2, side: int = 1) -> dict[str, torch.Tensor]:
    return {"pixels": torch.full((num, 3), value), "grid": torch.tensor([[side, 1]])}


class FakeGraph:
    """Stands for a CUDA graph on a CPU: replays the call that was captured, into the same memory."""

    captured: ClassVar[list["FakeGraph"]] = []
    replayed: ClassVar[list["FakeGraph"]] = []
    now: "ClassVar[FakeGraph | None]" = None
    call: Callable[[], object]

    def capture_begin(self, **_: Any) -> None:
        FakeGraph.now = self

    def capture_end(self) -> None:
        FakeGraph.now = None

    def replay(self) -> None:
        FakeGraph.replayed.append(self)
        self.call()


def recorded(arguments: dict[str, Any]) -> torch.Tensor:
    made, graph = see(arguments), FakeGraph.now
    if graph is not None:
        graph.call = lambda: made.copy_(see(arguments))
        FakeGraph.captured.append(graph)
    return made


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> TowerGraphs:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(FakeGraph, "captured", [])
    monkeypatch.setattr(FakeGraph, "replayed", [])
    return TowerGraphs(arguments_of, recorded, GRID)


def test_what_comes_again_has_a_graph_and_each_call_its_own_result(tower: TowerGraphs) -> None:
    made = [tower(inputs(value)) for value in (1.0, 2.0, 3.0, 4.0)]
    assert [one[0, 0].item() for one in made] == [2.0, 4.0, 6.0, 8.0]
    assert (len(FakeGraph.captured), len(FakeGraph.replayed)) == (1, 3)


def test_another_shape_or_grid_is_another_graphs(tower: TowerGraphs) -> None:
    for _ in range(2):
        assert tower(inputs(1.0))[0, 0].item() == 2.0
        assert tower(inputs(1.0, num=5)).shape == (5, 3)
        assert tower(inputs(1.0, side=4))[0, 0].item() == 5.0
    assert len(FakeGraph.captured) == 3


def test_the_graph_used_least_recently_makes_room(tower: TowerGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    for side in (1, 1, 2, 2, 1, 3, 3, 1, 2):
        tower(inputs(1.0, side=side))
    assert len(FakeGraph.captured) == 4, "of 1, 2, 3 in the place of 2, and 2 once more"


def test_a_tower_that_cannot_be_captured_runs_without(
    tower: TowerGraphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: FakeGraph) -> None:
        raise RuntimeError("a synchronizing call")

    monkeypatch.setattr(FakeGraph, "capture_end", refuse)
    assert [tower(inputs(value))[0, 0].item() for value in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    assert [record.message for record in caplog.records] == ["towers run without CUDA graphs: a synchronizing call"]


@pytest.mark.gpu
def test_on_a_gpu_too() -> None:
    tower = TowerGraphs(arguments_of, see, GRID)
    with torch.cuda.stream(torch.cuda.Stream()):
        for value in (1.0, 2.0, 3.0, 4.0):
            given = inputs(value)
            made = tower({"pixels": given["pixels"].cuda(), "grid": given["grid"]})
            assert made.tolist() == [[2 * value] * 3] * 2
