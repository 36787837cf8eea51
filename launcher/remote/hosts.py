"""First stage of a remote gang: wait until the provider has the hosts ready, and ask again where they are lost.

The wait has phases: requests are out, in all zones that the user names; a request was lost, so the next one goes out
after a pause that grows; spot took too long, so the chips are asked for on demand; the user's limit is reached.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from configs.clusters import TpuCluster
from configs.errors import UserError
from configs.google import UnreachableError
from launcher.providers import Condition, Machine, Provisioning, Request
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.rental import GONE, Rental
from launcher.remote.ssh import HostError

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.5, 10.0
# Between two requests, where the first was lost in the queue.
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 10.0, 900.0
# A node whose state is unknown for so long before anything runs there is given up.
UNKNOWN_SECONDS = 120.0


@dataclass(frozen=True)
class Hosts:
    """The hosts of a run, as the provider knows them."""

    rental: Rental
    request: Callable[[Provisioning, float], Request]
    """What to request, by provisioning and the hours that the request may wait."""
    key: str | None
    """`user:public key` that the hosts must accept from this machine; None where OS Login does that."""

    @property
    def name(self) -> str:
        return self.rental.name

    def condition(self) -> Condition:
        return self.rental.condition()

    def cluster(self, attempt: RemoteAttempt) -> TpuCluster:
        """The cluster's settings, with the zone that granted the hosts."""
        return attempt.cluster.model_copy(update={"zone": self.rental.zone})

    def wait(self, attempt: RemoteAttempt) -> list[Machine]:
        """The machines, once they are ready. Raises HostError, and StoppedError."""
        wait, shown, started = _Wait(self, attempt), "", time.monotonic()
        for poll in itertools.count():
            attempt.check_stopped()
            try:
                phase = wait.step()
                if phase is None:
                    return self.rental.provider().machines(self.name)
            except UnreachableError as e:
                phase = str(e)
            except UserError as e:  # the role may be given, or the user may stop the run
                phase = f"refused, trying again: {e}"
            if phase != shown or poll % 6 == 0:  # every sixth poll, so that the user sees the time grow
                shown = phase
                attempt.report_phase(f"{phase}, for {time.monotonic() - started:.0f} s", queued=True)
            attempt.stopping.wait(_growing(MIN_POLL_SECONDS, 1.3, poll, MAX_POLL_SECONDS))
        raise AssertionError


@dataclass
class _Zone:
    """What became of the requests in one zone during this wait."""

    num_failed: int = 0
    due: float = 0.0
    """When the next request may go out, by the monotonic clock."""
    lost: float | None = None
    """When the request was made whose loss was seen last."""
    why_lost: str = ""
    refused: str = ""
    """Why the last request was refused."""
    unknown_since: float | None = None

    def postpone(self) -> None:
        """A request was refused or lost: the next one comes after a longer pause."""
        pause = _growing(MIN_RETRY_SECONDS, 2.0, self.num_failed, MAX_RETRY_SECONDS)
        self.num_failed, self.due = self.num_failed + 1, time.monotonic() + pause


