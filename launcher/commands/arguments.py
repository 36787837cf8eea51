"""Arguments that several commands share, and the plan that is made from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from launcher.plan import ClusterSpec, Plan

DEFAULT_ROOT = "runs"


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _check_root(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    if not value:
        raise UserError("--root '' is empty; give a folder, or gs://bucket/prefix")
    is_other_scheme = "://" in value and not value.startswith("gs://")
    if is_other_scheme or value.startswith("gs:///") or value.strip("/") == "gs:":
        raise UserError(f"--root {value}: must be a folder or gs://bucket/prefix")
    if value.startswith("gs://"):
        from configs.google import normalised

        try:
            return normalised(value)
        except ValueError as e:
            raise UserError(f"--root {value}: {e}") from None
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
    "--root", type=str, envvar="LAUNCH_ROOT", show_envvar=True, callback=_check_root,
    help="Where run directories are stored: a folder, or gs://bucket/prefix. Default: runs; on TPUs the root of `launch configure`.",
)  # fmt: skip


def root_of(root: str | None, backend: str) -> str:
    """`root`, or the default on such a backend."""
    from configs import settings

    return root or (settings.load().root if backend == "tpu" else None) or DEFAULT_ROOT


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
    settings: tuple[str, ...], tpu: str | None, keep: bool, name: str | None, root: str | None, max_restarts: int,
    *, ask: bool = False,
) -> "Plan":  # fmt: skip
    """The plan by `planning_arguments`; `ask` the user for what it lacks. Raises UserError."""
    from launcher.commands.configure import ask_for_missing

    spec = cluster_of(cluster, sbatch, settings, tpu, keep=keep)
    if ask:
        ask_for_missing(spec, config, overrides, root)
    return plan_on(spec, config, overrides, name, root, max_restarts)


def cluster_of(
    cluster: str | None, sbatch: tuple[str, ...], settings: tuple[str, ...], tpu: str | None, *, keep: bool
) -> "ClusterSpec":
    """The cluster by `planning_arguments`. Raises UserError."""
    from launcher import clusters

    if tpu is not None:
        settings += (f"tpu={json.dumps(tpu)}",)
    if keep:
        settings += ("keep=true",)
    if cluster is None and (sbatch or settings):
        option = f"--sbatch {sbatch[0]}" if sbatch else f"--set {settings[0]}"
        raise UserError(f"{option}: needs --cluster; see `launch clusters`")
    return clusters.default_cluster() if cluster is None else clusters.resolve(cluster, sbatch, settings)


def load_recipe(config: Path, overrides: tuple[str, ...]) -> "RunConfig":
    """The recipe with the user's overrides, and its datasets where the user's settings have them. Raises UserError."""
    from configs import settings
    from configs.load import load

    recipe, own = load(config, overrides), settings.load()
    splits = {
        name: split.model_copy(update={"path": own.dataset(split.path)})
        for name, split in (("train", recipe.data.train), ("eval", recipe.data.eval))
    }
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=splits)})


def plan_on(
    spec: "ClusterSpec",
    config: Path,
    overrides: tuple[str, ...],
    name: str | None,
    root: str | None,
    max_restarts: int,
) -> "Plan":
    """The plan of a recipe on the cluster `spec`. Raises UserError."""
    from launcher import plan
    from launcher.machine.provenance import provenance

    return plan.make_plan(
        load_recipe(config, overrides),
        spec,
        name=run_name(config, name),
        root=root_of(root, spec.backend),
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
