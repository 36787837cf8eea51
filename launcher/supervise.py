"""Attempts: start, watch, verdict, again or not. One file for all backends.

A verdict is one of completed, stopped (by the user), preempted (by SIGTERM, or to go on elsewhere) and
failed. A failure is tried again from the last checkpoint, unless it is the user's to mend (exit code 2)
or certain to happen again.
"""

import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from launcher.backends import PREEMPTED, Exit, Gang, Starter
from launcher.plan import Plan
from launcher.rundir import RunDirectory

EXIT_DONE, EXIT_USER_ERROR, EXIT_SAVED, EXIT_STOPPED = 0, 2, 75, 130
EXIT_CODES = {"completed": EXIT_DONE, "preempted": EXIT_SAVED, "stopped": EXIT_STOPPED, "failed": 1}
POLL_SECONDS = 0.1
TAIL_LINES = 12
# jax aborts the processes whose peer is gone: the peer's own word may come a moment later.
CONSEQUENCE = -signal.SIGABRT
CAUSE_SECONDS = 2.0
# Allocations in a row that ended before a checkpoint: another would, too.
FRUITLESS = 3


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong in an attempt."""

    process: int
    host: str
    cause: str
    """`exit code N`, the signal's name, or the backend's word: `lost`, `not started`, `srun failed`."""
    error: str
    """Last line of the traceback, or of the log."""
    step: int | None
    lines: list[str]
    """Last lines of the traceback, or of the log."""
    retryable: bool


@dataclass
class Wishes:
    """What the user or the system asks of a running launcher; set by signal handlers."""

    outlived: bool = False
    """The processes live on without the launcher: SIGTERM and SIGHUP mean it alone."""
    leave: bool = False
    stop: str | None = None
    """`stopped` (Ctrl-C) or `preempted` (SIGTERM)."""
    now: bool = False
    """Ctrl-C again: do not wait for the save."""

    def interrupted(self, signum: int, frame: Any) -> None:
        if self.outlived and signum != signal.SIGINT:
            self.leave = True
            return
        self.now = self.now or (self.stop is not None and signum == signal.SIGINT)
        self.stop = self.stop or ("stopped" if signum == signal.SIGINT else "preempted")


Watch = Callable[[int, dict[str, Any]], None]
"""Called some times a second with the attempt's number and the newest report of process 0."""


def supervise(
    plan: Plan, run: RunDirectory, backend: Starter, *, wishes: Wishes, watch: Watch,
    announce: Callable[[str], None],
) -> dict[str, Any] | None:  # fmt: skip
    """Run attempts until a final verdict; returns what it wrote to result.json, None where it left them to another
    launcher."""
    begun = time.time()
    number, from_step = _unfinished(run), 0
    gang = backend.adopt(plan, run, number) if number else None
    if number and gang is None:
        _account_for_lost(run, number)
    where = {"cluster": plan.cluster, "mesh": plan.mesh} | backend.ledger()
    restarts = sum(1 for a in run.attempts_of_launch() if a["verdict"] == "failed")
    if gang is None and run.stop_requested():  # before it could begin
        return write_result(plan, run, "stopped")
    while True:
        if gang is None:
            from_step = (run.checkpoint_steps() or [0])[-1]
            number = run.begin_attempt(where)
            gang = backend.start(plan, run, number)
        verdict, failure = _attempt(plan, run, gang, number, wishes, watch)
        if verdict is None or run.is_lost(look=True):
            return None
        gang = None
        run.refresh()
        attempt = _ledger_line(run, number, time.time(), from_step, verdict, failure)
        run.add_attempt(attempt)
        if wishes.stop or verdict in ("completed", "stopped"):
            break
        if verdict == "preempted" and (not backend.REMOTE or _is_fruitless(run.attempts_of_launch())):
            break
        if verdict == "failed":
            assert failure is not None
            if not failure.retryable or restarts >= plan.max_restarts:
                break
            restarts += 1
            if not backend.can_restart(plan, run):
                announce(f"{describe(failure)}\nnot again on these hosts; the run is to go on elsewhere")
                verdict = "preempted"
                break
        again = f" (restart {restarts} of {plan.max_restarts})" if verdict == "failed" else ""
        announce(
            f"{describe(failure) if failure else 'the hosts are taken away'}\n"
            f"attempt {number + 1} from step {attempt['kept_step']}{again}"
        )
    if verdict == "preempted" and _is_fruitless(run.attempts_of_launch()):
        announce(
            f"{FRUITLESS} attempts in a row were ended before a checkpoint: give the run more time, or save more often"
        )
        verdict = "failed"
    return write_result(plan, run, verdict, failure, time.time() - begun)


