"""Compile our kernels for GPUs that are not here, and print what does not fit them.

    python -m tests.cards [75 80 86 89 90 100 120] [--only TEXT] [--quick] [--no-assembly] [--threads 2]

Each architecture's kernels are those that an engine on such a GPU would launch, in the sizes that it would choose by
that GPU's limits. A kernel is printed that does not compile, that takes more shared memory than a block may have even
after `kernels.launch` has taken stages from it, that got fewer stages, or whose threads keep much in memory for want of
registers. Triton's kernels come first, then those in CUDA C++ where there is an nvcc. Takes some minutes an
architecture; what Triton compiles is kept in its cache.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

from kernels import card
from kernels.card import Card

CARDS = {
    75: Card("T4", (7, 5), 40, 64 << 10),
    80: Card("A100", (8, 0), 108, 163 << 10),
    86: Card("A10", (8, 6), 72, 99 << 10),
    89: Card("L4", (8, 9), 58, 99 << 10),
    90: Card("H200", (9, 0), 132, 227 << 10),
    100: Card("B200", (10, 0), 148, 227 << 10),
    120: Card("RTX 5090", (12, 0), 170, 99 << 10),
}
SPILLED_BYTES = 256  # of a thread's, that are worth a line


@dataclass
class Wanted:
    """A kernel as it was asked for."""

    case: str
    function: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def kinds(self) -> tuple[Any, ...]:
        """Return what a kernel of other sizes has in common with this one."""
        types = tuple(getattr(arg, "dtype", arg is None) for arg in self.args)
        return self.function.__name__, types, tuple(x for x in self.keywords.values() if isinstance(x, str | bool))

    @property
    def title(self) -> str:
        sizes = {name: value for name, value in self.keywords.items() if "BLOCK" in name or name.startswith("num_")}
        return f"{self.function.__name__} ({self.case}) {sizes}"


def wanted_on(chosen: Card) -> list[Wanted]:
    """Return the kernels that an engine on `chosen` would launch, each once."""
    from kernels import launch
    from tests.card_launches import launches

    found: dict[Any, Wanted] = {}
    case = ""

    def record(kernel: launch.Kernel, _: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        key = (kernel, tuple(keywords.items()), tuple(map(launch._kind, args)))
        found.setdefault(key, Wanted(case, kernel.function, args, keywords))

    with mock.patch.object(launch.Kernel, "launch", record):
        for case, run in launches(chosen):  # noqa: B007 - `record` reads it
            run()
    return list(found.values())


@dataclass
class Compiled:
    """What became of a kernel."""

    title: str
    error: str = ""
    shared_bytes: int = 0
    stages_lost: int = 0
    registers: int = 0
    spilled_bytes: int = 0


def compile_for(chosen: Card, wanted: Wanted) -> Compiled:
    """Compile a kernel as `kernels.launch` does: with fewer stages if it has no room."""
    keywords, lost = wanted.keywords, 0
    while True:
        try:
            kernel = wanted.function.run(*wanted.args, grid=(1,), warmup=True, **keywords)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the finding
            return Compiled(wanted.title, error=f"{type(error).__name__}: {error}")
        num_stages = keywords.get("num_stages", 1)
        if kernel.metadata.shared <= chosen.shared_bytes or num_stages <= 1:
            break
        keywords, lost = keywords | {"num_stages": num_stages - 1}, lost + 1
    result = Compiled(wanted.title, shared_bytes=kernel.metadata.shared, stages_lost=lost)
    if kernel.asm["cubin"]:
        result.registers, result.spilled_bytes = usage_of(kernel.asm["cubin"])
    return result


def usage_of(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of its own that it keeps in memory."""
    from triton import knobs

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        answer = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(word.split(":") for word in answer.split() if word.count(":") == 1 and not word.endswith(":"))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields.get("LOCAL", 0))


def compile_cuda(title: str, source: str, architecture: str, shared_bytes: int) -> Compiled:
    """Compile a kernel in CUDA C++, as NVRTC would."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cu"
        file.write_text(source)
        command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", f"{folder}/cubin"]
        answer = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
    if answer.returncode:
        return Compiled(title, error=answer.stderr)
    used = [re.search(rf"(\d+) {word}", answer.stderr) for word in ("bytes stack frame", "bytes spill stores")]
    spilled = max(int(match[1]) for match in used if match)
    registers = re.search(r"Used (\d+) registers", answer.stderr)
    assert registers, answer.stderr
    return Compiled(title, shared_bytes=shared_bytes, registers=int(registers[1]), spilled_bytes=spilled)


def report(chosen: Card, result: Compiled) -> bool:
    """Print what is wrong with a kernel, if anything; return whether it can run."""
    words = []
    if result.error:
        words.append(result.error)
    has_room = result.shared_bytes <= chosen.shared_bytes
    if not has_room:
        words.append(f"{result.shared_bytes >> 10} KiB of shared memory of {chosen.shared_bytes >> 10}")
    if result.stages_lost:
        words.append(f"{result.stages_lost} stages fewer")
    if result.spilled_bytes > SPILLED_BYTES:
        words.append(f"{result.registers} registers, {result.spilled_bytes} bytes in memory")
    if words:
        print(f"  {result.title}: {'; '.join(words)}", flush=True)
    return has_room and not result.error


def check(args: argparse.Namespace) -> int:
    """Compile all for one architecture. In a process of its own: modules read the card when they are imported."""
    (number,) = args.architectures
    chosen = CARDS[number]
    setattr(card, "card_of", lambda _device: chosen)  # noqa: B010 - to mypy a function is no variable
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    from tests.card_launches import cuda_sources

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", number, 32),
    )
    triton.runtime.driver.set_active(driver)
    if args.no_assembly:
        triton.knobs.cache.dir += "-not-assembled"
        CUDABackend.make_cubin = lambda *_: b""
    start = time.perf_counter()
    wanted = [one for one in wanted_on(chosen) if args.only in one.title]
    if args.quick:
        wanted = list({one.kinds: one for one in wanted}.values())
    print(f"{chosen.architecture}: {len(wanted)} kernels", flush=True)
    with ThreadPoolExecutor(args.threads) as threads:
        can_run = [report(chosen, result) for result in threads.map(lambda one: compile_for(chosen, one), wanted)]
        if shutil.which("nvcc"):
            sources = [one for one in cuda_sources(chosen) if args.only in one[0]]
            can_run += [report(chosen, result) for result in threads.map(lambda one: compile_cuda(*one), sources)]
        else:
            print("  no nvcc: kernels in CUDA C++ are left out")
    print(f"{can_run.count(False)} of {len(can_run)} cannot run; {time.perf_counter() - start:.0f} s", flush=True)
    return can_run.count(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("architectures", nargs="*", type=int, choices=CARDS, default=list(CARDS))
    parser.add_argument("--only", default="", help="kernels in whose lines this stands")
    parser.add_argument("--quick", action="store_true", help="one size of each kernel")
    parser.add_argument("--no-assembly", action="store_true", help="twice as fast, and registers stay unknown")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if len(args.architectures) == 1:
        return int(check(args) > 0)
    options = [word for word in sys.argv[1:] if not (word.isdigit() and int(word) in CARDS)]
    command = [sys.executable, "-m", f"tests.{Path(__file__).stem}", *options]
    return max(subprocess.run([*command, str(number)], check=False).returncode for number in args.architectures)


if __name__ == "__main__":
    sys.exit(main())
