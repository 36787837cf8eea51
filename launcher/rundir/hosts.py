"""What the hosts of a run write: reports and logs of its processes, and where the processes meet."""

import json
from pathlib import Path
from typing import Any

from launcher.rundir.storage import Files, read_object


class HostFiles:
    """Reports and logs, by process."""

    def __init__(self, files: Files):
        self._files = files

    def report(self, process: int) -> dict[str, Any]:
        """The newest report of one process of the current attempt, empty before its first."""
        return read_object(self._files, f"hosts/{process}.json")

    def write_report(self, process: int, report: dict[str, Any]) -> None:
        self._files.write(f"hosts/{process}.json", json.dumps(report))

    def logs(self, attempt: int) -> str:
        """Location of the logs of an attempt."""
        return f"{self._files.location}/logs/attempt-{attempt}"

    def log_file(self, attempt: int, process: int) -> Path:
        """The log of a process, where the run directory is not under gs://."""
        return Path(self._files.location) / _log(attempt, process)

    def read_log(self, attempt: int, process: int, offset: int = 0) -> bytes:
        """The log of a process from byte `offset` on; empty where there is no log."""
        return self._files.read_from(_log(attempt, process), offset)

    def write_log(self, attempt: int, process: int, text: str) -> None:
        self._files.write(_log(attempt, process), text)


def _log(attempt: int, process: int) -> str:
    return f"logs/attempt-{attempt}/host-{process}.log"


class Rendezvous:
    """Where processes that `launch` has not started find each other."""

    def __init__(self, files: Files):
        self._files = files

    def file(self, step: str) -> Path:
        """The file in which process 0 of a SLURM step tells the others how to join it."""
        return Path(self._files.location) / "logs" / f"rendezvous-{step}"

    def messages(self) -> dict[str, str]:
        """The messages of the VMs of a slice, by their names."""
        names = self._files.names("rendezvous")
        texts = {name: self._files.read(f"rendezvous/{name}") for name in names}
        return {name: text for name, text in texts.items() if text is not None}

    def write(self, name: str, message: str) -> None:
        self._files.write(f"rendezvous/{name}", message)

    def clear(self) -> None:
        self._files.delete("rendezvous")
