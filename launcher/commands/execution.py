"""How a run is executed: supervised from here, submitted to a scheduler, or followed where it goes on."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError
from launcher.commands import console
from launcher.commands.runs import check_not_in_another_job, is_remote, states

if TYPE_CHECKING:
    from launcher.gang import Executor, Released
    from launcher.plan import Plan
    from launcher.providers import Resource
    from launcher.rundir import RunDirectory

JOB_PROGRESS_SECONDS = 60.0  # nobody watches the log of a job as it grows


def train(
    plan: "Plan", run: "RunDirectory", executor: "Executor", *, requeue: bool, begin: bool, yes: bool = False,
    detach: bool = False,
) -> int:  # fmt: skip
    """Supervise the run from here; its exit code.

    `begin`: this is a new launch, not the next job of one; `requeue`: have the job requeued where the run is saved
    and not yet done; `detach`: only until the workers have begun.
    """
    from launcher import backends
    from launcher.rundir import RunHeldError
    from launcher.supervise import (
        EXIT_DONE,
        EXIT_FAILED,
        EXIT_SAVED,
        StopRequest,
        exit_code,
        has_completed,
        supervise,
    )

    job = executor.job_info()["job"]
    if executor.REMOTE and run.is_running():
        # Taking a lease over lasts half a minute, in which nothing else would be printed.
        console.echo("waiting     to check whether the previous launcher of this run is still running")
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.locked())
        if executor.REMOTE and not begin and run.result() is not None:
            raise RunHeldError(f"run {plan.name} has ended meanwhile")
        run.claim_checkpoints(plan)
        if executor.REMOTE and begin and not has_completed(plan, run):
            _acquire(plan, run, yes=yes)
        else:
            run.write_plan(plan)
        stop_request = stack.enter_context(_stopped_by_signals(StopRequest(workers_outlive=executor.REMOTE)))
        seconds = JOB_PROGRESS_SECONDS if requeue else console.PROGRESS_SECONDS
        progress = stack.enter_context(console.Progress(plan, seconds))
        if begin:
            run.begin_launch(job)
        else:
            run.job.write_id(job)

        detached = False

        def on_progress(attempt: int, report: dict[str, Any]) -> None:
            progress.update(attempt, report)
            nonlocal detached
            detached = detach and "pid" in report  # only the report of a worker has a process id
            stop_request.detach = stop_request.detach or detached

        result = supervise(
            plan, run, executor, stop_request=stop_request, on_progress=on_progress, announce=progress.print
        )
        if result is None:
            why = "another launcher has taken it over" if run.is_lost() else "nothing was stopped or deleted"
            progress.print(f"left        {why}; `launch attach {plan.name}` goes on with it")
            return EXIT_DONE if detached else EXIT_SAVED
        released = _release(plan, run, progress.print) if executor.REMOTE else None
    console.print_result(plan, run, result, again=begin and not requeue)
    if released and released.costs_money:
        console.echo(released.sentence)  # the last line, since it is the one to act on
        return EXIT_FAILED
    code = exit_code(result)
    if requeue and code == EXIT_SAVED:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it to all processes of the job
        console.echo(backends.get_queue(plan.backend).requeue(plan, run))
    elif requeue:
        backends.get_queue(plan.backend).prevent_requeue()
    return code


def _acquire(plan: "Plan", run: "RunDirectory", *, yes: bool) -> None:
    """Have missing hosts created, with the user's consent. Raises UserError; then nothing is created."""
    from launcher import backends

    remote = backends.get_remote(plan.backend)
    quote = remote.quote(plan, run)
    if quote is not None:
        console.echo(f"to create   {quote}")
        if not yes:
            if not sys.stdin.isatty():
                raise UserError("the TPU costs money, and nothing was created; say --yes to create it")
            click.confirm("Create it?", abort=True)
    with run.planned(plan):
        remote.acquire(plan, run)


def _release(plan: "Plan", run: "RunDirectory", announce: Callable[[str], None]) -> "Released":
    """Delete the hosts of a run that has ended. It may take long: Ctrl-C and SIGTERM end the tries."""
    from launcher import backends

    announce("deleting the TPUs")
    give_up = threading.Event()
    with _handled([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], lambda *_: give_up.set()):
        released = backends.get_remote(plan.backend).release(plan, run, announce, give_up)
    if not released.costs_money:
        announce(released.sentence)
    return released


