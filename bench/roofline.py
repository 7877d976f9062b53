"""How fast this GPU can be: the roofline (Williams et al. 2009) that the other benches hold their kernels against.

Both lines are measured, since no chip keeps to its data sheet: memory by a copy, arithmetic by a large product.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.timing import elapsed_us, graph_us

COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192
ROTATION_BYTES = 200 << 20  # of weights between two uses of the same ones: the L2 cache holds 50 MB


class Roofline(NamedTuple):
    """The rates of this GPU, as measured."""

    bytes_per_s: float
    """Bytes of device memory, read or written. What stays in the L2 cache may be faster."""
    flops_per_s: float
    """Operations of bfloat16 products, summed in float32."""

    def share(self, us: float, num_bytes: float, num_flops: float = 0.0) -> float:
        """Return the least time for moving the bytes and making the products, as a share of `us`."""
        return 1e6 * max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s) / us

    def __str__(self) -> str:
        return f"roofline: {self.bytes_per_s / 1e12:.2f} TB/s, {self.flops_per_s / 1e12:.0f} TFLOP/s, as measured here"


@functools.cache
def measure_roofline() -> Roofline:
    """Measure both rates of the current GPU, at the first call."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = graph_us([lambda: target.copy_(source)] * 4)
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device="cuda").bfloat16()
    product_us = graph_us([lambda: a @ b] * 2, num_replays=5)
    return Roofline(2e6 * COPY_BYTES / copy_us, 2e6 * PRODUCT_SIZE**3 / product_us)


def stream_us(launch: Callable[[], object], num_launches: int = 5) -> float:
    """Return the microseconds of a launch that cannot be in a CUDA graph; of the host, where it takes longer."""
    launch()
    return elapsed_us(launch, num_launches)
