"""Profiles of several replicas, recorded at the same time."""

from collections.abc import Sequence
from pathlib import Path

from engine.errors import EngineError, InvalidRequest
from engine.profiler import make_profile_folder
from engine.replicas.handle import ReplicaHandle
from engine.replicas.messages import START_PROFILE, STOP_PROFILE


class ReplicaProfiles:
    """One recording at a time; see `Engine.start_profile`."""

    def __init__(self) -> None:
        self._is_recording = False

    def start(self, replicas: Sequence[ReplicaHandle], output_dir: str) -> None:
        if self._is_recording:
            raise InvalidRequest("a profile is being recorded")
        folders = [str(Path(output_dir, replica.name.replace(" ", "-"))) for replica in replicas]
        for folder in folders:  # here, where the client still gets the error
            make_profile_folder(folder)
        self._is_recording = True
        for replica, folder in zip(replicas, folders, strict=True):
            replica.send(START_PROFILE, folder)

    async def stop(self, replicas: Sequence[ReplicaHandle]) -> str:
        """Return the paths of all profiles. `EngineError` with the reasons if there are replicas without one."""
        if not self._is_recording:
            raise InvalidRequest("no profile is being recorded")
        self._is_recording = False
        for replica in replicas:
            replica.send(STOP_PROFILE)
        answers = [await replica.profiles.get() for replica in replicas]
        if reasons := [reason for _, reason in answers if reason]:
            raise EngineError("; ".join(reasons))
        return ", ".join(path for path, _ in answers)
