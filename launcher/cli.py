"""The `launch` command: parse, act, exit code. With console.py and data.py the only place that prints.

Heavy modules are imported where they are used: `launch --help` answers before pydantic would have loaded.
"""

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError
from configs.google import UnreachableError
from launcher import console
from launcher.data import check_datasets, data

if TYPE_CHECKING:
    from launcher.backends import Backend, Starter, State
    from launcher.clusters import ClusterSpec
    from launcher.plan import Plan
    from launcher.rundir import RunDirectory

DEFAULT_ROOT = "runs"
FOLLOW_SECONDS = 0.3
# A job may begin before the launcher that submitted it has written down that it did.
PATIENCE_SECONDS = 60.0
JOB_PROGRESS_SECONDS = 60.0


class Commands(click.Group):
    """`launch CONFIG` means `launch run CONFIG`; what the user must mend is one line and exit code 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            with _told():
                # Here already: the options of a mistyped command are not those of `run`.
                if not args[0].startswith("-"):
                    _recipe(args[0], list(self.commands))
                args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _told():
            return super().invoke(ctx)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (UserError, UnreachableError) as e:
        later = "; try again" if isinstance(e, UnreachableError) else ""
        for line in f"{e}{later}".splitlines():
            click.echo(f"error: {line}", err=True)
        raise click.exceptions.Exit(2) from None


def _recipe(word: str, commands: Sequence[str] = ()) -> str:
    """The file that `word` means."""
    from configs.recipes import find

    if word in main.commands:
        raise UserError(f"{word}: a command comes first, and its options behind it: launch {word} …")
    return str(find(word, commands))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="podlaunch", prog_name="launch")
def main() -> None:
    """Train a ResNet with JAX on whatever machines you have.

    \b
    launch configs/quickstart.yaml                    here and now, two processes
    launch --cluster local-4 CONFIG train.epochs=5    four processes, one setting changed
    launch --cluster slurm-4x8 CONFIG                 a SLURM job of 4 nodes with 8 GPUs each
    launch --cluster tpu-v4-32 CONFIG                 a Cloud TPU slice, created and deleted

    `run` may be left out.
    """


def _root(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--root",
        type=str,
        default=DEFAULT_ROOT,
        show_default=True,
        envvar="LAUNCH_ROOT",
        show_envvar=True,
        help="Where the run directories are: a folder, for TPUs gs://bucket/prefix.",
        callback=_check_root,
    )(command)


def _check_root(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not value:
        raise UserError("--root '' is empty; give a folder, or gs://bucket/prefix")
    if (
        ("://" in value and not value.startswith("gs://"))
        or value.startswith("gs:///")
        or value.strip("/") == "gs:"
    ):
        raise UserError(f"--root {value}: run directories are in a folder or under gs://bucket/prefix")
    if value.startswith("gs://"):
        bucket, *folders = filter(None, value.removeprefix("gs://").split("/"))  # one place has one name
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
            raise UserError(f"--root {value}: {bucket} is no name of a bucket; give gs://bucket/prefix")
        return "/".join([f"gs://{bucket}", *folders])
    return value


def _named_recipe(command: Callable[..., Any]) -> Callable[..., Any]:
    """A recipe, what is changed in it, and the run that it becomes."""
    command = click.option("--name", help="Name of the run. Default: the recipe's file name.")(_root(command))
    command = click.argument("overrides", nargs=-1, metavar="[section.key=value]...")(command)
    return click.argument("config", type=str, callback=lambda ctx, param, word: _recipe(word))(command)


def _planning(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments from which a plan is made."""
    command = click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=3,
        show_default=True,
        help="How often a failed attempt is tried again from the last checkpoint.",
    )(command)
    command = click.option("--keep", is_flag=True, help="Do not delete the TPUs when the run has ended.")(
        command
    )
    command = click.option("--tpu", metavar="NAME", help="An existing TPU, instead of creating one.")(command)
    command = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="A setting of the cluster, such as zone=us-central2-b, over what clusters.yaml says. As often as needed.",
    )(command)
    command = click.option(
        "--sbatch",
        multiple=True,
        metavar="OPTION=VALUE",
        help="An option of sbatch, such as partition=a100, over what the cluster says. As often as needed.",
    )(command)
    command = click.option(
        "--cluster", help="Where to run; see `launch clusters`. Default: this SLURM job, or this machine."
    )(command)
    return _named_recipe(command)


