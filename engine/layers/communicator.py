"""Exchange tensors between the ranks of one model: NCCL between GPUs, gloo between CPU processes.

Every rank calls the same operations in the same order; each is enqueued on the current stream, and can be captured in
a CUDA graph. Small sums between GPUs that can write each other's memory need no library: see `kernels.all_reduce`.
"""

import logging
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.errors import ModelError
from kernels.all_reduce import all_reduce
from kernels.peer_memory import PeerMemory
from kernels.sampling import argmax

logger = logging.getLogger(__name__)

# Ranks -> bytes of the largest sum through peer memory, where each rank sends its addend to every other, in twice the
# bytes.
PEER_SUM_BYTES = {2: 2 << 20, 3: 1 << 20, 4: 512 << 10, 5: 256 << 10, 6: 256 << 10, 7: 256 << 10, 8: 256 << 10}
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # whoever started a rank notices long before that it is gone
POLL_S = 0.001  # seconds between polls


class Communicator:
    """Exchange tensors as rank `rank` of `size`. A single rank needs no `connect`, and has nothing to exchange."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._device = torch.device("cpu")
        self._peer_buffer: torch.Tensor | None = None  # keeps the memory alive whose addresses `_peers` has
        self._peers: PeerMemory | None = None
        self.backend = ""

    def connect(self, store: dist.TCPStore, device: torch.device, use_peer_memory: bool = True) -> None:
        """Connect to the other ranks; this one computes on `device`. Blocks until all are connected."""
        self._device = device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            self.backend,
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        if device.type == "cuda" and use_peer_memory:
            self._open_peer_memory()

    def describe(self) -> str:
        """Return how the ranks exchange tensors."""
        if self._peers is None:
            return self.backend
        return f"{self.backend}; sums up to {self._peers.max_bytes >> 10} KiB through peer memory"

    def close(self) -> None:
        """Disconnect. To be called only while all ranks work: it waits for them."""
        self._peers = self._peer_buffer = None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # ---- within a step ----

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' `x`, the same on each rank. May be `x` itself, overwritten."""
        if self.size == 1:
            return x
        if self._peers is not None and self._peers.can_sum(x):
            return all_reduce(x, self._peers)
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def gather(self, logits: torch.Tensor, width: int) -> torch.Tensor | None:
        """Concatenate the ranks' slices of a vocabulary, [S, at most `width`] each: [S, V] on rank 0, else None.

        Only the last rank may have less than `width`.
        """
        if self.size == 1:
            return logits
        missing = width - logits.shape[1]
        padded = F.pad(logits, (0, missing)) if missing else logits.contiguous()
        slices = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, slices)
        return None if slices is None else torch.cat(slices, dim=1)

    def most_likely(self, logits: torch.Tensor, first_token: int) -> torch.Tensor:
        """Return `argmax` over all ranks' slices of a vocabulary, the same on each rank; [S, slice] -> int32 [S].

        first_token: first id of this rank's slice.
        """
        tokens = argmax(logits)
        if self.size == 1:
            return tokens
        # No token (-1), or one that a rehearsal leaves at random, is clamped to any valid id.
        best = logits.gather(1, tokens.clamp(0, logits.shape[1] - 1).long()[:, None])
        ids = torch.where(tokens < 0, -1, tokens + first_token)[:, None]
        candidates = torch.zeros(self.size, *ids.shape[:1], 2, device=ids.device)
        candidates[self.rank] = torch.cat((best.float(), ids.float()), dim=1)  # ids are below 2^24: exact
        values, ids = self.all_reduce(candidates).unbind(dim=2)  # [R, S]: a sum with zeros gathers
        winner = values.argmax(dim=0, keepdim=True)  # the first of equal ones, as in argmax
        chosen = ids.gather(0, winner)[0]
        return torch.where((ids < 0).any(dim=0), -1, chosen).to(torch.int32)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Copy rank 0's `x` into every rank's, and return it."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    # ---- once, at the start ----

    def minimum(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
        if self.size == 1:
            return value
        least = torch.tensor(value, dtype=torch.int64, device=self._device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def meet(self) -> None:
        """Wait until all ranks have called this method."""
        self.minimum(0)

    def self_test(self, timeout_s: float, num_bytes: int = 1 << 10) -> float:
        """Exchange and check `num_bytes` between each pair of ranks. Returns the slowest exchange's bytes/s.

        Raises `ModelError` with the pair if nothing, or something else, has arrived after `timeout_s`.
        """
        slowest = float("inf")
        for distance in range(1, self.size):
            to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            sent = torch.full((num_bytes,), self.rank, dtype=torch.uint8, device=self._device)
            received = torch.full_like(sent, 255)
            start = time.perf_counter()
            works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)])
            if not self._all_end(works, timeout_s):
                others = f"rank {to}" if to == source else f"ranks {source} and {to}"
                raise ModelError(
                    f"rank {self.rank} ({self._device}) and {others} could not exchange {num_bytes} bytes within "
                    f"{timeout_s:g} s through {self.backend}"
                )
            if not bool((received == source).all()):
                raise ModelError(f"rank {self.rank} ({self._device}) got other bytes from rank {source} than it sent")
            slowest = min(slowest, num_bytes / (time.perf_counter() - start))
        if self._peers is not None:
            self._test_sum(timeout_s)
        return slowest

    def _test_sum(self, timeout_s: float) -> None:
        total = self.all_reduce(torch.full((1024,), float(1 << self.rank), device=self._device))
        ended = torch.cuda.Event()
        ended.record()
        if not _wait(ended.query, timeout_s):
            raise ModelError(
                f"rank {self.rank} ({self._device}) has not got the others' part of a sum through peer memory within "
                f"{timeout_s:g} s; --disable-custom-all-reduce does without"
            )
        if not bool((total == (1 << self.size) - 1).all()):
            raise ModelError(f"rank {self.rank} ({self._device}) got a wrong sum through peer memory")

    def _all_end(self, works: list[dist.Work], timeout_s: float) -> bool:
        if self.backend == "gloo":  # gloo's works make progress only while someone waits
            try:
                return all(work.wait(timedelta(seconds=timeout_s)) for work in works)
            except RuntimeError:
                return False
        return _wait(lambda: all(work.is_completed() for work in works), timeout_s)

    def _open_peer_memory(self) -> None:
        """Send sums through memory that all ranks can write, if there is any; NCCL computes them otherwise."""
        max_bytes = PEER_SUM_BYTES.get(self.size, 0)
        index = self._device.index
        peers = [index - self.rank + rank for rank in range(self.size) if rank != self.rank]
        group = dist.group.WORLD
        assert group is not None
        reason, addresses = "", []
        if not max_bytes:
            reason = f"{self.size} ranks are too many"
        elif not all(torch.cuda.can_device_access_peer(index, peer) for peer in peers):
            reason = "these GPUs cannot reach each other's memory"
        else:
            import torch.distributed._symmetric_memory as symmetric_memory  # imported here: CPU builds need not have it

            num_words = PeerMemory.buffer_words(self.size, max_bytes)
            try:
                self._peer_buffer = symmetric_memory.empty(num_words, dtype=torch.int64, device=self._device).zero_()
                addresses = symmetric_memory.rendezvous(self._peer_buffer, group).buffer_ptrs
            except RuntimeError as error:  # driver or container may not allow it, such as sharing file descriptors
                reason = str(error).partition("\n")[0]
        if not self.minimum(int(not reason)):  # a rank that goes another way than the rest would wait for ever
            self._peer_buffer = None
            logger.warning("sums go through NCCL, not peer memory: %s", reason or "another rank has none")
            return
        epochs = torch.zeros(PeerMemory.num_programs(max_bytes), dtype=torch.int32, device=self._device)
        memory = PeerMemory(self.rank, self.size, max_bytes, torch.tensor(addresses, device=self._device), epochs)
        torch.cuda.synchronize()
        self.meet()  # all buffers are zeros before anyone writes into one
        self._peers = memory


def _wait(is_done: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until `is_done`. Returns False after `timeout_s`."""
    deadline = time.perf_counter() + timeout_s
    while not is_done():
        if time.perf_counter() > deadline:
            return False
        time.sleep(POLL_S)
    return True
