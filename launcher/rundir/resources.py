"""What a run rents, written down before it is asked for: whoever comes next finds it, and can delete it."""

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from launcher.rundir.storage import Files

FILE = "resources.json"


@dataclass(frozen=True)
class Rented:
    """One request for machines, and what became of it. Times are seconds since the epoch."""

    project: str
    zone: str
    name: str
    accelerator: str
    provisioning: str
    requested: float
    granted: float | None = None
    """When the machines were first seen to be there."""
    released: float | None = None
    """When the provider had deleted it; None where it may still cost money."""
    kept: bool = False
    """The user keeps it beyond the end of the run."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.project, self.zone, self.name


class Resources:
    def __init__(self, files: Files):
        self._files = files

    def unreleased(self) -> list[Rented]:
        """What may exist, and cost money."""
        return [rented for rented in self.all() if rented.released is None]

    def left_behind(self) -> list[Rented]:
        """What nobody keeps on purpose, and still has to be deleted once the run has ended."""
        return [rented for rented in self.unreleased() if not rented.kept]

    def all(self) -> list[Rented]:
        """The newest request of each name in each zone. Raises UserError where the file has anything else."""
        try:
            return [Rented(**fields) for fields in self._content().get("rented", [])]
        except (ValueError, TypeError, AttributeError) as e:
            raise UserError(
                f"{self._files.location}/{FILE} is not as podlaunch wrote it ({e}): delete the file, and, with `launch gc "
                "--delete`, what the run still rents"
            ) from None

    def write(self, rented: Rented) -> None:
        """Add a request, or replace the record of an earlier one of the same name."""
        others = [other for other in self.all() if other.key != rented.key]
        self._write(rented=[dataclasses.asdict(each) for each in [*others, rented]])

    def release(self, rented: Rented) -> None:
        """Record that the provider has deleted it."""
        self.write(dataclasses.replace(rented, released=time.time()))

    # The limit of a wait counts over all its requests, and over all launchers that ask again

    def waiting_since(self) -> float | None:
        """When the run began to wait for machines; None where it does not wait."""
        return self._content().get("waiting_since")

    def write_waiting_since(self, since: float | None) -> None:
        self._write(waiting_since=since)

    def _content(self) -> dict[str, Any]:
        return json.loads(self._files.read(FILE) or "{}")

    def _write(self, **changes: Any) -> None:
        self._files.write(FILE, json.dumps(self._content() | changes, indent=2))

    def forget(self) -> None:
        """Delete the records, of a launch in which nothing was rented."""
        self._files.delete(FILE)