def delete_all(project: str | None, resources: "list[Resource]") -> bool:
    """Delete TPUs of any runs, trying for long; whether all of them are gone."""
    from launcher.backends import tpu

    give_up, left = threading.Event(), []
    with _handled([signal.SIGINT, signal.SIGTERM], lambda *_: give_up.set()):
        for resource in resources:
            if tpu.delete(project, resource, console.echo, give_up):
                console.echo(f"deleted     {resource.name}")
            else:
                left.append(resource.name)
    for name in left:
        console.echo(f"not deleted {name}: IT STILL COSTS MONEY")
    return not left


def clean_up(plan: "Plan", run: "RunDirectory") -> int:
    """Delete the hosts that a run left behind when it ended without its launcher; 1 where they still cost money."""
    from launcher.rundir import RunHeldError
    from launcher.supervise import EXIT_DONE, EXIT_FAILED

    if not is_remote(run) or run.result() is None or not run.resources.left_behind():
        return EXIT_DONE
    console.echo(f"left behind {', '.join(rented.name for rented in run.resources.left_behind())}")
    try:
        with run.locked():
            if run.result() is None:
                return EXIT_DONE  # the run goes on
            released = _release(plan, run, console.echo)
    except RunHeldError as e:
        console.echo(f"not deleted: {e}")
        return EXIT_FAILED
    if released.costs_money:
        console.echo(released.sentence)
    return EXIT_FAILED if released.costs_money else EXIT_DONE


def submit(plan: "Plan", run: "RunDirectory") -> None:
    """Submit the job that runs the plan. Raises UserError; then nothing is left behind."""
    from launcher import backends

    queue = backends.get_queue(plan.backend)
    if ignored := queue.ignored():
        console.echo(f"not used    {ignored}")
    with run.locked_or_rolled_back():
        check_not_in_another_job(run)  # once more: another launch may have submitted it meanwhile
        run.claim_checkpoints(plan)
        # Before there is a job: where this launcher is killed, the next command finds the run, and its job.
        run.write_plan(plan)
        run.begin_launch(None)
        job = queue.submit(plan, run)
        run.job.write_id(job)
    console.echo(f"job         {job}")


def follow(plan: "Plan", run: "RunDirectory", *, again: bool = True) -> int:
    """Show the progress of a run until it ends; its exit code. Ctrl-C leaves the run as it is."""
    from launcher.supervise import EXIT_CODES, EXIT_STOPPED, describe_failure, exit_code

    started, num_shown, shown = time.time(), len(run.attempts.all()), ""
    bad_nodes = console.bad_nodes_text(run)
    try:
        with console.Progress(plan) as progress:
            for state in states(run):
                for attempt in run.attempts.all()[num_shown:]:
                    num_shown += 1
                    if attempt["failure"]:
                        progress.print(describe_failure(attempt["failure"]))
                if console.bad_nodes_text(run) != bad_nodes:
                    bad_nodes = console.bad_nodes_text(run)
                    progress.print(bad_nodes)
                if state.is_active and str(state) != shown:
                    progress.print(str(state))
                    shown = str(state)
                report = run.hosts.report(0)
                if state.status == "running" and report.get("time", 0) > started:  # a report of this attempt
                    progress.update(run.attempts.last(), report)
    except KeyboardInterrupt:
        where = f", in job {run.job.id()}" if run.job.id() else ""
        follows, stops = (
            f"`launch attach {plan.name}` follows it",
            f"`launch stop {plan.name}` has it save and end",
        )
        console.echo(f"\nleft running{where}: {follows}, {stops}")
        return EXIT_STOPPED
    result = run.result()
    if result is None or result["status"] != state.status:
        console.echo(
            f"run {plan.name} is {state}; see {run.location}/logs; repeat the `launch` command to resume"
        )
        console.print_lines(state.lines)
        return EXIT_CODES.get(state.status, EXIT_CODES["failed"])
    console.print_result(plan, run, result, again=again)
    return exit_code(result)


@contextlib.contextmanager
def _stopped_by_signals(stop_request: Any) -> Iterator[Any]:
    """Ctrl-C and SIGTERM set `stop_request` while a run is supervised."""
    signals = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if stop_request.workers_outlive else [])]
    with _handled(signals, stop_request.on_signal):
        yield stop_request


@contextlib.contextmanager
def _handled(signals: list[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """A context in which these signals call `handler`."""
    before = {s: signal.signal(s, handler) for s in signals}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)