def exit_code(result: dict[str, Any]) -> int:
    """With which `launch` ends."""
    failure = result["failure"]
    is_users = result["status"] == "failed" and failure is not None and failure["cause"] == "exit code 2"
    return EXIT_USER_ERROR if is_users else EXIT_CODES[result["status"]]


def _is_fruitless(attempts: list[dict[str, Any]]) -> bool:
    last = attempts[-FRUITLESS:]
    return len(last) == FRUITLESS and all(
        a["verdict"] == "preempted" and a["kept_step"] <= a["from_step"] for a in last
    )


def describe(failure: Failure | dict[str, Any]) -> str:
    """One line: which process, where, how, why."""
    f = asdict(failure) if isinstance(failure, Failure) else failure
    at = "" if f["step"] is None else f" at step {f['step']}"
    return f"process {f['process']} on {f['host']} failed{at} ({f['cause']}): {f['error']}"


def _attempt(
    plan: Plan, run: RunDirectory, gang: Gang, number: int, wishes: Wishes, watch: Watch
) -> tuple[str | None, Failure | None]:
    """Watch one gang to its end; nothing of it is left when this returns, but for a verdict of None."""
    running = set(range(plan.processes))
    codes: list[int] = []
    first: Exit | None = None
    cause_until = 0.0
    asked = killed = left = False
    try:
        while running:
            if left := wishes.leave or run.is_lost():
                gang.leave()
                return None, None
            exits = gang.poll(POLL_SECONDS)
            running -= {ended.process for ended in exits}  # all of them, before the first may end the attempt
            for ended in exits:
                codes.append(ended.code)
                if ended.code == -signal.SIGTERM:
                    killed = True  # it had not begun to train: nothing to save, nobody to wait for
                elif ended.code not in (EXIT_DONE, EXIT_SAVED) and not killed:
                    if first is None:
                        first, cause_until = ended, time.monotonic() + CAUSE_SECONDS
                    elif first.code == CONSEQUENCE != ended.code:
                        first = ended
            if first and (first.code != CONSEQUENCE or time.monotonic() > cause_until or not running):
                gang.kill()
                verdict = PREEMPTED if first.cause == PREEMPTED else "failed"
                return verdict, _failure(run, number, first)
            if run.stop_requested() and wishes.stop is None:
                wishes.stop = "stopped"
            if wishes.stop and not asked:
                asked = True
                gang.ask_to_stop()
            if killed := killed or wishes.now:
                gang.kill()
            watch(number, run.report(0))
    except BaseException:
        if left := wishes.outlived:
            gang.leave()  # what fails is this launcher
        raise
    finally:
        if not left:
            gang.kill()
        while running and not left:
            running -= {ended.process for ended in gang.poll(POLL_SECONDS)}
    if all(code == EXIT_DONE for code in codes):
        return "completed", None
    return "stopped" if wishes.stop == "stopped" else gang.stopped_by(), None


def _failure(run: RunDirectory, number: int, ended: Exit) -> Failure:
    report = run.report(ended.process)
    told = report.get("failure") or {}
    lines = told["traceback"] if "traceback" in told else _tail(run, number, ended.process)
    code = ended.code
    return Failure(
        process=ended.process,
        host=ended.host or report.get("host", socket.gethostname()),
        cause=ended.cause or (f"exit code {code}" if code >= 0 else _signal_name(-code)),
        error=ended.error or told.get("error") or (lines[-1] if lines else "its log is empty"),
        step=told.get("step") or report.get("step"),
        lines=lines[-TAIL_LINES:],
        retryable=code != EXIT_USER_ERROR and told.get("retryable", True),
    )


