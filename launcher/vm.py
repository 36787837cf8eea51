"""`launch worker` on each VM of a TPU slice: they meet in the run directory, there is no other place they share."""

import json
import os
import threading
import time
from pathlib import Path
from uuid import uuid4

from configs.errors import UserError
from launcher.agent import Agent, Order, folder_of, of_slices
from launcher.host import CALLED_OFF, REFUSED, REFUSED_WORDS
from launcher.metadata import TpuWorker
from launcher.place import hold_port
from launcher.rundir import RunDirectory

MEETING_SECONDS = float(os.environ.get("LAUNCH_MEETING_SECONDS", "300"))
REFUSED_SECONDS = 30.0
POLL_SECONDS = 1.0


class Vm:
    """This VM's worker, from meeting the others to its end."""

    def __init__(self, worker: TpuWorker, run: RunDirectory):
        self._run = run
        self.process = worker.slice * len(worker.addresses) + worker.worker
        self._processes = worker.slices * len(worker.addresses)
        self.node = self._address = worker.addresses[worker.worker]
        self._worker = worker
        self._stopped = threading.Event()
        self._agent: Agent | None = None

    def start(self, attempt: int | None = None) -> bool:
        attempt, coordinator = self._listen() if attempt is None else self._call(attempt)
        if attempt == REFUSED:
            raise UserError(REFUSED_WORDS)
        if attempt == CALLED_OFF:
            return False
        plan = self._run.plan()
        assert plan is not None  # written before the attempt began
        order = Order(json.loads(plan.to_json()), attempt, self.process, coordinator, self._of_slices())
        self._agent = Agent(folder_of(self._run.place, Path.home()), order)
        self._agent.start()
        if self._stopped.is_set():
            self._agent.ask_to_stop()
        return True

    def call_off(self, why: int = CALLED_OFF) -> None:
        self._call(why)

    def wait(self) -> int:
        assert self._agent is not None
        return self._agent.wait()

    def ask_to_stop(self) -> None:
        self._stopped.set()
        if self._agent:
            self._agent.ask_to_stop()

    def kill(self) -> None:
        if self._agent:
            self._agent.kill()

    def _of_slices(self) -> dict[str, str]:
        worker = self._worker
        if worker.slices == 1 or worker.megascale_coordinator is None:
            return {}
        return of_slices(worker.megascale_coordinator, worker.slices, worker.slice)

    # Who comes leaves a word of its own; process 0 calls when all have come, and says their words, so that
    # nobody takes the call of an earlier launch for this one.

    def _call(self, attempt: int) -> tuple[int, str]:
        self._run.end_meeting()
        self._port = hold_port(self._address)
        coordinator = f"{self._address}:{self._port.getsockname()[1]}"
        self._port.close()  # the agent holds it
        others = {str(process) for process in range(1, self._processes)}
        deadline = time.monotonic() + (REFUSED_SECONDS if attempt == REFUSED else MEETING_SECONDS)
        while missing := others - set(self._run.meeting_words()):
            if time.monotonic() > deadline:
                if attempt == REFUSED:
                    break
                raise UserError(self._missing(sorted(map(int, missing))))
            if self._stopped.wait(POLL_SECONDS):
                attempt = CALLED_OFF
                break
        words = self._run.meeting_words()
        self._run.write_meeting("call", json.dumps([attempt, coordinator, words]))
        return attempt, coordinator

    def _missing(self, missing: list[int]) -> str:
        one = len(self._worker.addresses)
        names = [
            f"worker {p % one}" + (f" of slice {p // one}" if self._worker.slices > 1 else
                                   f" ({self._worker.addresses[p]})")
            for p in missing[:4]
        ]  # fmt: skip
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return (
            f"{', '.join(names)}{more} has not come in {MEETING_SECONDS:.0f} s: start `launch worker` with the same "
            "--root and --name on every VM of the slice, as with --worker=all"
        )

    def _listen(self) -> tuple[int, str]:
        word, name = uuid4().hex, str(self.process)
        deadline = time.monotonic() + MEETING_SECONDS
        while time.monotonic() < deadline and not self._stopped.is_set():
            words = self._run.meeting_words()
            if words.get(name) != word:
                self._run.write_meeting(name, word)
            attempt, coordinator, heard = json.loads(words.get("call", '[0, "", {}]'))
            if heard.get(name) == word:
                return attempt, coordinator
            time.sleep(POLL_SECONDS)
        if self._stopped.is_set():
            return CALLED_OFF, ""
        raise UserError(
            f"worker {self._worker.worker} has heard nothing of worker 0 ({self._worker.addresses[0]}) in "
            f"{self._run.place} for {MEETING_SECONDS:.0f} s: start `launch worker` there, too, with the same --root and --name"
        )
