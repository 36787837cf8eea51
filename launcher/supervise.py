"""Attempts: start, watch, verdict, again or not. One file for all backends.

A verdict is one of completed, stopped (by the user), preempted (by SIGTERM, or to go on elsewhere) and failed.
A failure is retried from the last checkpoint, unless the user has to mend it (exit code 2) or it is certain to
happen again.
"""

import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from launcher.gang import EXIT_USER_ERROR, PREEMPTED, STEP_FAILED, Executor, Exit, Gang
from launcher.plan import Plan
from launcher.rundir import RunDirectory

EXIT_DONE, EXIT_FAILED, EXIT_SAVED, EXIT_STOPPED = 0, 1, 75, 130
EXIT_CODES = {"completed": EXIT_DONE, "preempted": EXIT_SAVED, "stopped": EXIT_STOPPED, "failed": EXIT_FAILED}
POLL_SECONDS = 0.1
TAIL_LINES = 12
# jax aborts the processes whose peer is gone. The exit of the peer itself, which is the cause, may be seen a moment
# later.
PEER_ABORT = -signal.SIGABRT
ROOT_CAUSE_SECONDS = 2.0
# The words of jax's coordinator (xla/tsl/distributed_runtime/coordination/coordination_service.cc), then a line
# for each process: its number, or a name that ends with it.
_UNHEALTHY = re.compile(r"tasks are unhealthy \(stopped sending heartbeats\):\n((?:\S*\d\n)+)")
# Workers report each second, and jax's heartbeat takes longer than this.
SILENT_SECONDS = 10.0
# After so many preempted attempts in a row without a new checkpoint, the next one would end the same way, and a job
# would be requeued for ever.
MAX_FRUITLESS_ATTEMPTS = 3


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt."""

    process: int
    host: str
    cause: str
    """`exit code N`, the signal's name, or what the backend says: `lost`, `hung`, `not started`, `srun failed`."""
    error: str
    """Last line of the traceback, or of the log."""
    step: int | None
    lines: list[str]
    """Last lines of the traceback, or of the log."""
    retryable: bool


@dataclass
class StopRequest:
    """What the user or the system asks of a running launcher; set by its signal handlers."""

    workers_outlive: bool = False
    """The workers outlive their launcher, so SIGTERM and SIGHUP end the launcher alone."""
    detach: bool = False
    verdict: str | None = None
    """`stopped` (Ctrl-C) or `preempted` (SIGTERM)."""
    at_once: bool = False
    """Ctrl-C was pressed again: do not wait for the save."""

    def on_signal(self, signum: int, frame: Any) -> None:
        if self.workers_outlive and signum != signal.SIGINT:
            self.detach = True
            return
        self.at_once = self.at_once or (self.verdict is not None and signum == signal.SIGINT)
        self.verdict = self.verdict or ("stopped" if signum == signal.SIGINT else "preempted")


OnProgress = Callable[[int, dict[str, Any]], None]
"""Called several times a second with the attempt's number and the newest report of process 0."""


def supervise(
    plan: Plan, run: RunDirectory, executor: Executor, *, stop_request: StopRequest, on_progress: OnProgress,
    announce: Callable[[str], None],
) -> dict[str, Any] | None:  # fmt: skip
    """Run attempts until a final verdict; the result, which is also written to result.json.

    Returns None, and writes nothing, where the run is left to another launcher.
    """
    launched = time.time()
    number, from_step = _unfinished(run), 0
    gang = executor.adopt(plan, run, number) if number else None
    if number and gang is None:
        is_complete = has_completed(plan, run)
        _record_lost_attempt(run, number, "completed" if is_complete else "launcher lost")
        if is_complete:
            return write_result(plan, run, "completed")
    info = {"cluster": plan.cluster, "mesh": plan.mesh} | executor.job_info()
    # Of all launchers and jobs of this launch together, so that a requeued job has no new budget.
    restarts = sum(1 for a in run.attempts.of_launch() if a["verdict"] == "failed")
    if gang is None and run.stop_requested():  # the user stopped the run while it was queued
        return write_result(plan, run, "stopped")
    while True:
        if gang is None:
            from_step = (run.checkpoint_steps() or [0])[-1]
            number = run.attempts.begin(info)
            gang = executor.start(plan, run, number)
        # Returns when no process runs any more: the next attempt may use their devices and write their checkpoints.
        verdict, failure = _watch(plan, run, gang, number, stop_request, on_progress)
        if verdict is None or run.is_lost(refresh=True):
            return None
        gang = None
        run.refresh()  # the last reports and checkpoints count, not those of a moment ago
        attempt = _attempt_record(run, number, time.time(), from_step, verdict, failure)
        run.attempts.append(attempt)
        if stop_request.verdict or verdict in ("completed", "stopped"):
            break
        if verdict == "preempted" and (not executor.REMOTE or _is_fruitless(run.attempts.of_launch())):
            break
        if verdict == "failed":
            assert failure is not None
            if not failure.retryable or restarts >= plan.max_restarts:
                break
            restarts += 1
            if not executor.can_restart(plan, run):
                reason = describe_failure(failure)
                announce(f"{reason}\nnot again on these hosts; the run is to go on elsewhere")
                verdict = "preempted"
                break
        again = f" (restart {restarts} of {plan.max_restarts})" if verdict == "failed" else ""
        reason = describe_failure(failure) if failure else "the hosts were preempted"
        announce(f"{reason}\nattempt {number + 1} from step {attempt['kept_step']}{again}")
    if verdict == "preempted" and _is_fruitless(run.attempts.of_launch()):
        count = f"{MAX_FRUITLESS_ATTEMPTS} attempts in a row"
        announce(f"{count} were ended before a checkpoint: give the run more time, or save more often")
        verdict = "failed"
    return write_result(plan, run, verdict, failure, time.time() - launched)


