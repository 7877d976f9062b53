"""Traces of host and device, by torch.profiler."""

import time
from pathlib import Path

import torch


class Profiler:
    """Records from its creation to `stop`."""

    def __init__(self, output_dir: str) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._path = Path(output_dir) / f"radixloop-{time.strftime('%Y%m%d-%H%M%S')}.trace.json.gz"
        # On a CPU the steps run on a worker's thread.
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._profile = torch.profiler.profile(activities=activities, experimental_config=every_thread)
        self._profile.start()

    def stop(self) -> None:
        """On the thread that started it."""
        self._profile.stop()

    def write(self) -> str:
        """Write what was recorded, for chrome://tracing or Perfetto, and return the file's path. Takes seconds."""
        self._profile.export_chrome_trace(str(self._path))
        return str(self._path)
