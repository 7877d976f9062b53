"""Test one model on several hosts: two network namespaces, connected by one cable, stand for them."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore, destroy_process_group

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.local import LocalEngine
from engine.ranks.leader import arrive
from engine.ranks.nodes import ADDRESS_KEY, NodeLink, NodeLinks, interface_to, open_store
from server.command_line import parse_args
from server.fleet.torchrun import torchrun_options
from tests.server_processes import (
    SERVER,
    descendants,
    ending,
    is_alive,
    reserved_port,
    start_server,
    wait_until,
    wait_until_ready,
)
from tests.test_parallel import ask

PROMPT = [5, 6, 7, *range(100, 140)]
PORT, STORE_PORT = 30000, 7000  # free in a new namespace


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str

    @property
    def command(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Return the answer of this host's server."""
        curl = ["curl", "-s", f"http://127.0.0.1:{PORT}{path}", "-H", "Content-Type: application/json"]
        done = subprocess.run([*self.command, *curl, "-d", json.dumps(body)], capture_output=True, check=True)
        return json.loads(done.stdout)

    def lose_network(self) -> None:
        subprocess.run(["ip", "-n", self.namespace, "link", "set", "cable", "down"], check=True)


def run_ip(script: str) -> None:
    for line in filter(None, map(str.strip, script.splitlines())):
        done = subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces here: `ip {line}` said {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: there is no `ip` (iproute2)")
    pair = [Host(f"radixloop-{os.getpid()}-{i}", f"10.213.7.{i + 1}") for i in range(2)]
    first, second = (host.namespace for host in pair)
    try:
        run_ip(f"""
            netns add {first}
            netns add {second}
            link add cable netns {first} type veth peer name cable netns {second}
        """)
        for host in pair:
            run_ip(f"""
                -n {host.namespace} address add {host.address}/24 dev cable
                -n {host.namespace} link set cable up
                -n {host.namespace} link set lo up
            """)
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)


async def greedy_answer(model: Path) -> list[int]:
    """Return the answer of one rank, in this process."""
    config = EngineConfig(model_path=str(model), device="cpu", dtype="float32", max_total_tokens=2048)
    async with LocalEngine(config) as engine:
        (delta,) = await ask(engine, PROMPT, max_new_tokens=16)
    return delta.token_ids


@pytest.mark.parametrize("starter", ["flags", "torchrun"])
def test_two_hosts_answer_as_one_does_until_the_network_between_them_fails(
    starter: str, hosts: list[Host], tiny_llama: Path, tmp_path: Path
) -> None:
    first, second = hosts
    logs = [tmp_path / "0", tmp_path / "1"]
    # The limit is for both to start, on busy cores.
    flags = ["--dtype", "float32", "--max-total-tokens", "2048", "--dist-timeout", "20"]
    with ExitStack() as stack:
        nodes = []
        for i, (host, log) in enumerate(zip(hosts, logs, strict=True)):
            if starter == "torchrun":
                rendezvous = ("--master-addr", first.address, "--master-port", str(STORE_PORT), "--node-rank", str(i))
                run = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
                command: Sequence[str] = (*run, *rendezvous, "-m", "server")
                options = flags
            else:
                address = f"{first.address}:{STORE_PORT}"
                own = ["--tp", "2", "--nnodes", "2", "--node-rank", str(i), "--dist-init-addr", address]
                command, options = SERVER, [*flags, *own]
            node = start_server(tiny_llama, log, *options, command=(*host.command, *command), port=PORT)
            nodes.append(stack.enter_context(ending(node)))
        wait_until_ready(nodes[0], logs[0])
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}}
        wanted = asyncio.run(greedy_answer(tiny_llama))
        for _ in range(2):
            answer = first.post("/generate", **body)
            assert answer["output_ids"] == wanted
            updated = first.post("/update_weights_from_disk", model_path=str(tiny_llama))
            assert updated["success"], updated

        family = set().union(*(descendants(process.pid) for process in nodes))  # torchrun itself waits longer
        family |= {process.pid for process in nodes} if starter == "flags" else set()
        second.lose_network()
        assert nodes[0].wait(120) == 1
        assert "error: node 1 is gone" in logs[0].read_text()
        wait_until(lambda: not any(map(is_alive, family)), 120)


@pytest.fixture
def address() -> Iterator[str]:
    """Return where node 0 may listen, and nobody else does."""
    with reserved_port() as port:
        yield f"127.0.0.1:{port}"


@pytest.mark.max_callback_ms(150)  # other processes start on the same few cores
async def test_a_model_spans_two_nodes_until_one_is_lost(address: str, tiny_llama: Path, tmp_path: Path) -> None:
    nodes = ("--tp", "2", "--nnodes", "2", "--dist-init-addr", address)
    config = EngineConfig(model_path=str(tiny_llama), device="cpu", dtype="float32", max_total_tokens=2048)
    engine = LocalEngine(config.replace(tp_size=2, nnodes=2, dist_init_addr=address))
    with ending(start_server(tiny_llama, tmp_path / "log", *nodes, "--node-rank", "1")) as node:
        async with engine:
            (delta,) = await ask(engine, [5, 6, 7])
            assert len(delta.token_ids) == 4
            family = {node.pid, *descendants(node.pid)}
            node.kill()
            assert "node 1 is gone" in await asyncio.wait_for(engine.failed(), 60)
        wait_until(lambda: not any(map(is_alive, family)))
    destroy_process_group()  # a process whose engine has failed ends; this one goes on


# ---- waiting for each other ----


def node_config(address: str, **changes: Any) -> EngineConfig:
    return EngineConfig(**{"nnodes": 3, "tp_size": 3, "dist_init_addr": address, "dist_timeout": 0.6, **changes})