@main.command()
@_planning
@click.option("--dry-run", is_flag=True, help="Print the plan and the commands, and stop.")
@click.option(
    "--yes", is_flag=True, help="Do not ask before creating TPUs, or going on with changed settings."
)
@click.option("--detach", is_flag=True, help="Do not follow the job, or the workers once they have begun.")
@click.option("--requeue", is_flag=True, help="In a batch script: saved and not yet done, requeue the job.")
def run(
    config: str, overrides: tuple[str, ...], dry_run: bool, yes: bool, detach: bool, requeue: bool,
    **planning: Any,
) -> None:  # fmt: skip
    """Train CONFIG, or go on with it where it was left."""
    from launcher import backends
    from launcher.rundir import RunDirectory

    plan = _plan(config, overrides, **planning)
    backend = backends.get(plan.backend)
    if backend.REMOTE:
        plan = backends.remote(plan.backend).settle(plan)
    if requeue and (backend.ledger()["job"] is None or plan.submission is not None):
        raise UserError("--requeue belongs into the batch script of a SLURM job, without --cluster")
    if detach and plan.submission is None:
        raise UserError(f"--detach: cluster {plan.cluster} has no queue; its processes end with `launch`")
    if dry_run:
        console.print_plan(plan)
        click.echo(backend.render(plan))
        return
    directory = RunDirectory(plan.run_directory)
    _check_is_free(directory)
    changes = _check_can_continue(plan, directory)
    if _already_done(plan, directory):
        return
    if changes and backend.REMOTE and (state := _state(directory)).is_active:
        raise UserError(
            f"run {plan.name} is {state}, with other settings ({'; '.join(changes)}): go on with `launch attach "
            f"{plan.name}`, or end it first with `launch stop {plan.name}`"
        )
    if plan.config["data"]["source"] == "records" and plan.submission is None:
        check_datasets(plan.run_config())  # elsewhere they may be within reach of the hosts alone
    console.print_plan(plan)
    for change in changes:
        click.echo(f"changed     {change}")
    if changes and not yes and sys.stdin.isatty():
        click.confirm("Go on with this run?", default=True, abort=True)
    if plan.submission is None or backend.REMOTE:
        backend.check(plan)
        is_requeued = requeue and directory.job() == backend.ledger()["job"]
        begin = not is_requeued
        sys.exit(_train(plan, directory, backend, requeue=requeue, begin=begin, yes=yes, detach=detach))
    _submit(plan, directory)
    if not detach:
        sys.exit(_follow(plan, directory))


@main.command()
@_planning
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON, as a run would keep it.")
def plan(config: str, overrides: tuple[str, ...], as_json: bool, **planning: Any) -> None:
    """Show what `run` would do, and check all of it."""
    made = _plan(config, overrides, **planning)
    if as_json:
        click.echo(made.to_json())
    else:
        console.print_plan(made)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
def supervise(directory: Path) -> None:
    """Run what is planned in DIRECTORY, in this SLURM job; the last line of its script."""
    from launcher import backends
    from launcher.rundir import RunDirectory

    run_directory = RunDirectory(directory)
    if not directory.is_dir():
        raise UserError(
            f"run directory {directory} is not visible on {os.uname().nodename}: it must be on a file system that "
            "all nodes share; choose another place with --root"
        )
    with run_directory.locked(patience_seconds=PATIENCE_SECONDS):
        made = run_directory.plan()
    if made is None or made.submission is None:
        raise UserError(f"{directory} holds no plan for a SLURM job; see `launch --help`")
    backend = backends.get(made.backend)
    backend.check(made)
    sys.exit(_train(made, run_directory, backend, requeue=True, begin=False))


