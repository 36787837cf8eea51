"""The plan of a run under gs:// with this machine's own settings, once its user agrees to what others may have written.

`launch` notes on this machine with which cluster it launches a run. What a machine executes or sends comes from that
note, from its own clusters.yaml or from the command line, and never from the bucket (docs/security.md).
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError
from launcher.commands import console
from launcher.commands.runs import is_remote, plan_of

if TYPE_CHECKING:
    from configs.clusters import TpuCluster
    from launcher.plan import Plan
    from launcher.rundir import RunDirectory


def own_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments of `own_plan`."""
    for option in (
        click.option("--yes", is_flag=True, help="Act on the plan of a run that another machine launched."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE",
            help="Your own ssh_options, ssh_key or secrets for the run's TPU VMs. Can be repeated.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def note_launch(plan: "Plan") -> None:
    """Keep on this machine with which cluster it launches a run. Raises UserError where that cannot be written."""
    from configs.files import write_atomically

    file = _note_file(plan)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(file, json.dumps(plan.submission, indent=2))
    except OSError as e:
        raise UserError(
            f"{file} cannot be written: {e.strerror}; set XDG_STATE_HOME to another folder"
        ) from None


def own_plan(run: "RunDirectory", settings: tuple[str, ...], *, yes: bool) -> "Plan":
    """The plan by which this machine may reach, create and delete hosts. Raises UserError."""
    from dataclasses import replace

    from configs.clusters import OWN_SETTINGS, TpuCluster
    from configs.load import with_settings

    plan = plan_of(run)
    if not is_remote(run):
        if settings:
            raise UserError(f"--set {settings[0]}: run {run.name} has no TPU VMs; leave it out")
        return plan
    assert plan.submission is not None
    for setting in settings:
        if setting.partition("=")[0] not in OWN_SETTINGS:
            allowed = ", ".join(OWN_SETTINGS)
            raise UserError(
                f"--set {setting}: of a run that exists, allowed: {allowed}; `launch` it for the others"
            )
    noted = _noted(plan)
    base = _cluster_here(plan) if noted is None else noted
    here = with_settings(base, settings, "--set", plan.cluster)
    own = {name: getattr(here, name) for name in OWN_SETTINGS}
    cluster = TpuCluster.model_validate(plan.submission).model_copy(update=own)
    if missing := [name for name in plan.own_settings if not own.get(name, True)]:
        console.echo(
            f"not used    {', '.join(missing)}: the run was launched with them elsewhere, and this machine has none for "
            f"cluster {plan.cluster}; set them with --set or in clusters.yaml"
        )
    plan = replace(plan, submission=cluster.model_dump(mode="json"))
    if noted is None or cluster != noted.model_copy(update=own):
        if not yes:
            _ask(cluster, run)
        note_launch(plan)
    return plan


def _ask(cluster: "TpuCluster", run: "RunDirectory") -> None:
    """Have the user agree to what the plan has this machine reach, and create anew where it is lost."""
    what = (
        f"the TPU {cluster.tpu}" if cluster.tpu else f"a tpu-{cluster.accelerator}, {cluster.provisioning},"
    )
    where = f"{what} in {' or '.join(cluster.zones)} of project {cluster.project}"
    if not sys.stdin.isatty():
        raise UserError(
            f"run {run.name} was not launched from this machine with its present plan, which is for {where}, and which "
            f"everyone who can write to {run.location} can change; if that is right, add --yes"
        )
    console.echo(f"elsewhere   the run was launched from another machine, on {where}")
    click.confirm("Go on with it from here?", abort=True)


def _cluster_here(plan: "Plan") -> "TpuCluster":
    """This machine's own entry for the run's cluster, or one without settings."""
    from configs.clusters import TpuCluster, named_clusters

    cluster = named_clusters().get(plan.cluster)
    assert plan.submission is not None
    return (
        cluster if isinstance(cluster, TpuCluster) else TpuCluster(accelerator=plan.submission["accelerator"])
    )


def _noted(plan: "Plan") -> "TpuCluster | None":
    """The cluster with which this machine launched the run last; None where it never did."""
    from pydantic import ValidationError

    from configs.clusters import TpuCluster

    try:
        return TpuCluster.model_validate_json(_note_file(plan).read_text())
    except (OSError, ValidationError):  # one of another version of podlaunch says nothing
        return None


def _note_file(plan: "Plan") -> Path:
    from launcher.rundir import run_id

    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return home / "podlaunch" / "runs" / f"{run_id(plan.run_directory)}.json"