def exit_code(result: dict[str, Any]) -> int:
    """The exit code of `launch` for a result."""
    failure = result["failure"]
    is_failed = result["status"] == "failed" and failure is not None
    is_users = is_failed and (
        failure["cause"] == "exit code 2" or (failure["cause"] == STEP_FAILED and not failure["retryable"])
    )
    return EXIT_USER_ERROR if is_users else EXIT_CODES[result["status"]]


def _is_fruitless(attempts: list[dict[str, Any]]) -> bool:
    last = attempts[-MAX_FRUITLESS_ATTEMPTS:]
    fruitless = [a for a in last if a["verdict"] == "preempted" and a["kept_step"] <= a["from_step"]]
    return len(fruitless) == MAX_FRUITLESS_ATTEMPTS


def describe_failure(failure: Failure | dict[str, Any]) -> str:
    """One line: which process failed, where, how, why."""
    f = asdict(failure) if isinstance(failure, Failure) else failure
    if f["cause"] == STEP_FAILED:
        return f"{STEP_FAILED}, so that no process was started: {f['error']}"
    step = "" if f["step"] is None else f" at step {f['step']}"
    return f"process {f['process']} on {f['host']} failed{step} ({f['cause']}): {f['error']}"


def _watch(
    plan: Plan, run: RunDirectory, gang: Gang, number: int, stop_request: StopRequest, on_progress: OnProgress
) -> tuple[str | None, Failure | None]:
    """Watch one gang to its end, after which none of its processes runs.

    The verdict is None where the gang was left to another launcher; then its processes go on.
    """
    running = set(range(plan.processes))
    ends: dict[int, Exit] = {}
    first: Exit | None = None
    cause_until = 0.0
    stopping = killed = detached = False
    try:
        while running:
            if detached := stop_request.detach or run.is_lost():
                gang.detach()
                return None, None
            # All exits of this poll are counted before the first may end the attempt.
            for ended in _ended(gang, running, ends):
                if ended.code == -signal.SIGTERM:
                    # SIGTERM ends a worker that has not begun to train. It has nothing to save, and the others
                    # cannot save without it.
                    killed = True
                elif ended.code not in (EXIT_DONE, EXIT_SAVED) and not killed:
                    if first is None:
                        first, cause_until = ended, time.monotonic() + ROOT_CAUSE_SECONDS
                    elif first.code == PEER_ABORT != ended.code:
                        first = ended
            # An abort alone is not the cause: its peer's exit may still arrive.
            if first and (first.code != PEER_ABORT or time.monotonic() > cause_until or not running):
                if first.code == PEER_ABORT:
                    first = _hung(plan, run, number) or first
                break
            if run.stop_requested() and stop_request.verdict is None:
                stop_request.verdict = "stopped"
            if stop_request.verdict and not stopping:
                stopping = True
                gang.request_stop()
            if killed := killed or stop_request.at_once:
                gang.kill()
            on_progress(number, run.hosts.report(0))
    except BaseException:
        if detached := stop_request.workers_outlive:
            gang.detach()  # an error of this launcher is no reason to end the run
        raise
    finally:
        # Also after a failure: a process that survived would keep its devices and the port of the coordinator.
        if not detached:
            gang.kill()
        while running and not detached:
            _ended(gang, running, ends)
    if first:
        verdict = PREEMPTED if first.cause == PREEMPTED else "failed"
        return verdict, _failure(run, number, replace(first, host=first.host or ends[first.process].host))
    if all(ended.code == EXIT_DONE for ended in ends.values()):
        return "completed", None
    # Some exited with 75, so all have saved at a common step.
    return "stopped" if stop_request.verdict == "stopped" else gang.stopped_by(), None


def _ended(gang: Gang, running: set[int], ends: dict[int, Exit]) -> list[Exit]:
    """The exits since the last call, which are moved from `running` to `ends`."""
    exits = gang.poll(POLL_SECONDS)
    for ended in exits:
        ends[ended.process] = ended
    running.difference_update(ends)
    return exits


