"""Traces of host and device, recorded by torch.profiler."""

import time
from pathlib import Path

import torch

from engine.errors import InvalidRequest


class Profiler:
    """Records from its creation to `stop`."""

    def __init__(self, output_dir: str) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._path = Path(output_dir) / f"radixloop-{time.strftime('%Y%m%d-%H%M%S')}.trace.json.gz"
        # Of every thread: on a CPU the steps run on a worker's.
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._profile = torch.profiler.profile(activities=activities, experimental_config=every_thread)
        self._profile.start()

    def stop(self) -> None:
        """End the recording. Call on the thread that started it."""
        self._profile.stop()

    def write(self) -> str:
        """Write the recording, for chrome://tracing or Perfetto, and return the file's path. Takes seconds."""
        self._profile.export_chrome_trace(str(self._path))
        return str(self._path)


def make_profile_folder(path: str) -> None:
    """Create the folder `path`. `InvalidRequest` with the reason if that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"no profile can be written to {path}: {error.strerror}", "output_dir") from None