class _Wait:
    """One wait for hosts."""

    def __init__(self, hosts: Hosts, attempt: RemoteAttempt):
        self._hosts, self._rental, self._attempt = hosts, hosts.rental, attempt
        self._cluster = attempt.cluster
        self._zones = {zone: _Zone() for zone in hosts.rental.zones}

    def step(self) -> str | None:
        """None when the hosts are ready, otherwise the phase.

        Raises HostError, StoppedError, UserError and UnreachableError.
        """
        rental, granted = self._rental, self._rental.granted_zone()
        found = {granted: rental.condition()} if granted else rental.conditions()
        conditions = {zone: self._settled(zone, condition) for zone, condition in found.items()}
        if ready := [zone for zone, condition in conditions.items() if condition.status == "ready"]:
            self._take(ready[0])
            return None
        if granted and conditions[granted].status not in GONE:
            return self._phase(conditions)
        if granted and not rental.is_ours:
            raise HostError(0, rental.name, f"it is {conditions[granted]}", is_users=True)
        if granted:  # the run had these hosts until they were taken away, so a new wait begins, in all zones
            self._report(f"{rental.name} is {conditions[granted]}: creating it again")
            rental.withdraw(granted)
            return self.step()
        # Where chips are being set up, the wait is about to end, and another request might be granted for nothing.
        if not any(condition.status == "creating" for condition in conditions.values()):
            self._check_limit(conditions)
            for zone, condition in conditions.items():
                if self._is_due(zone, condition):
                    self._request(zone, condition)
        return self._phase(conditions)

    def _settled(self, zone: str, condition: Condition) -> Condition:
        """A state that stays unknown for too long is a loss."""
        state = self._zones[zone]
        if condition.status != "unknown":
            state.unknown_since = None
            return condition
        state.unknown_since = state.unknown_since or time.monotonic()
        is_lost = time.monotonic() - state.unknown_since > UNKNOWN_SECONDS
        return replace(condition, status="lost") if is_lost else condition

    def _take(self, zone: str) -> None:
        """The hosts of this zone are the run's. Nothing starts there before the other zones can grant nothing more."""
        if self._rental.is_ours:
            if len(self._rental.zones) > 1:
                self._report(f"granted in {zone}: withdrawing the other requests")
            self._rental.grant(zone)
            self._attempt.check_stopped()  # the deletions may have taken minutes
        if self._hosts.key:
            self._rental.provider(zone).authorize(self._rental.name, self._hosts.key)

    def _waited_hours(self) -> float:
        since = self._rental.run.resources.waiting_since()
        return 0.0 if since is None else (time.time() - since) / 3600

    def _check_limit(self, conditions: dict[str, Condition]) -> None:
        """Raises HostError where a request failed by the user's mistake, or the user's limit is reached."""
        # What is refused in one zone, such as a quota that others use up, may be granted in another.
        refused = [z for z, c in conditions.items() if c.status == "invalid" and self._rental.requested(z)]
        if len(refused) == len(conditions):
            zone = refused[0]
            raise HostError(0, self._rental.name, f"in {zone} it is {conditions[zone]}", is_users=True)
        limit = self._cluster.valid_until_hours
        if self._waited_hours() >= limit:
            losses = {zone: self._zones[zone].why_lost or c.detail for zone, c in conditions.items()}
            why = "; ".join(f"{zone}: {loss}" for zone, loss in losses.items())
            message = f"no capacity within valid_until_hours = {limit:g} ({why})"
            again = "launch again to wait longer, or name other zones or another size"
            raise HostError(0, self._rental.name, f"{message}: {again}", is_users=True)

    def _provisioning(self) -> Provisioning:
        """How the chips are to be asked for by now."""
        after = self._cluster.on_demand_after_hours
        is_late = after is not None and self._waited_hours() >= after
        return "on-demand" if is_late else self._cluster.provisioning

    def _is_due(self, zone: str, condition: Condition) -> bool:
        """Whether a request is to go out in a zone now."""
        state, rented = self._zones[zone], self._rental.requested(zone)
        if condition.status not in GONE:
            is_other = rented is not None and rented.provisioning != self._provisioning()
            return is_other and condition.status == "waiting"
        if rented and rented.requested != state.lost:  # it was lost in the queue
            state.lost, state.why_lost = rented.requested, condition.detail
            state.postpone()
        return time.monotonic() >= state.due

    def _request(self, zone: str, condition: Condition) -> None:
        rental, state = self._rental, self._zones[zone]
        try:
            if condition.status != "absent":
                rental.withdraw(zone)
            self._attempt.check_stopped()  # the deletion may have taken minutes
            hours = self._cluster.valid_until_hours - self._waited_hours()
            rental.request(zone, self._hosts.request(self._provisioning(), hours))
            state.refused = ""
        except UserError as e:  # others may use up a quota for now, and the user may stop the run
            state.refused = f"refused, trying again: {e}"
            state.postpone()

    def _phase(self, conditions: dict[str, Condition]) -> str:
        phase = self._details(conditions)
        dues = [self._zones[zone].due for zone, c in conditions.items() if c.status in GONE]
        if dues and (pause := min(dues) - time.monotonic()) > 0:
            num_requests = 1 + sum(state.num_failed for state in self._zones.values())
            seconds = 3600 * (self._cluster.valid_until_hours - self._waited_hours())
            until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time() + seconds))
            phase += f"; request {num_requests} goes out in {pause:.0f} s, the last one before {until}"
        return phase

    def _details(self, conditions: dict[str, Condition]) -> str:
        details = {z: self._zones[z].refused or c.detail or c.status for z, c in conditions.items()}
        if len(self._rental.zones) == 1:
            return next(iter(details.values()))
        return "; ".join(f"{zone}: {detail}" for zone, detail in details.items())

    def _report(self, phase: str) -> None:
        self._attempt.report_phase(phase, queued=True)


def _growing(first: float, factor: float, count: int, limit: float) -> float:
    """Seconds of a pause that grows with each of them. The power is limited, too: a wait may have thousands of polls."""
    return min(first * factor ** min(count, 64), limit)
