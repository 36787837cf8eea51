"""`launch worker` on each VM of a TPU slice: the VMs meet in the run directory, the only place that they share."""

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from configs.errors import UserError
from launcher.accelerators import megascale_environment
from launcher.host.agent import Agent, WorkerSpec, agent_folder
from launcher.host.external import CANCELLED, REFUSED
from launcher.machine.metadata import TpuWorker
from launcher.machine.network import reserve_port
from launcher.plan import Plan
from launcher.rundir import RunDirectory

RENDEZVOUS_SECONDS = float(os.environ.get("LAUNCH_RENDEZVOUS_SECONDS", "300"))
# A refused process 0 waits only so long for the others, whom it tells of the refusal.
REFUSED_SECONDS = 30.0
# Each round lists and reads objects of the bucket, on every VM.
POLL_SECONDS = 1.0
ANNOUNCEMENT = "announcement"


class TpuVmHost:
    """The worker of this VM, from the rendezvous with the other VMs to its end."""

    def __init__(self, worker: TpuWorker, run: RunDirectory):
        self._run = run
        self.process = worker.slice * len(worker.addresses) + worker.worker
        self._processes = worker.slices * len(worker.addresses)
        self.node = worker.addresses[worker.worker]
        self._worker = worker
        self._stopped = threading.Event()
        self._agent: Agent | None = None

    def rendezvous(self, attempt: int | None) -> tuple[int, str]:
        return self._wait_for_process_0() if attempt is None else self._announce(attempt)

    def start(self, plan: Plan, attempt: int, coordinator: str) -> None:
        spec = WorkerSpec(asdict(plan), attempt, self.process, coordinator, self._slice_environment())
        self._agent = Agent(agent_folder(self._run.location, Path.home()), spec)
        self._agent.start()
        if self._stopped.is_set():  # the request came during the rendezvous
            self._agent.request_stop()

    def cancel(self, reason: int = CANCELLED) -> None:
        self._announce(reason)

    def wait(self) -> int:
        assert self._agent is not None
        return self._agent.wait()

    def request_stop(self) -> None:
        self._stopped.set()
        if self._agent:
            self._agent.request_stop()

    def kill(self) -> None:
        if self._agent:
            self._agent.kill()

    def _slice_environment(self) -> dict[str, str]:
        worker = self._worker
        if worker.megascale_coordinator is None:
            return {}
        return megascale_environment(worker.megascale_coordinator, worker.slices, worker.slice)

    # Each VM writes a random message of its own. When all have come, process 0 announces the coordinator and repeats
    # their messages, so that no VM takes the announcement of an earlier launch for this one.

    def _announce(self, attempt: int) -> tuple[int, str]:
        self._run.rendezvous.clear()  # a VM whose message this deletes writes it again
        with reserve_port(self.node) as port:  # the agent reserves it again
            coordinator = f"{self.node}:{port.getsockname()[1]}"
        others = {str(process) for process in range(1, self._processes)}
        deadline = time.monotonic() + (REFUSED_SECONDS if attempt == REFUSED else RENDEZVOUS_SECONDS)
        while missing := others - set(self._run.rendezvous.messages()):
            if time.monotonic() > deadline:
                if attempt == REFUSED:
                    break
                raise UserError(self._describe_missing(sorted(map(int, missing))))
            if self._stopped.wait(POLL_SECONDS):
                attempt = CANCELLED
                break
        announcement = [attempt, coordinator, self._run.rendezvous.messages()]
        self._run.rendezvous.write(ANNOUNCEMENT, json.dumps(announcement))
        return attempt, coordinator

    def _describe_missing(self, missing: list[int]) -> str:
        addresses = self._worker.addresses
        if self._worker.slices > 1:
            per_slice = len(addresses)
            names = [f"worker {p % per_slice} of slice {p // per_slice}" for p in missing[:4]]
        else:
            names = [f"worker {p} ({addresses[p]})" for p in missing[:4]]
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return (
            f"{', '.join(names)}{more} has not come in {RENDEZVOUS_SECONDS:.0f} s: start `launch worker` with the same "
            "--root and --name on every VM of the slice, as with --worker=all"
        )

    def _wait_for_process_0(self) -> tuple[int, str]:
        message, name = uuid4().hex, str(self.process)
        deadline = time.monotonic() + RENDEZVOUS_SECONDS
        while time.monotonic() < deadline and not self._stopped.is_set():
            messages = self._run.rendezvous.messages()
            if messages.get(name) != message:
                self._run.rendezvous.write(name, message)
            attempt, coordinator, answered = json.loads(messages.get(ANNOUNCEMENT, '[0, "", {}]'))
            if answered.get(name) == message:
                return attempt, coordinator
            time.sleep(POLL_SECONDS)
        if self._stopped.is_set():
            return CANCELLED, ""
        raise UserError(
            f"worker {self._worker.worker} has received nothing from worker 0 ({self._worker.addresses[0]}) in "
            f"{self._run.location} for {RENDEZVOUS_SECONDS:.0f} s: start `launch worker` there as well, with the same "
            "--root and --name"
        )
