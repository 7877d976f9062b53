"""Processes that compile Triton's kernels: what they compile is found, and without them all goes on."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.step import first_start
from kernels import compilers, launch, nvrtc
from kernels.compilers import Compilers, CompilingThreads
from kernels.folders import is_first_start
from tests.server_processes import is_alive, wait_until

COMPILE_AND_FIND = """
import os, torch, triton
from triton.backends.compiler import GPUTarget
from kernels.compilers import Compilers, job_of
from kernels.triton_bookkeeping import _end_step_kernel

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
jobs, hits = [], []

def note(*, fn, compile, **_):
    jobs.append(job_of(fn, compile["specialization_data"]))
    return True  # nothing is compiled here

def ask():
    tensor = torch.zeros(4, dtype=torch.int32)
    names = _end_step_kernel.function.arg_names
    kinds = dict.fromkeys(names, 1) | {name: tensor for name in ("tokens", "rows", "last_tokens")}
    kinds |= {"counts": None, "BLOCK": 16, "num_warps": 1}
    _end_step_kernel.function.run(grid=(1,), warmup=True, **kinds)

triton.knobs.runtime.jit_cache_hook = note
ask()
triton.knobs.runtime.jit_cache_hook = None
processes = Compilers(1)
processes.compile(jobs[0])
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
ask()
assert hits == [True], hits
print(processes._process.pid, flush=True)
os._exit(0)  # as a signal ends a server that is being started
"""


def test_what_a_process_compiles_is_found_by_who_wants_it_whose_end_is_its_own(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE_AND_FIND]
    pid = subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.PIPE).stdout.decode()
    wait_until(lambda: not is_alive(int(pid)))


def test_processes_that_do_not_start_leave_all_work_to_who_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    processes = Compilers(2)
    for _ in range(3):
        processes.compile(b"[]\n")
    processes.close()


def test_no_room_for_a_process_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with caplog.at_level("INFO"):
        compilers.start_compilers(2)
    assert compilers._compilers is None
    assert "in this process alone: [Errno 2]" in caplog.text


STAND_IN = """#!{python}
import os, socket, sys
connections = [socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[4:]]
for number, connection in enumerate(connections):
    if os.fork() == 0:
        for other in connections:
            if other is not connection:
                other.close()
        connection.sendall(b"r")
        for job in connection.makefile():
            with open(job.strip(), "x") as file:
                file.write(str(os.getpid()))
            if number == 0:
                os._exit(1)
            connection.sendall(b"r")
        os._exit(0)
for connection in connections:
    connection.close()
while True:
    os.wait()
"""


def test_a_process_that_dies_leaves_its_work_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    processes = Compilers(2)
    files = [tmp_path / f"job {i}" for i in range(6)]
    for file in files:
        processes.compile(f"{file}\n".encode())
    pids = [int(file.read_text()) for file in files]
    processes.close()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_thread_asks_a_process_first_and_then_finds_or_compiles_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "job_of", lambda kernel, wanted: f"{kernel.name} {wanted}".encode())
    events: list[Any] = []
    info = SimpleNamespace(module="kernels.some", name="_kernel")
    with ThreadPoolExecutor(1) as threads:
        executor = CompilingThreads(threads)

        def want(name: str) -> None:
            executor._note(fn=info, compile={"specialization_data": name})
            executor.submit(lambda: events.append(("here", name))).result(60)

        want("a")
        monkeypatch.setattr(compilers, "_compilers", SimpleNamespace(compile=events.append))
        want("b")
        executor.submit(lambda: events.append(("here", "unknown"))).result(60)
        threads.submit(executor._note, fn=info, compile={"specialization_data": "another thread's"}).result(60)
        executor.submit(lambda: events.append(("here", "unknown"))).result(60)
    job = b"_kernel b"
    assert events == [("here", "a"), job, ("here", "b"), ("here", "unknown"), ("here", "unknown")]


@pytest.mark.parametrize(
    ("folders", "is_first"),
    [
        ([], True),
        (["ours/radixloop"], True),
        (["ours/radixloop", "triton"], True),
        (["triton/another engine's"], True),
        (["ours/radixloop", "triton/kernel"], False),
    ],
)
def test_a_first_start_is_one_where_nothing_was_compiled_by_us_or_triton(
    folders: list[str], is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert is_first_start() == is_first


@pytest.mark.parametrize(
    ("num_cores", "num_ranks", "gigabytes", "num"),
    [(1, 1, 64, 1), (2, 1, 64, 2), (16, 1, 64, 16), (16, 1, 3, 3), (64, 1, 64, 16), (64, 8, 64, 8), (64, 8, 16, 2)],
)
def test_as_many_processes_compile_as_cores_and_memory_have_room_for(
    num_cores: int, num_ranks: int, gigabytes: int, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    monkeypatch.setattr(first_start, "available_host_memory", lambda: gigabytes << 30)
    assert first_start.num_processes(num_ranks) == num


def test_one_process_alone_is_not_started() -> None:
    compilers.start_compilers(1)
    assert compilers._compilers is None


@pytest.mark.parametrize(
    ("has_gpu", "is_first", "options", "num_ranks"),
    [
        (True, True, {}, 1),
        (True, True, {"device": "cuda:1", "tp_size": 4}, 4),
        (True, False, {}, None),
        (True, True, {"device": "cpu"}, None),
        (True, True, {"dp_size": 2}, None),  # each replica is a process of its own
        (False, True, {}, None),
    ],
)
def test_a_server_starts_processes_before_all_else_where_it_will_have_a_gpu(
    has_gpu: bool,
    is_first: bool,
    options: dict[str, Any],
    num_ranks: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    monkeypatch.setattr(first_start, "DRIVER", tmp_path if has_gpu else tmp_path / "none")
    monkeypatch.setattr(first_start, "is_first_start", lambda: is_first)
    monkeypatch.setattr(first_start, "num_processes", lambda num_ranks: num_ranks)
    monkeypatch.setattr(first_start, "start_compilers", started.append)
    first_start.start_compilers_at_first_start(EngineConfig(model_path="demo", **options))
    assert started == ([] if num_ranks is None else [num_ranks])


def test_what_the_server_starts_them_with_imports_no_torch() -> None:
    code = "import sys, engine.step.first_start; assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_is_compiled_ahead_is_compiled_once_before_the_rehearsal_ends() -> None:
    pytest.importorskip("triton")
    begun, compiled = threading.Event(), []

    def compile(name: str) -> None:
        begun.wait(60)
        compiled.append(name)

    with launch.compiling_ahead():
        launch.compile_ahead(compile, "a")
        launch.compile_ahead(compile, "b")
        launch.compile_ahead(compile, "a")
        begun.set()
    assert sorted(compiled) == ["a", "b"]
    with pytest.raises(ZeroDivisionError), launch.compiling_ahead():
        launch.compile_ahead(divmod, 1, 0)


def test_sources_in_cuda_are_compiled_at_once_and_in_a_rehearsal_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    begun, compiled = threading.Event(), []

    def compile(name: str, source: str, architecture: str) -> bytes:
        begun.wait(60)
        compiled.append((name, source, architecture))
        return b""

    monkeypatch.setattr(nvrtc, "compile_source", compile)
    with launch.compiling_ahead():
        nvrtc.compile_sources("one", ["a", "b"], "sm_90")
        assert not compiled
        begun.set()
    assert sorted(compiled) == [("one", "a", "sm_90"), ("one", "b", "sm_90")]
    nvrtc.compile_sources("one", [], "sm_90")
    nvrtc.compile_sources("one", ["c"], "sm_90")
    assert compiled[2:] == [("one", "c", "sm_90")]
