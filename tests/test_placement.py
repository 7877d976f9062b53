"""Ranks run beside their GPUs: by a sysfs of our own, on any machine."""

import logging
from collections.abc import Callable, Set
from pathlib import Path

import pytest
import torch

from engine.ranks import placement
from engine.ranks.placement import Place, find_place, move_threads, parse_numbers, pci_address, stay_near

ALL = frozenset(range(16))
CUDA = torch.device("cuda", 5)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Write the sysfs of two sockets of eight CPUs, with four GPUs each."""
    write(tmp_path, "devices/system/node/online", "0-1\n")
    for node, cpus in ((0, "0-3,8-11\n"), (1, "4-7,12-15\n")):
        write(tmp_path, f"devices/system/node/node{node}/cpulist", cpus)
    for gpu in range(8):
        write(tmp_path, f"bus/pci/devices/0000:{0x1A + 16 * gpu:02x}:00.0/numa_node", f"{gpu // 4}\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_each_of_eight_ranks_is_placed_on_its_gpus_node(host: Path) -> None:
    places = [find_place(f"0000:{0x1A + 16 * gpu:02x}:00.0", ALL, host) for gpu in range(8)]
    first, second = Place(0, frozenset({0, 1, 2, 3, 8, 9, 10, 11})), Place(1, frozenset({4, 5, 6, 7, 12, 13, 14, 15}))
    assert places == [first] * 4 + [second] * 4


def test_cpus_that_are_not_allowed_stay_so(host: Path) -> None:
    assert find_place("0000:1a:00.0", frozenset({2, 3, 4}), host) == Place(0, frozenset({2, 3}))
    assert find_place("0000:1a:00.0", frozenset({4, 5}), host) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("devices/system/node/online", "0\n"),
        ("devices/system/node/online", "what?\n"),
        ("bus/pci/devices/0000:1a:00.0/numa_node", "-1\n"),
        ("bus/pci/devices/0000:1a:00.0/numa_node", "\n"),
        ("devices/system/node/node0/cpulist", "\n"),
    ],
)
def test_nothing_is_moved_where_a_host_has_one_node_or_does_not_say(host: Path, name: str, text: str) -> None:
    assert find_place("0000:1a:00.0", ALL, host) is not None
    write(host, name, text)
    assert find_place("0000:1a:00.0", ALL, host) is None


def test_a_host_without_sysfs_is_left_alone(tmp_path: Path) -> None:
    assert find_place("0000:1a:00.0", ALL, tmp_path) is None


def test_lists_of_numbers_are_read() -> None:
    assert parse_numbers("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_numbers("") == set()


def test_all_threads_are_moved_and_those_that_have_ended_are_no_error(tmp_path: Path) -> None:
    moved: dict[int, Set[int]] = {}

    def move(thread: int, cpus: Set[int]) -> None:
        if thread == 12:
            raise ProcessLookupError
        moved[thread] = cpus

    for thread in (11, 12, 13):
        (tmp_path / str(thread)).mkdir()
    move_threads({4, 5}, tmp_path, move)
    assert moved == {11: {4, 5}, 13: {4, 5}}


class Gpu:
    pci_domain_id, pci_bus_id, pci_device_id = 0, 0x6A, 0


@pytest.fixture
def staying(host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., list[int]]:
    """Return a function that calls `stay_near` for GPU 5, with the CPUs that are allowed, and returns those left."""

    def stay(allowed: Set[int], error: OSError | None = None) -> list[int]:
        found: list[int] = []

        def move(cpus: Set[int]) -> None:
            if error is not None:
                raise error
            found.extend(sorted(cpus))

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(allowed))
        monkeypatch.setattr(placement, "find_place", lambda address, cpus: find_place(address, cpus, host))
        monkeypatch.setattr(placement, "move_threads", move)
        with caplog.at_level(logging.INFO):
            stay_near(CUDA)
        return found

    return stay


def test_a_rank_stays_on_its_node_and_says_so(
    staying: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    assert staying(ALL) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert "on NUMA node 1 with cuda:5: 8 of 16 CPUs" in caplog.text


def test_a_rank_that_is_there_already_is_not_moved(staying: Callable[..., list[int]]) -> None:
    assert staying({4, 5}) == []


def test_a_torch_that_does_not_say_where_gpus_are_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    assert pci_address(CUDA) is None
    stay_near(CUDA)


def test_a_refused_move_is_a_warning(staying: Callable[..., list[int]], caplog: pytest.LogCaptureFixture) -> None:
    assert staying(ALL, OSError(1, "not here")) == []
    assert "threads stay where they are, cuda:5 is on NUMA node 1" in caplog.text
