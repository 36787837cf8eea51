"""The attempts of a run: the ledger of those that ended, and where each one began."""

import json
import re
import time
from contextlib import suppress
from typing import Any

from launcher.rundir.storage import Files, read_object

LEDGER = "attempts.jsonl"


class Attempts:
    """The files of the attempts of a run."""

    def __init__(self, files: Files):
        self._files = files

    def all(self) -> list[dict[str, Any]]:
        """Records of the attempts that have ended, oldest first."""
        records = []
        # Not splitlines: a record may hold other characters that end a line.
        for line in (self._files.read(LEDGER) or "").split("\n"):
            with suppress(json.JSONDecodeError):  # a crash may have cut the line
                record = json.loads(line)
                if isinstance(record, dict) and "attempt" in record:
                    records.append(record)
        return records

    def of_launch(self) -> list[dict[str, Any]]:
        """Records of the attempts since `launch` was typed last, over all jobs in which the run went on."""
        first = int(self._files.read("first-attempt") or 1)
        return [a for a in self.all() if a["attempt"] >= first]

    def append(self, record: dict[str, Any]) -> None:
        # Written as a whole, since an object under gs:// cannot be appended to.
        earlier = self._files.read(LEDGER) or ""
        if earlier and not earlier.endswith("\n"):
            earlier += "\n"  # the line before was cut by a crash
        self._files.write(LEDGER, f"{earlier}{json.dumps(record, ensure_ascii=False)}\n")

    def last(self) -> int:
        """Number of the newest attempt, 0 before the first."""
        found = (re.fullmatch(r"attempt-(\d{1,9})", name) for name in self._files.names("logs"))
        return max((int(match[1]) for match in found if match), default=0)

    def begin(self, info: dict[str, Any]) -> int:
        """Number of the next attempt; the reports and the result of the one before are cleared."""
        number = self.last() + 1
        # Reports of the attempt before, perhaps of more processes, would be taken for those of this one.
        self._files.delete("result.json")
        self._files.delete("hosts")
        self.write_info(number, info | {"begun": time.time()})
        return number

    def begin_launch(self) -> None:
        """Count the attempts of `of_launch` from the next one on."""
        self._files.write("first-attempt", str(self.last() + 1))

    def info(self, attempt: int) -> dict[str, Any]:
        """Cluster, mesh and job of an attempt, and when it began; empty where there is no such attempt."""
        return read_object(self._files, f"logs/attempt-{attempt}/attempt.json")

    def write_info(self, attempt: int, info: dict[str, Any]) -> None:
        self._files.write(f"logs/attempt-{attempt}/attempt.json", json.dumps(info))
