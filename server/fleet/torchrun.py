"""Options that `torchrun -m server` stands for.

Each process that torchrun starts is a node of its own, with its share of the ranks, and meets the others at the
store that torchrun itself runs. One process a host is best: ranks of one process get their steps through shared memory.
"""

from collections.abc import Mapping
from typing import Any

RUN_ID = "TORCHELASTIC_RUN_ID"  # there if and only if torchrun has started this process


def torchrun_options(environ: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by name for a process with this environment; none if torchrun has not started it.

    given: what the command line says. `ValueError` if that contradicts torchrun.
    """
    if RUN_ID not in environ:
        return {}
    if environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        raise ValueError("a server cannot be restarted inside a run of torchrun: leave --max-restarts 0")
    num_processes = int(environ["WORLD_SIZE"])
    options: dict[str, Any] = {"nnodes": num_processes, "node_rank": int(environ["RANK"])}
    if num_processes > 1:
        options["dist_init_addr"] = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    for name, value in options.items():
        if given.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {given[name]}, but torchrun says {value}: leave the flag out")
    tp_size = given.get("tp_size", num_processes)
    first_gpu = given.get("base_gpu_id", 0) + int(environ["LOCAL_RANK"]) * (tp_size // num_processes)
    is_store_there = environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    return {**options, "tp_size": tp_size, "base_gpu_id": first_gpu, "join_dist_store": is_store_there}