def _hung(plan: Plan, run: RunDirectory, number: int) -> Exit | None:
    """The process because of which jax aborted the others, which itself has said nothing: it is frozen or cut off.

    jax's coordinator names it, if it is not the coordinator's own process; and it no longer reports.
    """
    run.refresh()
    reported = {p: run.hosts.report(p).get("time", 0.0) for p in range(plan.processes)}
    last = max(reported.values())
    silent = [p for p in reported if last - reported[p] > SILENT_SECONDS]
    suspects = _named_by_jax(plan, run, number) or silent
    if not suspects:
        return None
    process = min(suspects, key=lambda p: reported[p])
    seconds = last - reported[process]
    since = (
        f"it last reported {seconds:.0f} s before the others" if process in silent else "it still reported"
    )
    return Exit(process, 1, cause="hung", error=f"jax lost contact with it and ended the others; {since}")


def _named_by_jax(plan: Plan, run: RunDirectory, number: int) -> set[int]:
    """The processes that jax's coordinator has called unhealthy, from the logs of those it told."""
    named: set[int] = set()
    for process in range(plan.processes):
        text = run.hosts.read_log(number, process).decode(errors="replace")
        for tasks in _UNHEALTHY.findall(text):
            named |= {int(task) for task in re.findall(r"(\d+)$", tasks, re.MULTILINE)}
    return named & set(range(plan.processes))


def _failure(run: RunDirectory, number: int, ended: Exit) -> Failure:
    report = run.hosts.report(ended.process)
    reported = report.get("failure") or {}
    lines = reported["traceback"] if "traceback" in reported else _tail(run, number, ended.process)
    code = ended.code
    return Failure(
        process=ended.process,
        host=ended.host or report.get("host", socket.gethostname()),
        cause=ended.cause or (f"exit code {code}" if code >= 0 else _signal_name(-code)),
        error=ended.error or reported.get("error") or (lines[-1] if lines else "its log is empty"),
        step=reported.get("step") or report.get("step"),
        lines=lines[-TAIL_LINES:],
        retryable=code != EXIT_USER_ERROR and reported.get("retryable", True),
    )


def _signal_name(number: int) -> str:
    # Real-time signals have no names of their own.
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _tail(run: RunDirectory, attempt: int, process: int) -> list[str]:
    text = run.hosts.read_log(attempt, process).decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]


def _attempt_record(
    run: RunDirectory, number: int, ended: float, from_step: int, verdict: str, failure: Failure | None
) -> dict[str, Any]:
    """The line of attempts.jsonl; `ended`: seconds since the epoch."""
    report = run.hosts.report(0)
    # A damaged checkpoint may have sent the workers further back than the launcher knew.
    from_step = report.get("start", from_step)
    reached = report.get("step", from_step)
    kept = (run.checkpoint_steps() or [0])[-1]
    info = run.attempts.info(number)
    started = info.pop("begun", report.get("begun", ended))
    processes = range(report.get("processes", 1))
    return {
        "attempt": number,
        "started": _iso(started),
        "ended": _iso(ended),
        "wall_seconds": round(ended - started, 3),
        "verdict": verdict,
        "hosts": sorted({run.hosts.report(p).get("host", "") for p in processes} - {""}),
        "from_step": from_step,
        "reached_step": reached,
        "kept_step": kept,
        "steps_lost": max(reached - kept, 0),
        "seconds": report.get("seconds", {}),
        "failure": asdict(failure) if failure else None,
        **info,
    }


def _unfinished(run: RunDirectory) -> int:
    """Number of the attempt that a lost launcher has left without a record; 0 where there is none."""
    records, number = run.attempts.all(), run.attempts.last()
    return number if number > (records[-1]["attempt"] if records else 0) else 0


def has_completed(plan: Plan, run: RunDirectory) -> bool:
    """Whether the attempt that a lost launcher has left did all steps, by the last report from hosts that may be gone."""
    outcome = run.hosts.report(0).get("outcome") or {}
    return bool(_unfinished(run)) and outcome.get("status") == "completed" and outcome["step"] >= plan.steps


def _record_lost_attempt(run: RunDirectory, number: int, verdict: str) -> None:
    """Write the missing record of an attempt, from what its hosts reported."""
    records = run.attempts.all()
    from_step = records[-1]["kept_step"] if records else 0
    started = run.attempts.info(number).get("begun", time.time())
    # Nobody saw the end; the newest report is what is known of it.
    ended = max(started, run.hosts.report(0).get("time", started))
    run.attempts.append(_attempt_record(run, number, ended, from_step, verdict, None))


def write_result(
    plan: Plan, run: RunDirectory, verdict: str, failure: Failure | None = None, wall_seconds: float = 0.0
) -> dict[str, Any]:
    """Write result.json, from the records of the attempts and the reports; returns its content."""
    report = run.hosts.report(0)
    outcome = report.get("outcome") or {}
    attempts = run.attempts.all()
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
