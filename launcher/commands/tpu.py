"""Commands for Cloud TPU: a shell on a VM, and what was created and still exists."""

import sys

import click

from configs.errors import UserError
from launcher.commands import console, execution
from launcher.commands.arguments import root_option
from launcher.commands.runs import find_run, is_remote, plan_of
from launcher.commands.trust import own_options, own_plan


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", type=click.IntRange(min=0), default=0, show_default=True, help="Host to connect to.")
@own_options
@root_option
def ssh(
    name: str, command: tuple[str, ...], host: int, settings: tuple[str, ...], yes: bool, root: str | None
) -> None:
    """Open a shell on a TPU VM of a run, or run COMMAND there."""
    from launcher import backends

    run = find_run(root, name)
    plan = plan_of(run)
    if not is_remote(run):
        raise UserError(f"run {name} is on cluster {plan.cluster}, whose hosts are not reached by ssh")
    if host >= plan.hosts:
        raise UserError(f"--host {host}: the run has hosts 0 to {plan.hosts - 1}")
    sys.exit(backends.get_remote(plan.backend).shell(own_plan(run, settings, yes=yes), run, host, command))


@click.command()
@click.argument("names", nargs=-1)
@click.option("--project", help="Google Cloud project. Default: gcloud's project.")
@click.option(
    "--delete",
    "delete",
    is_flag=True,
    help="Delete NAMES; without NAMES, all TPUs that you created and whose run has ended.",
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def gc(names: tuple[str, ...], project: str | None, delete: bool, yes: bool) -> None:
    """List, and with --delete delete, the TPUs that podlaunch created, with their age and cost."""
    from launcher.backends import tpu

    leftovers = tpu.leftovers(project)
    unknown = set(names) - {resource.name for resource in leftovers}
    if unknown:
        listed = ", ".join(sorted(unknown))
        raise UserError(f"{listed}: not a TPU that podlaunch created in this project; see `launch gc`")
    chosen = [resource for resource in leftovers if not names or resource.name in names]
    if not chosen:
        console.echo("no TPUs that podlaunch created exist")
    for resource in chosen:
        kind = resource.accelerator_type
        console.echo(f"{resource.name:<40} {resource.zone:<16} {kind:<14} {tpu.describe(resource)}")
        console.echo(f"{'':<40} {resource.description}")
    if not delete:
        return
    to_delete = [resource for resource in chosen if names or tpu.may_be_deleted(resource)]
    for resource in chosen:
        if resource not in to_delete:
            left = f"left        {resource.name}"
            console.echo(f"{left}: in use, or created by another user; give its name to delete it anyway")
    if to_delete and not yes:
        if not sys.stdin.isatty():
            raise UserError(
                "--delete asks for confirmation, and standard input is not a terminal; add --yes to delete without asking"
            )
        click.confirm(f"Delete {', '.join(resource.name for resource in to_delete)}?", abort=True)
    if not execution.delete_all(project, to_delete):
        sys.exit(1)
