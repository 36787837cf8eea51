"""`launch configure`: what a user sets once; and the questions of a first run, whose answers are kept there."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from configs.errors import UserError
from launcher.commands import console
from launcher.commands.arguments import load_recipe, root_of

if TYPE_CHECKING:
    from launcher.plan import ClusterSpec

EXAMPLES = {"root": "gs://my-bucket/runs", "data": "gs://my-bucket", "project": "my-project", "zone": "us-central2-b"}  # fmt: skip


@click.command()
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--unset", multiple=True, metavar="KEY", help="Forget a setting. Can be repeated.")
def configure(assignments: tuple[str, ...], unset: tuple[str, ...]) -> None:
    """Set your own defaults once: root, data, project, zone. Without arguments, show them."""
    from configs import settings

    found = settings.change(assignments, unset) if assignments or unset else settings.load()
    click.echo(f"# {settings.file()}")
    for key, value in found.model_dump().items():
        console.echo(f"{key:<12}{'not set' if value is None else value}")


def ask_for_missing(spec: "ClusterSpec", config: Path, overrides: tuple[str, ...], root: str | None) -> None:
    """In a terminal, ask for what a run on Cloud TPU needs and nothing gives, and keep the answers.

    Raises UserError where there is nobody to ask.
    """
    from configs import settings

    if not (missing := _missing(spec, config, overrides, root)):
        return
    if not sys.stdin.isatty():
        keys = " ".join(f"{key}={EXAMPLES[key]}" for key in missing)
        raise UserError(
            f"cluster {spec.name}: not given: {', '.join(missing)}; set it once, with your own values: `launch configure "
            f"{keys}`"
        )
    click.echo(f"A first run on {spec.name} needs to know, once (kept in {settings.file()}):")
    for key in missing:
        help_ = (settings.Settings.model_fields[key].description or "").replace("`", "")
        while True:
            value = click.prompt(f"{help_}\n{key}")
            try:
                settings.change((f"{key}={value}",))
                break
            except UserError as e:
                console.echo(f"error: {e}", err=True)


def _missing(spec: "ClusterSpec", config: Path, overrides: tuple[str, ...], root: str | None) -> list[str]:
    """Keys of the settings without which the run cannot be planned and created."""
    from configs.clusters import TpuCluster

    cluster = spec.submission
    if not isinstance(cluster, TpuCluster):
        return []
    from launcher.plan import relative_datasets
    from launcher.providers.cloud_tpu import NotGivenError, project_and_zone

    missing = [] if root_of(root, spec.backend).startswith("gs://") or root else ["root"]
    if any(not path.startswith(".") for path in relative_datasets(load_recipe(config, overrides)).values()):
        missing.append("data")
    for key, given in (("project", (cluster.project, "-")), ("zone", ("-", "".join(cluster.zones[:1])))):
        try:
            project_and_zone(*given)
        except NotGivenError:
            missing.append(key)
    return missing
