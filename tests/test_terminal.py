"""Test programs for the terminal, beside the server: commands by their first word, and a look at the machine."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.step.host_memory import available_host_memory
from server.command_line import parse_args
from server.commands import COMMANDS
from server.config import REASONING_PARSERS, TOOL_CALL_PARSERS
from server.dispatch import dispatch
from server.parser_names import REASONING_NAMES, TOOL_NAMES
from server.parsers.reasoning import REASONING_FORMATS
from server.parsers.tool_calls import TOOL_FORMATS
from server.terminal import doctor

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "aiohttp", "numpy", "transformers", "llguidance", "rich"}


# ---- the first word ----


def test_a_model_may_be_named_without_a_flag_behind_serve() -> None:
    words = dispatch(["serve", "Qwen/Qwen3-0.6B", "--port", "1234"])
    assert not isinstance(words, int)
    config = parse_args(words)
    assert (config.model_path, config.port) == ("Qwen/Qwen3-0.6B", 1234)
    assert dispatch(["serve", "--port", "1"]) == dispatch(["--port", "1"]) == ["--port", "1"]
    assert dispatch([]) == dispatch(["serve"]) == []


@pytest.mark.parametrize(("word", "hint"), [("chatt", "did you mean chat?"), ("Qwen/x", "radixloop serve Qwen/x")])
def test_a_word_that_is_no_command_is_an_error(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch([word]) == 2
    assert hint in capsys.readouterr().err


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and meaning in text for name, meaning in COMMANDS.items())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["serve", "-h"], ["chat", "--help"], ["doctor", "-h"]])
@pytest.mark.parametrize("module", ["-m server", "console"])
def test_help_and_version_load_nothing_heavy(words: list[str], module: str) -> None:
    start = "runpy.run_module('server', run_name='__main__', alter_sys=True)" if module == "-m server" else "main()"
    code = (
        "import runpy, sys\nfrom server.console import main\n"
        f"sys.argv[1:] = {words!r}\n"
        f"try:\n    sys.exit({start})\n"
        f"except SystemExit as end:\n    sys.exit(str(sorted({HEAVY!r} & sys.modules.keys()) or '') or end.code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "radixloop" in ended.stdout


def test_the_names_of_parsers_in_the_help_are_the_parsers() -> None:
    assert tuple(REASONING_FORMATS) == REASONING_NAMES
    assert tuple(TOOL_FORMATS) == TOOL_NAMES
    assert set(REASONING_PARSERS) > set(REASONING_NAMES) and set(TOOL_CALL_PARSERS) > set(TOOL_NAMES)


# ---- the doctor ----


def test_a_machine_that_can_serve_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--port", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {doctor.OK, doctor.NOTE}
    subjects = {line[6:19].strip() for line in lines[:-1]}
    assert {"Python", "packages", "memory", "CPU", "port", "torch"} <= subjects
    assert lines[-1] == "This machine can serve models."


@pytest.mark.parametrize("absent", doctor.NEEDED)
def test_a_package_that_every_server_needs_is_a_failure(absent: str) -> None:
    finding = next(iter(doctor.find_packages(lambda name: name != absent)))
    assert finding.verdict == doctor.FAIL and absent in finding.fact


@pytest.mark.parametrize("absent", doctor.EXTRAS)
def test_a_package_that_some_models_need_is_a_note(absent: str) -> None:
    first, second = doctor.find_packages(lambda name: name != absent)
    assert (first.verdict, second.verdict, second.subject) == (doctor.OK, doctor.NOTE, absent)


def test_little_memory_is_a_failure_that_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "available_host_memory", lambda: 1 << 28)
    monkeypatch.setattr(doctor, "find_devices", list)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "FAIL  memory        0.2 GiB available" in out and "cannot serve" in out


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8 << 30),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 3"}, 8 << 30),
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 400\ninactive_file 250"}, 550),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": "anon 400"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "700",
                "memory/memory.stat": "total_inactive_file 100",
            },
            400,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "700",
                "memory/memory.stat": "",
            },
            8 << 30,
        ),
    ],
)
def test_memory_is_what_the_machine_and_the_container_have_left(
    files: dict[str, str], available: int, tmp_path: Path
) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_host_memory(tmp_path) == available


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (finding,) = doctor.find_port("127.0.0.1", port)
    assert finding.verdict == doctor.NOTE and f"127.0.0.1:{port}" in finding.fact


def test_a_folder_without_room_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "made"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 62)
    models, kernels = doctor.find_folders()
    assert (models.verdict, kernels.verdict) == (doctor.NOTE, doctor.OK)
    assert str(tmp_path / "not" / "made") in models.fact


def test_a_gpu_and_its_kernels_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: card)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda number: ((139, 20)[number] << 30, 140 << 30))
    monkeypatch.setattr("kernels.nvrtc.has_nvrtc", lambda: True)
    monkeypatch.setattr("kernels.flashinfer_attention.is_available", lambda: (False, "it finds no nvcc"))
    lines = [finding.line() for finding in doctor.find_devices()]
    assert "ok    GPU 0         NVIDIA H200, sm_90, 139.0 of 140.0 GiB free" in lines
    assert "note  GPU 1         NVIDIA H200, sm_90, 20.0 of 140.0 GiB free" in lines
    assert lines[-1] == "note  FlashInfer    it finds no nvcc"


# ---- completions ----


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "--model-path", "--temperature", "cache_aware"))


def test_a_reader_that_has_read_enough_ends_a_command_without_a_word() -> None:
    script = "from server.dispatch import dispatch; raise SystemExit(dispatch(['completion', 'zsh']))"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 0


def test_completions_without_their_library_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert dispatch(["completion", "bash"]) == 1
    assert "pip install 'radixloop[completion]'" in capsys.readouterr().err
