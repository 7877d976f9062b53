"""Every kernel on a GPU: checked against its definition in torch, then timed beside it.

cuBLAS and, where it is installed, FlashInfer are timed too, each with its share of what memory or the tensor cores can
do.

    python -m bench.kernels [gemm] [gated_gemm] [elementwise] [attention] [mla] [experts]

Runs `bench.gemm`, `bench.gated_gemm` and so on one after the other; each prints its table last.
"""

import subprocess
import sys

BENCHES = {
    "gemm": [], "gated_gemm": [], "elementwise": ["--flashinfer", "--limit", "400"], "attention": [], "mla": [],
    "experts": [],
}  # fmt: skip


def main() -> int:
    chosen = sys.argv[1:] or list(BENCHES)
    if unknown := set(chosen) - set(BENCHES):
        print(__doc__)
        return 0 if unknown <= {"-h", "--help"} else 2
    # A process each: none finds the memory or the caches as another left them.
    return max(
        subprocess.run([sys.executable, "-m", f"bench.{name}", *BENCHES[name]], check=False).returncode
        for name in chosen
    )


if __name__ == "__main__":
    sys.exit(main())