@main.command()
@_named_recipe
def worker(config: str, overrides: tuple[str, ...], name: str | None, root: str) -> None:
    """Be one process of a run: srun … launch worker CONFIG, or on each VM of a TPU slice."""
    from launcher import backends, clusters, metadata
    from launcher.backends import slurm
    from launcher.host import REFUSED, Host, exit_code
    from launcher.joined import Joined, JoinedHost
    from launcher.place import in_slurm_step
    from launcher.rundir import RunDirectory
    from launcher.vm import Vm

    place = in_slurm_step()
    vm = None if place else metadata.tpu_worker()
    if place is not None:
        directory = RunDirectory(Path(root).absolute() / _name(config, name))
        host: JoinedHost = Host(place, directory)
        process, spec, stopped_by = place.process, clusters.of_step(place), slurm.stopped_by_now
    elif vm is not None:
        if not root.startswith("gs://"):
            raise UserError(
                f"--root {root}: the VMs of a slice share no folder; give --root gs://bucket/prefix"
            )
        directory = RunDirectory(f"{root}/{_name(config, name)}")
        host = joining = Vm(vm, directory)
        process, spec, stopped_by = joining.process, clusters.of_vm(vm), lambda: "preempted"
    else:
        raise UserError(
            "launch worker: this is no task of a SLURM step and no TPU VM; type `launch CONFIG`, or srun before it"
        )
    if process:
        signal.signal(signal.SIGTERM, lambda *_: host.ask_to_stop())
        sys.exit(exit_code(host.wait()) if host.start() else 0)
    try:
        made = _plan_on(spec, config, overrides, name, root, max_restarts=0)
        if vm is not None and directory.plan() and (state := _state(directory)).is_active:
            raise UserError(f"run {made.name} is {state}; end it first with `launch stop {made.name}`")
        _check_can_continue(made, directory)
    except UserError:
        host.call_off(REFUSED)
        raise
    if _already_done(made, directory):
        host.call_off()
        return
    console.print_plan(made)
    starter = Joined(host, backends.get(made.backend).ledger(), stopped_by)
    sys.exit(_train(made, directory, starter, requeue=False, begin=True))


@main.command()
@click.argument("name", required=False)
@_root
def status(name: str | None, root: str) -> None:
    """How a run stands; without NAME, the one launched last."""
    run_directory = _find(root, name)
    made = _plan_of(run_directory)
    report = run_directory.report(0)
    click.echo(f"run         {run_directory.name} ({_state(run_directory)})")
    click.echo(f"directory   {run_directory.place}")
    if report:
        click.echo(f"progress    {console.progress_text(made, report)}")
        click.echo(f"last word   {time.time() - report['time']:.0f} s ago, {report.get('phase')}")
    steps = run_directory.checkpoint_steps()
    click.echo(f"checkpoints {', '.join(map(str, steps)) or 'none yet'}")
    for a in run_directory.attempts():
        job = (
            f", job {a['job']}" + f" requeued {a['restart_count']}×" * (a["restart_count"] > 0)
            if a.get("job")
            else ""
        )
        click.echo(
            f"attempt {a['attempt']:<4}{a['verdict']}, steps {a['from_step']} to {a['reached_step']} "
            f"in {console.duration(a['wall_seconds'])}{job}"
        )
        if a["failure"]:
            from launcher.supervise import describe

            click.echo(f"            {describe(a['failure'])}")


