"""The gang on hosts that are reached by ssh, in three stages: wait for them, prepare them, follow their agents."""

import queue
import signal
import threading
import time

from configs.errors import UserError
from launcher.gang import PREEMPTED, Exit, drain
from launcher.remote.attempt import RemoteAttempt, StoppedError
from launcher.remote.follow import Follower
from launcher.remote.hosts import Hosts
from launcher.remote.prepare import Preparation
from launcher.remote.ssh import HostError, connected

# A worker that a host has not reported as ended after that long counts as killed: the host may be gone.
KILL_SECONDS = 10.0
# After preflight finds that the hosts are about to be taken away, their condition is asked again after that long.
NOTICE_SECONDS = 10.0


class RemoteGang:
    """The agents of one attempt. A thread does all the work, so that the supervisor never waits for a host."""

    def __init__(self, attempt: RemoteAttempt, hosts: Hosts, *, adopted: bool):
        """`adopted`: the agents run already, and are only followed."""
        self._attempt, self._hosts = attempt, hosts
        self._exits: queue.SimpleQueue[tuple[float, Exit]] = queue.SimpleQueue()
        self._follower = Follower(attempt, hosts, lambda at, exit_: self._exits.put((at, exit_)))
        self._killed: float | None = None
        threading.Thread(target=self._work, args=(adopted,), daemon=True).start()

    def poll(self, timeout: float) -> list[Exit]:
        # Several exits of an adopted gang may arrive at once: they are sorted as they happened.
        arrived = sorted(drain(self._exits, timeout), key=lambda item: item[0])
        running = self._follower.running
        if self._killed is not None and time.monotonic() - self._killed > KILL_SECONDS:
            arrived += [(0.0, Exit(process, -signal.SIGKILL)) for process in sorted(running)]
        exits = [exit_ for _, exit_ in arrived if exit_.process in running]
        running -= {exit_.process for exit_ in exits}
        return exits

    def request_stop(self) -> None:
        self._attempt.stopping.set()
        self._follower.send(b"stop\n")

    def kill(self) -> None:
        if self._killed is None:
            self._killed = time.monotonic()
            self._attempt.stopping.set()
            self._follower.send(b"kill\n")

    def detach(self) -> None:
        self._attempt.detached.set()
        self._follower.disconnect()

    def stopped_by(self) -> str:
        return PREEMPTED

    def _work(self, adopted: bool) -> None:
        attempt = self._attempt
        try:
            while not attempt.detached.is_set():
                with attempt.timed("hosts"):
                    machines = self._hosts.wait(attempt)
                with connected(self._hosts.cluster(attempt), machines) as ssh:
                    if adopted or Preparation(attempt, ssh, self._hosts.name, machines).start():
                        return self._follower.follow(ssh, machines)
                attempt.stopping.wait(NOTICE_SECONDS)
        except StoppedError:
            self._end(Exit(0, -signal.SIGTERM))
        except HostError as e:
            error = "; ".join([str(e), *getattr(e, "__notes__", [])])
            code, cause = (2, "") if e.is_users else (1, "not started")
            self._end(Exit(e.process, code, e.host, cause, error))
        except UserError as e:
            self._end(Exit(0, 2, error=str(e)))
        except Exception as e:  # noqa: BLE001 (the outermost layer of this thread: nobody else would end the attempt)
            self._end(Exit(0, 1, cause="launcher failed", error=f"{type(e).__name__}: {e}"))

    def _end(self, first: Exit) -> None:
        """End the attempt: `first` is the cause, and all other processes end because of it."""
        for exit_ in self._attempt.exits_of_all(first):
            self._exits.put((time.time(), exit_))