def _signal_name(number: int) -> str:
    # Real-time signals have no name each.
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _tail(run: RunDirectory, attempt: int, process: int) -> list[str]:
    text = run.read_log(attempt, process).decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]


def _ledger_line(
    run: RunDirectory,
    number: int,
    ended: float,
    from_step: int,
    verdict: str,
    failure: Failure | None,
) -> dict[str, Any]:
    report = run.report(0)
    # A damaged checkpoint may have sent it further back than the launcher knew.
    from_step = report.get("start", from_step)
    reached = report.get("step", from_step)
    kept = (run.checkpoint_steps() or [0])[-1]
    where = run.where(number)
    started = where.pop("begun", report.get("begun", ended))
    return {
        "attempt": number,
        "started": _iso(started),
        "ended": _iso(ended),
        "wall_seconds": round(ended - started, 3),
        "verdict": verdict,
        "hosts": sorted({run.report(p).get("host", "") for p in range(report.get("processes", 1))} - {""}),
        "from_step": from_step,
        "reached_step": reached,
        "kept_step": kept,
        "steps_lost": max(reached - kept, 0),
        "seconds": report.get("seconds", {}),
        "failure": asdict(failure) if failure else None,
        **where,
    }


def _unfinished(run: RunDirectory) -> int:
    """Number of the attempt that a lost launcher left without a line in the ledger; 0 where there is none."""
    known, number = run.attempts(), run.last_attempt()
    return number if number > (known[-1]["attempt"] if known else 0) else 0


def _account_for_lost(run: RunDirectory, number: int) -> None:
    """Write the line that is missing, from what the hosts said."""
    known = run.attempts()
    before = known[-1]["kept_step"] if known else 0
    started = run.where(number).get("begun", time.time())
    ended = max(started, run.report(0).get("time", started))
    run.add_attempt(_ledger_line(run, number, ended, before, "launcher lost", None))


def write_result(
    plan: Plan, run: RunDirectory, verdict: str, failure: Failure | None = None, wall_seconds: float = 0.0
) -> dict[str, Any]:
    """result.json, from what attempts and reports say."""
    report = run.report(0)
    outcome = report.get("outcome") or {}
    attempts = run.attempts()
    step = outcome.get("step", attempts[-1]["kept_step"] if attempts else 0)
    result = {
        "status": verdict,
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        "metrics": {k: v for k, v in report.items() if k.startswith(("eval/", "train/"))},
        "images_per_second": outcome.get("images_per_second"),
        "attempts": len(attempts),
        "wall_seconds": round(wall_seconds, 3),
        "goodput": goodput(attempts),
        "failure": asdict(failure) if failure else None,
    }
    run.write_result(result)
    return result


def goodput(attempts: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the wall time of all attempts: `train` is compute on steps that were kept."""
    wall = sum(a["wall_seconds"] for a in attempts) or 1.0
    shares = dict.fromkeys(("train", "data_wait", "checkpoint", "evaluation", "lost"), 0.0)
    for a in attempts:
        seconds = a["seconds"]
        steps = a["reached_step"] - a["from_step"]
        kept = max(a["kept_step"] - a["from_step"], 0) / steps if steps > 0 else 1.0
        compute = seconds.get("compute", 0.0)
        shares["train"] += compute * min(kept, 1.0)
        shares["lost"] += compute * (1 - min(kept, 1.0))
        for activity in ("data_wait", "checkpoint", "evaluation"):
            shares[activity] += seconds.get(activity, 0.0)
    shares["startup_and_rest"] = max(wall - sum(shares.values()), 0.0)
    return {activity: round(seconds / wall, 4) for activity, seconds in shares.items()}


def _iso(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds")