class Clock:
    """Stand for `time` where hosts wait for each other: each look at it is a twentieth of a second later."""

    def __init__(self) -> None:
        self.now, self.runs = 0.0, threading.Event()
        self.runs.set()

    def monotonic(self) -> float:
        self.now += 0.05 if self.runs.is_set() else 0.0
        return self.now

    def sleep(self, _seconds: float) -> None:
        time.sleep(0.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock of all waiting, of which a line is written every tenth of a second."""
    clock = Clock()
    monkeypatch.setattr("engine.ranks.meeting.time", clock)
    monkeypatch.setattr("engine.ranks.meeting.LINE_S", 0.1)
    return clock


def test_node_0_names_who_is_missing_and_the_limit_holds(
    address: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    config = node_config(address)
    store = open_store(config)
    clock.runs.clear()

    def connect() -> None:
        NodeLink(config.replace(node_rank=2), store)
        clock.runs.set()  # the others' time begins when this node is there

    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    with pytest.raises(ModelError, match=r"waited 1 s for node 1 of 3 \(--nnodes\)"):
        NodeLinks(config, store)
    assert "waiting for node 1 of 3" in caplog.text
    connecting.join()


def test_two_nodes_of_one_number_are_told(address: str) -> None:
    config = node_config(address, dist_timeout=120.0)
    store = open_store(config)
    for _ in range(2):
        threading.Thread(target=lambda: NodeLink(config.replace(node_rank=2), store), daemon=True).start()
    with pytest.raises(ModelError, match="it is node 2"):
        NodeLinks(config, store)


def test_who_connects_to_node_0_by_mistake_is_no_node(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ranks.nodes.PROBE_S", 0.1)
    config = node_config(address, nnodes=2, tp_size=2, dist_timeout=120.0)
    store = open_store(config)

    def connect() -> None:
        while not store.check([ADDRESS_KEY]):
            time.sleep(0.01)
        host, _, port = store.get(ADDRESS_KEY).decode().rpartition(":")
        for said in (b"", b"GET", None):  # None: nothing, and stays
            stranger = socket.create_connection((host, int(port)))
            strangers.append(stranger)
            if said is not None:
                stranger.sendall(said)
                stranger.close()
        assert stranger.recv(1) == b"", "who says nothing is left"
        monkeypatch.setattr("engine.ranks.nodes.PROBE_S", 60.0)  # the node may take longer
        links.append(NodeLink(config.replace(node_rank=1), store))

    strangers, links = list[socket.socket](), list[NodeLink]()
    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    NodeLinks(config, store)
    connecting.join(60)
    assert json.loads(links[0].receive())["nnodes"] == 2
    strangers[-1].close()


@pytest.mark.parametrize("node_rank", [0, 1])
@pytest.mark.parametrize("kind", ["unknown", "silent"])
def test_the_limit_holds_for_a_name_that_does_not_resolve(
    kind: str, node_rank: int, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_given_up = threading.Event()

    def look_up(*args: Any, **more: Any) -> Any:
        if kind == "silent":
            has_given_up.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ModelError, match=r"waited .* for 'node0.example' to be found by its name.*--dist-timeout"):
        open_store(node_config("node0.example:7000", node_rank=node_rank))
    has_given_up.set()
    assert "waiting for 'node0.example' to be found by its name" in caplog.text


def test_a_node_without_node_0_says_so_and_the_limit_holds(
    address: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelError, match=rf"waited 1 s for node 0 at {address}: Connection refused"):
        open_store(node_config(address, node_rank=1))
    assert "waiting for node 0 at 127.0.0.1" in caplog.text


def test_rank_0_names_the_ranks_that_still_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.ranks.meeting.LINE_S", 0.1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arrive(store, 2, 4)

    def come_late() -> None:
        wait_until(lambda: "waiting for ranks 1 and 3 of 4 to load" in caplog.text)
        arrive(store, 1, 4)
        arrive(store, 3, 4)

    coming = threading.Thread(target=come_late)
    coming.start()
    arrive(store, 0, 4)
    coming.join()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_limit_that_is_none_is_refused(limit: float, tiny_llama: Path) -> None:
    config = EngineConfig(model_path=str(tiny_llama), device="cpu", dist_timeout=limit)
    with pytest.raises(ModelError, match="--dist-timeout must be a number of seconds above 0"):
        await LocalEngine(config).start()


def test_the_loopback_leads_to_this_host() -> None:
    assert interface_to("127.0.0.1", 1) == "lo"


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29500",
}


def test_torchrun_tells_a_process_its_place() -> None:
    config = parse_args(["--tp", "8", "--base-gpu-id", "2"], TORCHRUN)
    assert (config.nnodes, config.node_rank, config.dist_init_addr, config.join_dist_store) == (
        4, 3, "host0:29500", True,
    )  # fmt: skip
    assert (config.tp_size, config.base_gpu_id) == (8, 4), "each process has two GPUs, this one its host's second pair"
    assert parse_args([], TORCHRUN).tp_size == 4, "a rank each"
    assert torchrun_options({"RANK": "1", "WORLD_SIZE": "2"}, {}) == {}, "another starter's"


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--node-rank", "1"], {}, "--node-rank is 1, but torchrun says 3"),
        (["--nnodes", "2"], {}, "--nnodes is 2, but torchrun says 4"),
        (["--dist-init-addr", "here:1"], {}, "--dist-init-addr is here:1, but torchrun says host0:29500"),
        ([], {"TORCHELASTIC_RESTART_COUNT": "1"}, "--max-restarts 0"),
    ],
)
def test_what_contradicts_torchrun_is_told(
    argv: list[str], environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv, {**TORCHRUN, **environ})
    assert message in capsys.readouterr().err
