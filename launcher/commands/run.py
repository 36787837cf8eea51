"""`launch run` and `launch plan`: from a recipe to a run, or to its plan."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError
from launcher.commands import console, execution
from launcher.commands.arguments import make_plan, planning_arguments
from launcher.commands.data import check_datasets
from launcher.commands.runs import check_can_resume, check_not_in_another_job, is_complete, state_of
from launcher.commands.trust import note_launch

if TYPE_CHECKING:
    from launcher.plan import Plan


@click.command()
@planning_arguments
@click.option("--dry-run", is_flag=True, help="Print the plan and the commands, and stop.")
@click.option(
    "--yes",
    is_flag=True,
    help="Do not ask for confirmation before creating TPUs or resuming with changed settings.",
)
@click.option(
    "--detach",
    is_flag=True,
    help="Return after submitting the job or, on TPUs, after the workers have started.",
)
@click.option(
    "--requeue",
    is_flag=True,
    help="In a batch script: requeue the job if the run has saved but is not finished.",
)
def run(
    config: Path, overrides: tuple[str, ...], dry_run: bool, yes: bool, detach: bool, requeue: bool,
    **planning: Any,
) -> None:  # fmt: skip
    """Train CONFIG, or resume it from its last checkpoint."""
    from launcher import backends
    from launcher.rundir import RunDirectory

    plan = make_plan(config, overrides, **planning, ask=True)
    backend = backends.get(plan.backend)
    if backend.REMOTE:
        plan = backends.get_remote(plan.backend).resolve(plan)
    if requeue and (backend.job_info()["job"] is None or plan.submission is not None):
        raise UserError("--requeue only works in the batch script of a SLURM job, without --cluster")
    if detach and plan.submission is None:
        raise UserError(
            f"--detach: cluster {plan.cluster} has no queue, and its processes end when `launch` ends; leave out --detach"
        )
    if dry_run:
        console.print_plan(plan)
        _print_price(plan)
        click.echo(backend.render(plan))
        return
    directory = RunDirectory(plan.run_directory)
    check_not_in_another_job(directory)
    changes = check_can_resume(plan, directory)
    if is_complete(plan, directory):
        sys.exit(execution.clean_up(plan, directory))
    if changes and backend.REMOTE and (state := state_of(directory)).is_active:
        raise UserError(
            f"run {plan.name} is {state}, and was launched with other settings ({'; '.join(changes)}): go on with `launch attach "
            f"{plan.name}`, or end it first with `launch stop {plan.name}`"
        )
    check_datasets(plan.run_config(), is_read_here=plan.submission is None)
    console.print_plan(plan)
    for change in changes:
        console.echo(f"changed     {change}")
    if changes and not yes and sys.stdin.isatty():
        click.confirm("Resume this run?", default=True, abort=True)
    if plan.submission is None or backend.REMOTE:
        backend.check(plan)
        if backend.REMOTE:
            note_launch(plan)
        begin = not (requeue and directory.job.id() == backend.job_info()["job"])
        code = execution.train(plan, directory, backend, requeue=requeue, begin=begin, yes=yes, detach=detach)
        sys.exit(code)
    execution.submit(plan, directory)
    if not detach:
        sys.exit(execution.follow(plan, directory))


@click.command("plan")
@planning_arguments
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the plan as JSON, as plan.json of the run would contain it.",
)
def show_plan(config: Path, overrides: tuple[str, ...], as_json: bool, **planning: Any) -> None:
    """Show what `run` would do, and check that it is possible."""
    plan = make_plan(config, overrides, **planning)
    if as_json:
        click.echo(plan.to_json())
    else:
        check_datasets(plan.run_config(), is_read_here=False)
        console.print_plan(plan)
        _print_price(plan)


def _print_price(plan: "Plan") -> None:
    """Of hosts that cost money. `run` shows it where it asks whether to create them."""
    from launcher import backends

    if backends.get(plan.backend).REMOTE and plan.submission is not None:
        console.echo(f"price       {backends.get_remote(plan.backend).estimate(plan)}")