@main.command()
@click.argument("name", required=False)
@_root
def attach(name: str | None, root: str) -> None:
    """Follow a run that goes on elsewhere, and look after it where nobody does."""
    from launcher.rundir import Elsewhere

    run_directory = _find(root, name)
    made, backend = _plan_of(run_directory), _backend_of(run_directory)
    if _is_remote(run_directory) and _state(run_directory).is_active:
        with contextlib.suppress(Elsewhere):  # then somebody looks after it
            sys.exit(_train(made, run_directory, backend, requeue=False, begin=False))
    sys.exit(_follow(made, run_directory, again=False))


@main.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines are written, until the run ends.")
@click.option("--host", type=click.IntRange(min=0), help="Only this host.")
@_root
def logs(name: str | None, follow: bool, host: int | None, root: str) -> None:
    """Logs of the newest attempt, each line with its host."""
    run_directory = _find(root, name)
    made = _plan_of(run_directory)
    if host is not None and host >= made.processes:
        raise UserError(f"--host {host}: the run has hosts 0 to {made.processes - 1}")
    hosts = range(made.processes) if host is None else [host]
    offsets: dict[tuple[int, int], int] = {}
    for _ in _states(run_directory) if follow else [None]:
        attempt = run_directory.last_attempt()
        for h in hosts:
            console.print_new_lines(
                run_directory, attempt, h, offsets, prefix=f"[host {h}] " if host is None else ""
            )


@main.command()
@click.argument("name", required=False)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for the save.")
@_root
def stop(name: str | None, timeout: float, root: str) -> None:
    """Have a run save and end; one that waits in a queue leaves it."""
    from launcher import backends
    from launcher.rundir import Elsewhere
    from launcher.supervise import write_result

    run_directory = _find(root, name)
    made, state = _plan_of(run_directory), _state(run_directory)
    if not state.is_active:
        click.echo(f"run {run_directory.name} is not running ({state})")
        return
    run_directory.request_stop()  # should it begin meanwhile
    backend = _backend_of(run_directory)
    if _is_remote(run_directory):
        with contextlib.suppress(Elsewhere):  # then who looks after it ends it
            _train(made, run_directory, backend, requeue=False, begin=False)
    if state.word == "queued" and not backend.REMOTE:
        backends.queue_of(made.backend).cancel(run_directory)
        write_result(made, run_directory, "stopped")
    deadline = time.monotonic() + timeout
    for state in _states(run_directory):
        if state.is_active and time.monotonic() > deadline:
            raise UserError(
                f"run {run_directory.name} has not stopped within {timeout:g} s; see `launch status`"
            )
    click.echo(f"run {run_directory.name} is {state}")


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", type=click.IntRange(min=0), default=0, show_default=True)
@_root
def ssh(name: str, command: tuple[str, ...], host: int, root: str) -> None:
    """A shell on a TPU VM of a run, or a command there."""
    from launcher import backends

    run_directory = _find(root, name)
    made = _plan_of(run_directory)
    if not _is_remote(run_directory):
        raise UserError(
            f"run {name} is on cluster {made.cluster}, whose hosts podlaunch does not reach by ssh"
        )
    if host >= made.hosts:
        raise UserError(f"--host {host}: the run has hosts 0 to {made.hosts - 1}")
    sys.exit(backends.remote(made.backend).shell(made, run_directory, host, command))


