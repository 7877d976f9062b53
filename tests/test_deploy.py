"""What `.deploy` ships says nothing that the server does not know: flags, routes, metrics, install lines, files."""

import configparser
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.command_line import parse_args
from server.config import ServerConfig
from server.dispatch import dispatch
from tests.fake_engine import FakeEngine, serving

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / ".deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
README = (ROOT / "README.md").read_text()
KUBERNETES = ("k8s.yaml", "lws.yaml")


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def containers(name: str) -> Iterator[tuple[Any, Any]]:
    """Yield (container, its pod) of each template in a Kubernetes file."""

    def pods(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            if "containers" in node:
                yield node
            for value in node.values():
                yield from pods(value)
        elif isinstance(node, list):
            for value in node:
                yield from pods(value)

    for pod in pods(documents(name)):
        yield from ((container, pod) for container in pod["containers"])


def commands() -> dict[str, list[str]]:
    """Return each command line of `.deploy`, with its variables filled in."""
    found = {}
    for name in KUBERNETES:
        for i, (container, _) in enumerate(containers(name)):
            found[f"{name} {i}"] = container["args"]
    for name, service in documents("compose.yaml")[0]["services"].items():
        found[f"compose.yaml {name}"] = service["command"]
    found["Dockerfile"] = json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[-1])
    found["radixloop.service"] = shlex.split(unit()["Service"]["ExecStart"])[1:]
    values = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "1", "$(LWS_LEADER_ADDRESS)": "host"}
    for words in found.values():
        words[:] = [re.sub(r"\$\{MODEL:-(\w+)\}", r"\1", word) for word in words]
        for variable, value in values.items():
            words[:] = [word.replace(variable, value) for word in words]
    return found


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign] # case counts
    parser.read(DEPLOY / "radixloop.service")
    return parser


def config_of(words: list[str]) -> ServerConfig:
    if "--config" in words:  # a file of the host's
        at = words.index("--config")
        words = words[:at] + words[at + 2 :]
    left = dispatch(words)
    assert not isinstance(left, int)
    return parse_args(left)


@pytest.mark.parametrize("name", commands())
def test_every_command_is_one_that_the_server_takes(name: str) -> None:
    config = config_of(commands()[name])
    if name != "radixloop.service":
        assert config.host == "0.0.0.0"  # a container's own loopback reaches nobody


