"""Commands that look at runs: status, attach, logs, list, tensorboard."""

import contextlib
import os
import sys
import time

import click

from configs.errors import UserError
from launcher.commands import console, execution
from launcher.commands.arguments import root_option
from launcher.commands.runs import (
    all_runs,
    backend_of,
    find_run,
    is_remote,
    plan_of,
    roots_of,
    state_of,
    states,
)
from launcher.commands.trust import own_options, own_plan


@click.command()
@click.argument("name", required=False)
@root_option
def status(name: str | None, root: str | None) -> None:
    """Show the state of a run; without NAME, of the last one launched."""
    from launcher.supervise import describe_failure

    run = find_run(root, name)
    report, state = run.hosts.report(0), state_of(run)
    console.echo(f"run         {run.name} ({state})")
    console.print_lines(state.lines)
    console.echo(f"directory   {run.location}")
    if "devices" in report:
        console.echo(f"devices     {report['devices']}")
    if report:
        console.echo(f"progress    {console.progress_text(plan_of(run), report)}")
        console.echo(f"last report {time.time() - report['time']:.0f} s ago, {report.get('phase')}")
    console.echo(f"checkpoints {', '.join(map(str, run.checkpoint_steps())) or 'none yet'}")
    for a in run.attempts.all():
        job = f", job {a['job']}" if a.get("job") else ""
        if a.get("restart_count"):
            job += f" requeued {a['restart_count']}×"
        steps = f"steps {a['from_step']} to {a['reached_step']} in {console.duration(a['wall_seconds'])}"
        console.echo(f"attempt {a['attempt']:<4}{a['verdict']}, {steps}{job}")
        if a["failure"]:
            console.echo(f"            {describe_failure(a['failure'])}")
    if bad_nodes := console.bad_nodes_text(run):
        console.echo(f"nodes       {bad_nodes}")


@click.command()
@click.argument("name", required=False)
@own_options
@root_option
def attach(name: str | None, settings: tuple[str, ...], yes: bool, root: str | None) -> None:
    """Follow a run that was launched elsewhere; supervise it if no other launcher does."""
    from launcher.rundir import RunHeldError

    run = find_run(root, name)
    if is_remote(run) and state_of(run).is_active:
        plan = own_plan(run, settings, yes=yes)
        with contextlib.suppress(RunHeldError):  # then another launcher looks after it
            sys.exit(execution.train(plan, run, backend_of(run), requeue=False, begin=False))
    plan = plan_of(run)
    code = execution.follow(plan, run, again=False)
    sys.exit(execution.clean_up(plan, run) or code)


@click.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Keep printing new lines until the run ends.")
@click.option("--host", type=click.IntRange(min=0), help="Print only the log of this host.")
@root_option
def logs(name: str | None, follow: bool, host: int | None, root: str | None) -> None:
    """Print the logs of the newest attempt, each line with its host."""
    run = find_run(root, name)
    processes = plan_of(run).processes
    if host is not None and host >= processes:
        raise UserError(f"--host {host}: the run has hosts 0 to {processes - 1}")
    hosts = range(processes) if host is None else [host]
    offsets: dict[tuple[int, int], int] = {}
    for _ in states(run) if follow else [None]:
        attempt = run.attempts.last()
        for h in hosts:
            prefix = f"[host {h}] " if host is None else ""
            console.print_new_lines(run, attempt, h, offsets, prefix=prefix)


@click.command("list")
@root_option
def list_runs(root: str | None) -> None:
    """List all runs, the most recently launched first."""
    found = all_runs(root)
    if not found:
        console.echo(f"no runs in {' or '.join(roots_of(root))}")
    for run in found:
        try:
            plan, state, step = plan_of(run), state_of(run), run.hosts.report(0).get("step", 0)
        except UserError as e:  # of another user, or of another version: the others are listed all the same
            console.echo(f"{run.name:<24} {'unreadable':<12} {e}")
            continue
        console.echo(f"{run.name:<24} {state.status:<12} step {step}/{plan.steps:<10} {plan.cluster}")
        if state.costs:
            console.echo(f"{'':<24} {state.costs}")


@click.command()
@click.argument("name", required=False)
@root_option
def tensorboard(name: str | None, root: str | None) -> None:
    """Open TensorBoard for the run NAME, or for all runs beside the one launched last."""
    run = find_run(root, name)
    logdir = run.tensorboard() if name else (run.location.rpartition("/")[0] or ".")
    # In the place of this process, so that Ctrl-C ends TensorBoard itself.
    os.execvp(sys.executable, [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", logdir])