@main.command()
@click.argument("names", nargs=-1)
@click.option("--project", help="Google Cloud project. Default: as gcloud has it.")
@click.option("--delete", "delete", is_flag=True, help="Delete NAMES, or all of yours whose run is over.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def gc(names: tuple[str, ...], project: str | None, delete: bool, yes: bool) -> None:
    """TPUs that podlaunch has created and that are still there, with their age and cost."""
    from launcher.backends import tpu

    found = tpu.left(project)
    unknown = set(names) - {f.name for f in found}
    if unknown:
        raise UserError(
            f"{', '.join(sorted(unknown))}: not among what podlaunch created here; see `launch gc`"
        )
    chosen = [f for f in found if not names or f.name in names]
    if not chosen:
        click.echo("nothing that podlaunch created is left")
    for f in chosen:
        click.echo(f"{f.name:<40} {f.zone:<16} {f.accelerator_type:<14} {tpu.describe(f)}")
        click.echo(f"{'':<40} {f.description}")
    if not delete:
        return
    doomed = [f for f in chosen if names or tpu.may_be_deleted(f)]
    for f in chosen:
        if f not in doomed:
            click.echo(f"left        {f.name}: it is in use, or not yours; name it to delete it all the same")
    if doomed and not yes:
        if not sys.stdin.isatty():
            raise UserError("--delete asks first, and there is nobody to ask; say --yes")
        click.confirm(f"Delete {', '.join(f.name for f in doomed)}?", abort=True)
    for f in doomed:
        tpu.delete(project, f)
        click.echo(f"deleted     {f.name}")


@main.command("list")
@_root
def list_runs(root: str) -> None:
    """All runs, the one launched last first."""
    from launcher.rundir import runs

    found = runs(root)
    if not found:
        click.echo(f"no runs in {root}")
    for run_directory in found:
        made, report = _plan_of(run_directory), run_directory.report(0)
        step = report.get("step", 0)
        click.echo(
            f"{run_directory.name:<24} {_state(run_directory).word:<12} step {step}/{made.steps:<10} {made.cluster}"
        )


@main.command()
@click.argument("kind", required=False)
def clusters(kind: str | None) -> None:
    """The clusters that --cluster knows; with KIND = tpu, the slices of Cloud TPUs."""
    from configs.clusters import named
    from launcher.accelerators import GENERATIONS, tpu_slice
    from launcher.clusters import KINDS, default, of_cluster

    if kind == "tpu":
        row = "{:<17} {:<9} {:>6} {:>5} {:>12} {:>12}   {}".format
        click.echo(row("--cluster", "topology", "chips", "VMs", "GiB a chip", "JAX devices", "runtime"))
        for generation in GENERATIONS.values():
            for size in generation.sizes:
                one, name = tpu_slice(generation, size), f"tpu-{generation.name}-{size}"
                hbm, devices = generation.hbm_gib, one.vms * one.devices_per_vm
                click.echo(row(name, one.topology, one.chips, one.vms, hbm, devices, generation.runtime))
        in_cores = ", ".join(g.name for g in GENERATIONS.values() if g.counts == "cores")
        click.echo(f"A size counts cores, two a chip, on {in_cores}, and chips on the others.")
        click.echo("A topology may stand for it, as in tpu-v4-2x2x4; xN behind either is N slices.")
        return
    if kind is not None:
        raise UserError(f"clusters {kind}: allowed: tpu, or nothing")
    for pattern, meaning in KINDS.items():
        click.echo(f"{pattern:<12} {meaning}")
    for name, cluster in named().items():
        spec = of_cluster(name, cluster)
        hosts = "VMs" if spec.backend == "tpu" else "nodes"
        click.echo(
            f"{name:<12} {spec.processes} × {spec.devices_per_process} {spec.platform} on {spec.hosts} {hosts}"
        )
    try:
        spec = default()
        click.echo(
            f"{'default':<12} {spec.name}: {spec.processes} × {spec.devices_per_process} {spec.platform}"
        )
    except UserError as e:
        click.echo(f"{'default':<12} none: {e}")


@main.command()
@click.argument("name", required=False)
@_root
def tensorboard(name: str | None, root: str) -> None:
    """Open TensorBoard on one run, or on all of --root."""
    run_directory = _find(root, name)
    logdir = root if name is None else run_directory.tensorboard()
    os.execvp(sys.executable, [sys.executable, "-m", "tensorboard.main", "--logdir", logdir])


@main.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
def schema(file: Path | None) -> None:
    """JSON schema of recipes, for editors."""
    from configs.schema import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if file is None:
        click.echo(text, nl=False)
    else:
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as e:
            raise UserError(f"{file} cannot be written: {e.strerror}") from None


main.add_command(data)


# From arguments to a plan


def _plan(
    config: str, overrides: tuple[str, ...], cluster: str | None, sbatch: tuple[str, ...],
    settings: tuple[str, ...], tpu: str | None, keep: bool, name: str | None, root: str, max_restarts: int,
) -> "Plan":  # fmt: skip
    from launcher import clusters

    if tpu is not None:
        settings += (f"tpu={json.dumps(tpu)}",)
    if keep:
        settings += ("keep=true",)
    if cluster is None and (sbatch or settings):
        option = f"--sbatch {sbatch[0]}" if sbatch else f"--set {settings[0]}"
        raise UserError(f"{option}: without --cluster nothing is submitted; see `launch clusters`")
    spec = clusters.default() if cluster is None else clusters.resolve(cluster, sbatch, settings)
    return _plan_on(spec, config, overrides, name, root, max_restarts)


def _plan_on(
    spec: "ClusterSpec",
    config: str,
    overrides: tuple[str, ...],
    name: str | None,
    root: str,
    max_restarts: int,
) -> "Plan":
    from configs.load import load
    from launcher.plan import make_plan
    from launcher.provenance import provenance

    path = Path(config)
    return make_plan(
        load(path, overrides),
        spec,
        name=_name(config, name),
        root=root,
        config_file=path,
        provenance=provenance(),
        max_restarts=max_restarts,
    )


def _name(config: str, name: str | None) -> str:
    from launcher.rundir import check_name

    if name is None:
        return check_name(Path(config).stem, "the recipe's file name; give another with --name")
    return check_name(name)


def _check_is_free(directory: "RunDirectory") -> None:
    """Raises UserError where a job has the run already. One on this machine holds its lock."""
    if directory.plan() is None:
        return
    state = _state(directory)
    if directory.job() != _backend_of(directory).ledger()["job"] and state.is_active:
        raise UserError(
            f"run {directory.name} is {state.word} in job {directory.job()}: follow it with `launch attach "
            f"{directory.name}`, end it with `launch stop {directory.name}`, or begin another with --name"
        )


def _check_can_continue(plan: "Plan", directory: "RunDirectory") -> list[str]:
    """What changed in where and how long the run goes on. Raises UserError where it cannot."""
    from launcher.plan import differences

    old = directory.plan()
    if old is None and directory.is_strange():
        raise UserError(f"{directory.place} is not empty and holds no run; choose another --name or --root")
    changed, steps = differences(old, plan) if old else [], _checkpoints_to_continue(old, plan, directory)
    if changed and steps:  # before the first checkpoint there is nothing to go on with
        raise UserError(
            f"run {plan.name} was started with other settings ({'; '.join(changed)}): "
            f"undo them to resume, or begin another run with --name"
        )
    if steps and steps[-1] > plan.steps:
        raise UserError(
            f"run {plan.name} is at step {steps[-1]} already, past train.steps = {plan.steps}; "
            f"train longer, or begin another run with --name"
        )
    if old is None:
        return []
    then = {"cluster": old.cluster, "mesh": old.mesh, "steps": old.steps}
    now = {"cluster": plan.cluster, "mesh": plan.mesh, "steps": plan.steps}
    for key in ("project", "zone", "tpu"):  # where its hosts may still be
        then[key], now[key] = ((p.submission or {}).get(key) for p in (old, plan))
    return changed + [f"{key}: {then[key]}, now {now[key]}" for key in then if then[key] != now[key]]


def _checkpoints_to_continue(old: "Plan | None", plan: "Plan", directory: "RunDirectory") -> list[int]:
    """Steps of the checkpoints. Raises UserError where a changed place would have the run begin anew."""
    steps = directory.checkpoint_steps(plan)
    before, now = directory.checkpoints(old or plan), directory.checkpoints(plan)
    if before != now:
        kept = directory.checkpoint_steps(old)
        if kept and (not steps or steps[-1] < kept[-1]):
            there = f"only up to step {steps[-1]}" if steps else "none"
            raise UserError(
                f"run {plan.name} has checkpoints up to step {kept[-1]} in {before}, and {there} in {now}: "
                "copy them there, or undo the change of checkpoint.directory"
            )
    return steps


def _already_done(plan: "Plan", directory: "RunDirectory") -> bool:
    result = directory.result()
    if result is None or result["status"] != "completed" or result["step"] < plan.steps:
        return False
    click.echo(f"run {plan.name} is complete; begin another with --name, or train longer with train.epochs=…")
    console.print_result(plan, directory, result)
    return True


def _find(root: str, name: str | None) -> "RunDirectory":
    from configs.load import nearest
    from launcher.rundir import runs

    found = runs(root)
    if not found:
        raise UserError(f"no runs in {root}; give the --root that `launch` was given")
    if name is None:
        return found[0]
    for run_directory in found:
        if run_directory.name == name:
            return run_directory
    names = [r.name for r in found]
    raise UserError(f"no run {name!r} in {root}{nearest(name, names)} (there are: {', '.join(names)})")


def _plan_of(directory: "RunDirectory") -> "Plan":
    made = directory.plan()
    assert made is not None
    return made


def _backend_of(directory: "RunDirectory") -> "Backend":
    from launcher import backends

    return backends.get(_plan_of(directory).backend)


def _is_remote(directory: "RunDirectory") -> bool:
    """Whether `launch` reaches its hosts; those of `launch worker` it does not."""
    return _backend_of(directory).REMOTE and _plan_of(directory).submission is not None


def _state(directory: "RunDirectory") -> "State":
    return _backend_of(directory).state(directory)


def _states(directory: "RunDirectory") -> Iterator["State"]:
    """How the run stands, some times a second, to its end.

    A scheduler is asked rarely: when the run directory has news, or while process 0 says nothing.
    """
    backend = _backend_of(directory)
    due, news, word = -math.inf, None, None
    while True:
        newest, newest_word = (directory.last_attempt(), directory.result()), directory.report(0).get("time")
        ask = newest != news or time.monotonic() >= due
        if ask:
            state = backend.state(directory)
        if ask or newest_word != word:
            due = time.monotonic() + backend.ASK_SECONDS
        news, word = newest, newest_word
        yield state
        if not state.is_active:
            return
        time.sleep(FOLLOW_SECONDS)


# Running, here or elsewhere


def _train(
    plan: "Plan", directory: "RunDirectory", starter: "Starter", *, requeue: bool, begin: bool, yes: bool = False,
    detach: bool = False,
) -> int:  # fmt: skip
    """Supervise the run from here; its exit code. `begin`: this is a new launch, not the next job of one.

    `detach`: only until the workers have begun.
    """
    from launcher import backends
    from launcher.rundir import Elsewhere
    from launcher.supervise import EXIT_DONE, EXIT_SAVED, Wishes, exit_code, supervise

    job = starter.ledger()["job"]
    if starter.REMOTE and directory.is_running():
        click.echo("waiting     to see whether the launcher that had this run is still there")
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory.locked())
        if starter.REMOTE and not begin and directory.result() is not None:
            raise Elsewhere(f"run {plan.name} has ended meanwhile")
        directory.claim_checkpoints(plan)
        if starter.REMOTE and begin:
            _acquire(plan, directory, yes=yes)
        wishes = stack.enter_context(_signals(Wishes(outlived=starter.REMOTE)))
        seconds = JOB_PROGRESS_SECONDS if requeue else console.PROGRESS_SECONDS
        progress = stack.enter_context(console.Progress(plan, seconds))
        directory.create(plan)
        if begin:
            directory.begin(job)
        else:
            directory.write_job(job)

        detached = False

        def watch(attempt: int, report: dict[str, Any]) -> None:
            progress.watch(attempt, report)
            nonlocal detached
            detached = detach and "pid" in report  # a worker's own word
            wishes.leave = wishes.leave or detached

        result = supervise(plan, directory, starter, wishes=wishes, watch=watch, announce=progress.line)
        if result is None:
            why = "another launcher has taken it over" if directory.is_lost() else "what it has stays there"
            progress.line(f"left        {why}; `launch attach {plan.name}` goes on with it")
            return EXIT_DONE if detached else EXIT_SAVED
        if starter.REMOTE:
            progress.line("deleting what was created")
            progress.line(backends.remote(plan.backend).release(plan, directory))
    console.print_result(plan, directory, result, again=begin and not requeue)
    code = exit_code(result)
    if requeue and code == EXIT_SAVED:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a requeue sends to all of the job
        console.say(backends.queue_of(plan.backend).go_on_later(plan, directory))
    elif requeue:
        backends.queue_of(plan.backend).stay_ended()
    return code