def test_the_hosts_of_a_group_run_the_same_model_and_find_each_other() -> None:
    leader, worker = (config_of(words) for name, words in commands().items() if name.startswith("lws"))
    assert leader == worker
    group = documents("lws.yaml")[0]["spec"]["leaderWorkerTemplate"]
    gpus = group["leaderTemplate"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert (leader.nnodes, leader.tp_size, leader.dist_init_addr) == (group["size"], gpus * group["size"], "host:5000")


async def test_every_probe_asks_for_a_route_and_none_needs_a_key() -> None:
    paths = {
        probe["httpGet"]["path"]
        for name in KUBERNETES
        for container, _ in containers(name)
        for kind, probe in container.items()
        if kind.endswith("Probe")
    }
    checks = [
        *re.findall(r"http://127\.0\.0\.1:\d+(/\w+)", DOCKERFILE),
        *re.findall(r"http://127\.0\.0\.1:\d+(/\w+)", (DEPLOY / "compose.yaml").read_text()),
    ]
    assert paths and len(checks) == 2
    async with serving(FakeEngine(), api_key="secret") as client:
        for path in paths | set(checks):
            assert (await client.get(path)).status == 200


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_server_has_time_to_start_and_to_drain(name: str) -> None:
    for container, pod in containers(name):
        if not container.get("ports"):
            continue  # a worker, which the leader ends
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        drain = config_of([word.replace("$(LWS_WORKER_INDEX)", "0") for word in container["args"] if "LWS" not in word])
        assert pod["terminationGracePeriodSeconds"] > drain.drain_timeout + int(hook[-1])
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["http"] == drain.port


def test_compose_and_systemd_wait_for_the_drain_as_well() -> None:
    (compose,) = documents("compose.yaml")
    for name, service in compose["services"].items():
        drain = config_of(commands()[f"compose.yaml {name}"]).drain_timeout
        assert int(service["stop_grace_period"].removesuffix("s")) > drain
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert float(unit()["Service"]["TimeoutStopSec"]) > config_of(commands()["radixloop.service"]).drain_timeout


def test_ranks_have_shared_memory() -> None:
    for name in KUBERNETES:
        for container, pod in containers(name):
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "shm_size" in documents("compose.yaml")[0]["services"]["cuda"]


def test_keys_are_a_secrets_and_named_as_the_server_reads_them() -> None:
    (secret,) = (one for one in documents("k8s.yaml") if one["kind"] == "Secret")
    assert parse_args([], secret["stringData"]).api_key == secret["stringData"]["RADIXLOOP_API_KEY"]
    for name in KUBERNETES:
        for container, _ in containers(name):
            assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
            assert not any("key" in word for word in container["args"])
    environment = documents("compose.yaml")[0]["services"]["cpu"]["environment"]
    assert parse_args([], dict.fromkeys(environment, "k")).api_key == "k"
    assert parse_args([], dict.fromkeys(environment, "")).api_key is None


def test_the_image_installs_what_the_readme_installs() -> None:
    (readme,) = re.findall(r"pip install (torch==\S+) && \.venv/bin/pip install ('\.\[demo\]')", README)[:1]
    installed = re.findall(r"/opt/radixloop/bin/pip install (\S+)", DOCKERFILE)
    assert installed == [readme[0], '".[$EXTRAS]"']
    extras = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert [f"'.[{extra}]'" for extra in extras] == [readme[1]]
    steps = re.findall(r"pip install (\S+)$", (DEPLOY / "radixloop.service").read_text(), re.MULTILINE)
    assert steps == [readme[0], readme[1]]


def test_the_image_is_made_of_what_the_wheel_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {name.rstrip("*") for name in found if name.endswith("*")}
    copied = [word for line in re.findall(r"^COPY (?!--)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    assert needed | packages <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == set(copied)


def test_the_image_runs_as_nobodys_root_and_keeps_its_caches() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!root|0)\w+$", last, re.MULTILINE)
    assert last.index("USER") < last.index("ENTRYPOINT")
    (volume,) = re.findall(r"^VOLUME (\S+)$", last, re.MULTILINE)
    mounts = [f"{volume}" in str(one) for name in (*KUBERNETES, "compose.yaml") for one in documents(name)]
    assert sum(mounts) == 3
    for argument in re.findall(r"\$\{?(DEVICE|EXTRAS|PYTHON)\b", DOCKERFILE):
        assert f"ARG {argument}=" in DOCKERFILE


async def test_every_metric_of_the_dashboard_is_one_of_the_servers() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    variables = [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    named = {name for query in (*queries, *variables) for name in re.findall(r"\b(?:sglang|radixloop):\w+", query)}
    assert len(queries) > 20 and len(named) > 20
    async with serving(FakeEngine(), enable_metrics=True) as client:
        await client.post("/generate", json={"text": "a"})
        shown = await (await client.get("/metrics")).text()
    assert named <= set(re.findall(r"^([\w:]+)", shown, re.MULTILINE))
    labels = set(re.findall(r"sum by \((\w+)\)|max by \((\w+)\)", " ".join(queries)))
    assert {label for pair in labels for label in pair if label} <= {"le", "quantile", "instance"}


async def test_gateways_find_the_metrics_they_choose_by() -> None:
    async with serving(FakeEngine(), enable_metrics=True, page_size=4) as client:
        shown = await (await client.get("/metrics")).text()
    values = dict(re.findall(r"^(vllm:\w+)\{.*\} (\S+)$", shown, re.MULTILINE))
    assert values["vllm:num_requests_waiting"] == "2.0" and values["vllm:num_requests_running"] == "1.0"
    assert values["vllm:kv_cache_usage_perc"] == "0.25"
    assert 'vllm:cache_config_info{block_size="4",num_gpu_blocks="250"} 1.0' in shown
