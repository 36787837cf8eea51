"""`launch stop`: a stop request, and the wait for its effect."""

import contextlib
import sys
import time

import click

from configs.errors import UserError
from launcher.commands import console, execution
from launcher.commands.arguments import root_option
from launcher.commands.runs import backend_of, find_run, is_remote, plan_of, state_of, states
from launcher.commands.trust import own_options, own_plan


@click.command()
@click.argument("name", required=False)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for the save.")
@own_options
@root_option
def stop(name: str | None, timeout: float, settings: tuple[str, ...], yes: bool, root: str | None) -> None:
    """Let a running run save and stop; cancel a queued one."""
    from launcher import backends
    from launcher.rundir import RunHeldError
    from launcher.supervise import EXIT_FAILED, write_result

    run = find_run(root, name)
    backend, state = backend_of(run), state_of(run)
    if not state.is_active:
        console.echo(f"run {run.name} is not running ({state})")
        sys.exit(execution.clean_up(plan_of(run), run))
    plan = own_plan(run, settings, yes=yes)
    run.request_stop()  # also for a run that begins meanwhile
    if is_remote(run):
        with contextlib.suppress(RunHeldError):  # then the launcher that looks after it ends it
            execution.train(plan, run, backend, requeue=False, begin=False)
            if run.resources.left_behind():  # it has tried for long to delete this, and said so
                sys.exit(EXIT_FAILED)
    # A job in the queue has no step to save, so it is cancelled at once.
    if state.status == "queued" and not backend.REMOTE:
        backends.get_queue(plan.backend).cancel(run)
        write_result(plan, run, "stopped")
    deadline = time.monotonic() + timeout
    for state in states(run):
        if state.is_active and time.monotonic() > deadline:
            raise UserError(f"run {run.name} has not stopped within {timeout:g} s; see `launch status`")
    console.echo(f"run {run.name} is {state}")
    sys.exit(execution.clean_up(plan, run))