def _acquire(plan: "Plan", directory: "RunDirectory", *, yes: bool) -> None:
    """Have the hosts created, if they are not there, with the user's consent. Raises UserError; then nothing is."""
    from launcher import backends

    remote = backends.remote(plan.backend)
    offer = remote.offer(plan, directory)
    if offer is not None:
        click.echo(f"to create   {offer}")
        if not yes:
            if not sys.stdin.isatty():
                raise UserError(
                    "what is to be created costs money, and nothing was created; say --yes to create it"
                )
            click.confirm("Create it?", abort=True)
    remote.acquire(plan, directory)


def _submit(plan: "Plan", directory: "RunDirectory") -> None:
    from launcher import backends

    with directory.undone_if_refused(), directory.locked():
        _check_is_free(directory)  # once more: another launch may have submitted it meanwhile
        directory.claim_checkpoints(plan)
        directory.exclude_nodes([])
        job = backends.queue_of(plan.backend).submit(plan, directory)
        directory.create(plan)
        directory.begin(job)
    click.echo(f"job         {job}")


def _follow(plan: "Plan", directory: "RunDirectory", *, again: bool = True) -> int:
    """Show how a job does until it ends; its exit code. Ctrl-C leaves it running."""
    from launcher.supervise import EXIT_CODES, EXIT_STOPPED, describe, exit_code

    begun, told, shown = time.time(), len(directory.attempts()), ""
    try:
        with console.Progress(plan) as progress:
            for state in _states(directory):
                for attempt in directory.attempts()[told:]:
                    told += 1
                    if attempt["failure"]:
                        progress.line(describe(attempt["failure"]))
                if state.is_active and str(state) != shown:
                    progress.line(str(state))
                    shown = str(state)
                report = directory.report(0)
                if state.word == "running" and report.get("time", 0) > begun:
                    progress.watch(directory.last_attempt(), report)
    except KeyboardInterrupt:
        where = f", in job {directory.job()}" if directory.job() else ""
        click.echo(
            f"\nleft running{where}: `launch attach {plan.name}` follows it, "
            f"`launch stop {plan.name}` has it save and end"
        )
        return EXIT_STOPPED
    result = directory.result()
    if result is None or result["status"] != state.word:
        click.echo(f"run {plan.name} is {state}; see {directory.place}/logs, and `launch` again to resume")
        return EXIT_CODES.get(state.word, EXIT_CODES["failed"])
    console.print_result(plan, directory, result, again=again)
    return exit_code(result)


@contextlib.contextmanager
def _signals(wishes: Any) -> Iterator[Any]:
    """Ctrl-C and SIGTERM become wishes while a run is supervised."""
    signals = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if wishes.outlived else [])]
    before = {s: signal.signal(s, wishes.interrupted) for s in signals}
    try:
        yield wishes
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    main()
