"""The `launch` command: finds the command in what was typed, and shows the user's mistakes in one line each."""

import contextlib
from collections.abc import Iterator
from typing import Any

import click

from configs.errors import UserError
from configs.google import UnreachableError
from launcher.commands import configure, console, data, hosts, look, reference, run, stop, tpu


class Commands(click.Group):
    """`launch CONFIG` means `launch run CONFIG`; a mistake of the user is one line and exit code 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            with _shown_errors():
                # Checked before the options are parsed: those of a mistyped command are not options of `run`.
                if not args[0].startswith("-"):
                    from configs import recipes

                    recipes.find(args[0], list(self.commands))
                args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _shown_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def _shown_errors() -> Iterator[None]:
    try:
        yield
    except (UserError, UnreachableError) as e:
        later = "; try again" if isinstance(e, UnreachableError) else ""
        for line in f"{e}{later}".splitlines():
            console.echo(f"error: {line}", err=True)
        raise click.exceptions.Exit(2) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="podlaunch", prog_name="launch")
def main() -> None:
    """Train a ResNet with JAX on whatever machines you have.

    \b
    launch quickstart                                 on this machine, two processes
    launch --cluster local-4 CONFIG train.epochs=5    four processes, one setting changed
    launch --cluster slurm-4x8 CONFIG                 a SLURM job of 4 nodes with 8 GPUs each
    launch --cluster tpu-v4-32 CONFIG                 a Cloud TPU slice, created and deleted

    The word `run` is optional. CONFIG is a recipe file, or the name of a recipe that comes with podlaunch.
    """


for command in (
    *(run.run, run.show_plan, hosts.supervise, hosts.worker),
    *(look.status, look.attach, look.logs, look.list_runs, look.tensorboard),
    *(stop.stop, tpu.ssh, tpu.gc, reference.clusters, reference.schema, configure.configure, data.data),
):
    main.add_command(command)
