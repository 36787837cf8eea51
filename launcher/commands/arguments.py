"""Arguments that several commands share, and the plan that is made from them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError

if TYPE_CHECKING:
    from launcher.plan import ClusterSpec, Plan

DEFAULT_ROOT = "runs"


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _check_root(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not value:
        raise UserError("--root '' is empty; give a folder, or gs://bucket/prefix")
    is_other_scheme = "://" in value and not value.startswith("gs://")
    if is_other_scheme or value.startswith("gs:///") or value.strip("/") == "gs:":
        raise UserError(f"--root {value}: must be a folder or gs://bucket/prefix")
    if value.startswith("gs://"):
        # Written in one way only: the id of a run is a digest of its location.
        bucket, *folders = filter(None, value.removeprefix("gs://").split("/"))
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
            raise UserError(f"--root {value}: {bucket} is not a valid bucket name; give gs://bucket/prefix")
        return "/".join([f"gs://{bucket}", *folders])
    return value


class Recipe(click.ParamType):
    """A recipe file, or the name of a recipe that comes with podlaunch; the value is its path."""

    name = "CONFIG"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from configs import recipes

        commands = getattr(ctx.find_root().command, "commands", {}) if ctx else {}
        if value in commands:
            raise UserError(f"{value}: a command must come before its options: launch {value} …")
        return recipes.find(value)


root_option = click.option(
    "--root", type=str, default=DEFAULT_ROOT, show_default=True, envvar="LAUNCH_ROOT", show_envvar=True,
    help="Where run directories are stored: a folder, or gs://bucket/prefix (required for TPUs).", callback=_check_root,
)  # fmt: skip


def _all(*decorators: Decorator) -> Decorator:
    """Several decorators as one; `--help` lists their options in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


recipe_arguments = _all(
    click.argument("config", type=Recipe()),
    click.argument("overrides", nargs=-1, metavar="[section.key=value]..."),
    click.option("--name", help="Name of the run. Default: the recipe's file name."),
    root_option,
)
"""A recipe, overrides of its settings, and name and root of the run."""

planning_arguments = _all(
    recipe_arguments,
    click.option(
        "--cluster", help="Cluster to run on; see `launch clusters`. Default: this SLURM job if there is one, otherwise this machine."
    ),
    click.option(
        "--sbatch", multiple=True, metavar="OPTION=VALUE",
        help="Add or override an option of sbatch, such as partition=a100. Can be repeated.",
    ),
    click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE",
        help="Override a setting of the cluster, such as zone=us-central2-b. Can be repeated.",
    ),
    click.option("--tpu", metavar="NAME", help="Use this existing TPU instead of creating one."),
    click.option("--keep", is_flag=True, help="Keep the TPUs after the run instead of deleting them."),
    click.option(
        "--max-restarts", type=click.IntRange(min=0), default=3, show_default=True,
        help="Number of times to retry a failed attempt from the last checkpoint.",
    ),
)  # fmt: skip
"""The arguments of `make_plan`."""


def make_plan(
    config: Path, overrides: tuple[str, ...], cluster: str | None, sbatch: tuple[str, ...],
    settings: tuple[str, ...], tpu: str | None, keep: bool, name: str | None, root: str, max_restarts: int,
) -> "Plan":  # fmt: skip
    """The plan by `planning_arguments`. Raises UserError."""
    from launcher import clusters

    if tpu is not None:
        settings += (f"tpu={json.dumps(tpu)}",)
    if keep:
        settings += ("keep=true",)
    if cluster is None and (sbatch or settings):
        option = f"--sbatch {sbatch[0]}" if sbatch else f"--set {settings[0]}"
        raise UserError(f"{option}: needs --cluster; see `launch clusters`")
    spec = clusters.default_cluster() if cluster is None else clusters.resolve(cluster, sbatch, settings)
    return plan_on(spec, config, overrides, name, root, max_restarts)


def plan_on(
    spec: "ClusterSpec",
    config: Path,
    overrides: tuple[str, ...],
    name: str | None,
    root: str,
    max_restarts: int,
) -> "Plan":
    """The plan of a recipe on the cluster `spec`. Raises UserError."""
    from configs.load import load
    from launcher import plan
    from launcher.machine.provenance import provenance

    return plan.make_plan(
        load(config, overrides),
        spec,
        name=run_name(config, name),
        root=root,
        config_file=config,
        provenance=provenance(),
        max_restarts=max_restarts,
    )


def run_name(config: Path, name: str | None) -> str:
    """`name`, or that of the recipe. Raises UserError where a run cannot have it."""
    from launcher.rundir import check_name

    if name is None:
        return check_name(config.stem, "the recipe's file name; give another with --name")
    return check_name(name)
