"""Runs that exist: the one that a command names, its plan, backend and state, and whether a plan can resume it."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from launcher.commands import console
from launcher.commands.arguments import root_of

if TYPE_CHECKING:
    from launcher.gang import Backend, State
    from launcher.plan import Plan
    from launcher.rundir import RunDirectory

FOLLOW_SECONDS = 0.3  # reads of the run directory, by which a user sees progress


def roots_of(root: str | None) -> list[str]:
    """Where `launch` stores runs: in `root`, or else where it does by default, on this machine and for TPUs."""
    return [root] if root else list(dict.fromkeys(root_of(None, backend) for backend in ("local", "tpu")))


def all_runs(root: str | None) -> list["RunDirectory"]:
    """All runs below `roots_of(root)`, the one launched last first. Raises UserError."""
    from launcher.rundir import list_runs

    roots = roots_of(root)
    try:
        return list_runs(*roots)
    except UserError as e:
        if not (here := list_runs(roots[0]) if len(roots) > 1 else []):
            raise
        console.echo(f"not looked at: {e}", err=True)  # the runs on this machine are there without it
        return here


def find_run(root: str | None, name: str | None) -> "RunDirectory":
    """The run called `name`, or the one launched last. Raises UserError, with the nearest name."""
    from configs.load import nearest
    from launcher.rundir import RunDirectory

    roots = roots_of(root)
    # A run in a folder is found without asking a bucket, which may be out of reach.
    if name and len(roots) > 1 and (Path(roots[0]) / name / "plan.json").is_file():
        return RunDirectory(Path(roots[0]) / name)
    found, where = all_runs(root), " or ".join(roots)
    if not found:
        raise UserError(f"no runs in {where}; give the --root that `launch` was given")
    if name is None:
        return found[0]
    for run in found:
        if run.name == name:
            return run
    names = [r.name for r in found]
    raise UserError(f"no run {name!r} in {where}{nearest(name, names)} (there are: {', '.join(names)})")


def plan_of(run: "RunDirectory") -> "Plan":
    plan = run.plan()
    assert plan is not None
    return plan


def backend_of(run: "RunDirectory") -> "Backend":
    from launcher import backends

    return backends.get(plan_of(run).backend)


def is_remote(run: "RunDirectory") -> bool:
    """Whether `launch` reaches the hosts of a run by ssh; those of `launch worker` it does not."""
    return backend_of(run).REMOTE and plan_of(run).submission is not None


def state_of(run: "RunDirectory") -> "State":
    return backend_of(run).state(run)


def states(run: "RunDirectory") -> Iterator["State"]:
    """The state of a run, several times a second, until the run ends.

    A scheduler is asked rarely: when the run directory has news, or while process 0 does not report.
    """
    backend = backend_of(run)
    due, seen, seen_report = -math.inf, None, None
    while True:
        news, report = (run.attempts.last(), run.result()), run.hosts.report(0).get("time")
        is_due = news != seen or time.monotonic() >= due
        if is_due:
            state = backend.state(run)
        if is_due or report != seen_report:
            due = time.monotonic() + backend.POLL_SECONDS
        seen, seen_report = news, report
        yield state
        if not state.is_active:
            return
        time.sleep(FOLLOW_SECONDS)


def check_not_in_another_job(run: "RunDirectory") -> None:
    """Raises UserError where a job runs the run already. A launcher on this machine holds the lock."""
    if run.plan() is None:
        return
    state = state_of(run)
    if run.job.id() != backend_of(run).job_info()["job"] and state.is_active:
        raise UserError(
            f"run {run.name} is {state.status} in job {run.job.id()}: follow it with `launch attach "
            f"{run.name}`, stop it with `launch stop {run.name}`, or start another run with --name"
        )


def check_can_resume(plan: "Plan", run: "RunDirectory") -> list[str]:
    """Changes of where and how long the run goes on, as phrases. Raises UserError where `plan` cannot resume it."""
    from launcher.plan import differences

    old = run.plan()
    if old is None and run.has_foreign_files():
        raise UserError(f"{run.location} is not empty and contains no run; choose another --name or --root")
    changed = differences(old, plan) if old else []
    steps = _checkpoints_to_resume(old, plan, run)
    if changed and steps:  # before the first checkpoint there is nothing to resume
        raise UserError(
            f"run {plan.name} was started with other settings ({'; '.join(changed)}): "
            f"undo the changes to resume, or start another run with --name"
        )
    if steps and steps[-1] > plan.steps:
        raise UserError(
            f"run {plan.name} is at step {steps[-1]} already, past train.steps = {plan.steps}; "
            f"raise train.epochs or train.steps, or start another run with --name"
        )
    if old is None:
        return []
    before, now = _place_and_length(old), _place_and_length(plan)
    return changed + [f"{key}: {before[key]}, now {now[key]}" for key in now if before[key] != now[key]]


def _place_and_length(plan: "Plan") -> dict[str, Any]:
    """What a user may change from launch to launch, but wants to know of: the hosts of the run may still exist."""
    hosts = {key: (plan.submission or {}).get(key) for key in ("project", "zone", "tpu")}
    return {"cluster": plan.cluster, "mesh": plan.mesh, "steps": plan.steps, **hosts}


def _checkpoints_to_resume(old: "Plan | None", plan: "Plan", run: "RunDirectory") -> list[int]:
    """Steps of the checkpoints. Raises UserError where the run would begin anew in another location."""
    steps = run.checkpoint_steps(plan)
    before, now = run.checkpoints(old or plan), run.checkpoints(plan)
    if before != now:
        old_steps = run.checkpoint_steps(old)
        if old_steps and (not steps or steps[-1] < old_steps[-1]):
            some = f"only up to step {steps[-1]}" if steps else "none"
            raise UserError(
                f"run {plan.name} has checkpoints up to step {old_steps[-1]} in {before}, and {some} in {now}: "
                "copy the checkpoints to the new place, or undo the change of checkpoint.directory"
            )
    return steps


def is_complete(plan: "Plan", run: "RunDirectory") -> bool:
    """Whether the run has all steps of the plan already; says so."""
    result = run.result()
    if result is None or result["status"] != "completed" or result["step"] < plan.steps:
        return False
    console.echo(
        f"run {plan.name} is complete; start another run with --name, or train longer with train.epochs=…"
    )
    console.print_result(plan, run, result)
    return True
