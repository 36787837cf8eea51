"""The machines that a run rents: recorded before they are asked for, in one zone or several, until they are deleted.

All that creates or deletes machines of a run goes through here; backends/tpu.py and hosts.py decide when.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial

from configs.errors import UserError
from configs.google import UnreachableError
from launcher.providers import Condition, Provider, Request
from launcher.rundir import Rented, RunDirectory, run_id

# Conditions in which machines have to be requested, after what may be left of them is deleted.
GONE = ("absent", "lost", "invalid", "deleting")
# A deletion is tried again for so long: requests may be refused for minutes, and nobody may be there to type it again.
DELETION_SECONDS = 1800.0
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0


class Rental:
    def __init__(
        self,
        run: RunDirectory,
        name: str,
        project: str,
        zones: tuple[str, ...],
        provider: Callable[[str, str], Provider],
        *,
        is_ours: bool = True,
    ):
        """`zones`: where the machines may be, in the user's order; `provider`: of a project and a zone; `is_ours`:
        the run may create and delete the machines."""
        self.run, self.name, self.project, self.zones, self.is_ours = run, name, project, zones, is_ours
        self._provider = cache(provider)

    # What there is

    def conditions(self) -> dict[str, Condition]:
        """By zone."""
        return {zone: self.provider(zone).condition(self.name) for zone in self.zones}

    def condition(self) -> Condition:
        """The condition of the machines that the run has got."""
        return self.provider().condition(self.name)

    def granted_zone(self) -> str | None:
        """Where the machines are, once they have been granted."""
        if not self.is_ours:
            return self.zones[0]
        return next((zone for zone, rented in self._unreleased().items() if rented.granted), None)

    def provider(self, zone: str | None = None) -> Provider:
        """The provider of a zone, by default of the one that has the machines."""
        return self._provider(self.project, zone or self.zone)

    @property
    def zone(self) -> str:
        """Where the machines are, or may come to be."""
        return self.granted_zone() or self.zones[0]

    def requested(self, zone: str) -> Rented | None:
        """The request that is out in a zone, or has ended there and was not deleted yet."""
        return self._unreleased().get(zone)

    # What is asked for

    def request(self, zone: str, request: Request) -> None:
        """Raises UserError where the request is refused; then nothing is rented there."""
        if self.run.resources.waiting_since() is None:
            self.run.resources.write_waiting_since(time.time())
        # First, so that a launcher that is killed now leaves a record of what it asked for.
        rented = self.record(zone, request)
        try:
            self.provider(zone).create(request)
        except UserError:
            # It may have been accepted all the same, as where its answer was lost and the repetition was refused.
            with suppress(UserError, UnreachableError):
                if self.provider(zone).condition(self.name).owner != run_id(self.run.location):
                    self.run.resources.release(rented)
            raise

    def record(self, zone: str, request: Request) -> Rented:
        """Record that the run rents this, and is to release it."""
        kind, provisioning = request.accelerator_type, request.provisioning
        rented = Rented(self.project, zone, self.name, kind, provisioning, requested=time.time())
        self.run.resources.write(rented)
        return rented

    def grant(self, zone: str) -> None:
        """Record that the machines are there, and delete what the other zones may still grant."""
        for other in self._unreleased():
            if other != zone:
                self.withdraw(other)
        rented = self.requested(zone)
        if rented and not rented.granted:
            self.run.resources.write(replace(rented, granted=time.time()))
            self.run.resources.write_waiting_since(None)

    def withdraw(self, zone: str) -> None:
        """Delete what there is in a zone. Raises UserError and UnreachableError; then it may still exist."""
        self._delete(self.project, zone, self.name)
        if rented := self.requested(zone):
            self.run.resources.release(rented)

    def withdraw_elsewhere(self) -> None:
        """Delete what earlier launches of the run have left in places that this one does not use."""
        places = {(self.project, zone, self.name) for zone in self.zones}
        for rented in self.run.resources.left_behind():
            if rented.key not in places:
                self._delete(*rented.key)
                self.run.resources.release(rented)

    def _delete(self, project: str, zone: str, name: str) -> None:
        """Delete machines of this run, and no others: whoever may write to the bucket may write names into its files."""
        provider = self._provider(project, zone)
        if provider.condition(name).owner == run_id(self.run.location):
            provider.delete(name)

    def _unreleased(self) -> dict[str, Rented]:
        """By zone; not what an earlier launch has kept elsewhere."""
        found = {rented.key: rented for rented in self.run.resources.unreleased()}
        keys = {zone: (self.project, zone, self.name) for zone in self.zones}
        return {zone: found[key] for zone, key in keys.items() if key in found}

    # How it ends

    def keep(self) -> list[Rented]:
        """Record that the user keeps what was granted, not what would be granted to nobody."""
        for rented in self.run.resources.left_behind():
            if rented.granted:
                self.run.resources.write(replace(rented, kept=True))
        return [rented for rented in self.run.resources.unreleased() if rented.kept]

    def take_back(self, kept: Rented) -> None:
        """Record that what an earlier launch has kept is this one's to release."""
        self.run.resources.write(replace(kept, kept=False))

    def release(self, announce: Callable[[str], None], give_up: threading.Event) -> list[Rented]:
        """Delete what the run rents and nobody keeps, trying for long; what may still exist after all tries."""
        self._record_unknown()
        for rented in self.run.resources.left_behind():
            delete = partial(self._delete, *rented.key)
            if delete_for_long(delete, rented.name, announce, give_up, self._is_lost):
                self.run.resources.release(rented)
        return self.run.resources.left_behind()

    def _record_unknown(self) -> None:
        """Record where the machines may be, if no record says anything of it: those of an earlier podlaunch had none."""
        known = {rented.key for rented in self.run.resources.all()}
        for zone in self.zones if self.is_ours else ():
            if (self.project, zone, self.name) not in known:
                rented = Rented(self.project, zone, self.name, "unknown", "unknown", requested=time.time())
                self.run.resources.write(rented)

    def _is_lost(self) -> bool:
        """Another launcher has taken over the run, and may have rented machines of the same name by now."""
        return self.run.is_lost(refresh=True)


def delete_for_long(
    delete: Callable[[], None],
    name: str,
    announce: Callable[[str], None],
    give_up: threading.Event,
    is_lost: Callable[[], bool] = lambda: False,
) -> bool:
    """Call `delete` until the machines of this name are gone; whether they are."""
    deadline, pause = time.monotonic() + DELETION_SECONDS, MIN_RETRY_SECONDS
    while not is_lost():
        try:
            delete()
            return True
        except (UserError, UnreachableError) as e:
            announce(f"not deleted {name} yet: {e}; trying again in {pause:.0f} s (Ctrl-C: leave it)")
        if time.monotonic() > deadline or give_up.wait(pause):
            break
        pause = min(2 * pause, MAX_RETRY_SECONDS)
    return False


def describe(left: list[Rented]) -> str:
    """Names and places of what is still rented, as a phrase."""
    return ", ".join(f"{rented.name} in {rented.zone} of project {rented.project}" for rented in left)
