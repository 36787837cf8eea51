"""First stage of a remote gang: wait until the provider has the hosts ready, and create lost ones anew."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from configs.errors import UserError
from configs.google import UnreachableError
from launcher.providers import Condition, Machine, Provider, Request
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.ssh import HostError

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.5, 10.0


@dataclass(frozen=True)
class Hosts:
    """The hosts of a run, as the provider knows them."""

    provider: Provider
    name: str
    request: Callable[[], Request] | None
    """What to request where the hosts are gone; None where they may not be replaced."""
    key: str | None
    """`user:public key` that the hosts must accept from this machine; None where OS Login does that."""

    def condition(self) -> Condition:
        return self.provider.condition(self.name)

    def wait(self, attempt: RemoteAttempt) -> list[Machine]:
        """The machines, once they are ready. Raises HostError, and StoppedError."""
        has_waited, shown = False, ""
        started = time.monotonic()
        for poll in itertools.count():
            attempt.check_stopped()
            try:
                condition = self.condition()
                if condition.status == "ready":
                    if self.key:
                        self.provider.authorize(self.name, self.key)
                    return self.provider.machines(self.name)
                if condition.status in ("absent", "lost"):
                    # A request that failed or expired in the queue would do so again.
                    if self.request is None or has_waited:
                        raise HostError(0, self.name, f"it is {condition}", is_users=True)
                    attempt.report_phase(f"{self.name} is {condition}: creating it again", queued=True)
                    self._create(attempt, condition.status)
                has_waited = has_waited or condition.status in ("waiting", "creating")
                phase = condition.detail or condition.status
            except UnreachableError as e:
                phase = str(e)
            except UserError as e:  # others may use up a quota for now, and the user may stop the run
                phase = f"refused, trying again: {e}"
            if phase != shown or poll % 6 == 0:  # every sixth poll, so that the user sees the time grow
                shown = phase
                attempt.report_phase(f"{phase}, for {time.monotonic() - started:.0f} s", queued=True)
            attempt.stopping.wait(min(MIN_POLL_SECONDS * 1.3**poll, MAX_POLL_SECONDS))
        raise AssertionError

    def _create(self, attempt: RemoteAttempt, status: str) -> None:
        assert self.request is not None
        if status == "lost":
            self.provider.delete(self.name)
        attempt.check_stopped()  # the deletion may have taken minutes
        self.provider.create(self.request())
