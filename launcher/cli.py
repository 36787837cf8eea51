"""The `launch` command: parse, act, exit code. With console.py and data.py the only place that prints.

Heavy modules are imported where they are used: `launch --help` answers before pydantic would have loaded.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError
from launcher import console
from launcher.data import check_datasets, data

if TYPE_CHECKING:
    from launcher.backends import Backend, Starter, State
    from launcher.clusters import ClusterSpec
    from launcher.plan import Plan
    from launcher.rundir import RunDirectory

DEFAULT_ROOT = Path("runs")
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
                    _check_is_recipe(args[0])
                args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _told():
            return super().invoke(ctx)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except UserError as e:
        for line in str(e).splitlines():
            click.echo(f"error: {line}", err=True)
        raise click.exceptions.Exit(2) from None


def _check_is_recipe(word: str) -> None:
    if Path(word).suffix in (".yaml", ".yml") or os.path.exists(word):
        return
    if word in main.commands:
        raise UserError(f"{word}: a command comes first, and its options behind it: launch {word} …")
    from configs.load import nearest

    recipe = Path("configs") / f"{word}.yaml"
    hint = f'; did you mean "{recipe}"?' if recipe.exists() else nearest(word, list(main.commands))
    raise UserError(f"{word}: neither a command nor a recipe file{hint} (see `launch --help`)")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="podlaunch", prog_name="launch")
def main() -> None:
    """Train a ResNet with JAX on whatever machines you have.

    \b
    launch configs/quickstart.yaml                    here and now, two processes
    launch --cluster local-4 CONFIG train.epochs=5    four processes, one setting changed
    launch --cluster slurm-4x8 CONFIG                 a SLURM job of 4 nodes with 8 GPUs each

    `run` may be left out.
    """


def _root(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--root",
        type=str,
        default=str(DEFAULT_ROOT),
        show_default=True,
        help="Folder of the run directories.",
        callback=_local_root,
    )(command)


def _local_root(ctx: click.Context, param: click.Parameter, value: str) -> Path:
    if not value:
        raise UserError("--root '' is empty; give a folder")
    if "://" in value:
        raise UserError(
            f"--root {value}: a run directory is a local folder; checkpoints and event files can go to a bucket, "
            "with checkpoint.directory=gs://… and log.tensorboard=gs://…"
        )
    return Path(value)


def _named_recipe(command: Callable[..., Any]) -> Callable[..., Any]:
    """A recipe, what is changed in it, and the run that it becomes."""
    command = click.option("--name", help="Name of the run. Default: the recipe's file name.")(_root(command))
    command = click.argument("overrides", nargs=-1, metavar="[section.key=value]...")(command)
    return click.argument("config", type=str)(command)


def _planning(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments from which a plan is made."""
    command = click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=3,
        show_default=True,
        help="How often a failed attempt is tried again from the last checkpoint.",
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
@click.option("--yes", is_flag=True, help="Do not ask before going on with changed settings.")
@click.option("--detach", is_flag=True, help="Submit the job, and do not follow it.")
@click.option("--requeue", is_flag=True, help="In a batch script: saved and not yet done, requeue the job.")
def run(
    config: str, overrides: tuple[str, ...], cluster: str | None, sbatch: tuple[str, ...], name: str | None,
    root: Path, max_restarts: int, dry_run: bool, yes: bool, detach: bool, requeue: bool,
) -> None:  # fmt: skip
    """Train CONFIG, or go on with it where it was left."""
    from launcher import backends
    from launcher.rundir import RunDirectory

    plan = _plan(config, overrides, cluster, sbatch, name, root, max_restarts)
    backend = backends.get(plan.backend)
    directory = RunDirectory(Path(plan.run_directory))
    if requeue and (backend.ledger()["job"] is None or plan.submission is not None):
        raise UserError("--requeue belongs into the batch script of a SLURM job, without --cluster")
    if detach and plan.submission is None:
        raise UserError(f"--detach: cluster {plan.cluster} has no queue; its processes end with `launch`")
    if dry_run:
        console.print_plan(plan)
        click.echo(backend.render(plan))
        return
    _check_is_free(directory)
    changes = _check_can_continue(plan, directory)
    if _already_done(plan, directory):
        return
    if plan.config["data"]["source"] == "records" and plan.submission is None:
        check_datasets(plan.run_config())  # elsewhere they may be within reach of the hosts alone
    console.print_plan(plan)
    for change in changes:
        click.echo(f"changed     {change}")
    if changes and not yes and sys.stdin.isatty():
        click.confirm("Go on with this run?", default=True, abort=True)
    if plan.submission is None:
        backend.check(plan)
        is_requeued = requeue and directory.job() == backend.ledger()["job"]
        sys.exit(_train(plan, directory, backend, requeue=requeue, begin=not is_requeued))
    _submit(plan, directory)
    if not detach:
        sys.exit(_follow(plan, directory))


@main.command()
@_planning
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON, as a run would keep it.")
def plan(
    config: str, overrides: tuple[str, ...], cluster: str | None, sbatch: tuple[str, ...], name: str | None,
    root: Path, max_restarts: int, as_json: bool,
) -> None:  # fmt: skip
    """Show what `run` would do, and check all of it."""
    made = _plan(config, overrides, cluster, sbatch, name, root, max_restarts)
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
def worker(config: str, overrides: tuple[str, ...], name: str | None, root: Path) -> None:
    """Be one task of a SLURM step: srun … launch worker CONFIG."""
    from launcher import clusters
    from launcher.backends.slurm import InStep
    from launcher.host import Host, exit_code
    from launcher.place import in_slurm_step
    from launcher.rundir import RunDirectory

    place = in_slurm_step()
    if place is None:
        raise UserError(
            "launch worker: this is no task of a SLURM step; type `launch CONFIG`, or srun before it"
        )
    directory = RunDirectory(root.absolute() / _name(config, name))
    host = Host(place, directory)
    if place.process:
        signal.signal(signal.SIGTERM, lambda *_: host.ask_to_stop())
        sys.exit(exit_code(host.wait()) if host.start() else 0)
    made = _plan_on(clusters.of_step(place), config, overrides, name, root, max_restarts=0)
    _check_can_continue(made, directory)
    if _already_done(made, directory):
        host.call_off()
        return
    console.print_plan(made)
    sys.exit(_train(made, directory, InStep(host), requeue=False, begin=True))


@main.command()
@click.argument("name", required=False)
@_root
def status(name: str | None, root: Path) -> None:
    """How a run stands; without NAME, the one launched last."""
    run_directory = _find(root, name)
    made = _plan_of(run_directory)
    report = run_directory.report(0)
    click.echo(f"run         {run_directory.name} ({_state(run_directory)})")
    click.echo(f"directory   {run_directory.path}")
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
def attach(name: str | None, root: Path) -> None:
    """Follow a run that goes on in a SLURM job."""
    run_directory = _find(root, name)
    sys.exit(_follow(_plan_of(run_directory), run_directory, again=False))


@main.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines are written, until the run ends.")
@click.option("--host", type=click.IntRange(min=0), help="Only this host.")
@_root
def logs(name: str | None, follow: bool, host: int | None, root: Path) -> None:
    """Logs of the newest attempt, each line with its host."""
    run_directory = _find(root, name)
    made = _plan_of(run_directory)
    if host is not None and host >= made.processes:
        raise UserError(f"--host {host}: the run has hosts 0 to {made.processes - 1}")
    hosts = range(made.processes) if host is None else [host]
    offsets: dict[Path, int] = {}
    for _ in _states(run_directory) if follow else [None]:
        attempt = run_directory.last_attempt()
        for h in hosts:
            console.print_new_lines(
                run_directory.log(attempt, h), offsets, prefix=f"[host {h}] " if host is None else ""
            )


@main.command()
@click.argument("name", required=False)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for the save.")
@_root
def stop(name: str | None, timeout: float, root: Path) -> None:
    """Have a run save and end; one that waits in a queue leaves it."""
    from launcher import backends
    from launcher.supervise import write_result

    run_directory = _find(root, name)
    made, state = _plan_of(run_directory), _state(run_directory)
    if not state.is_active:
        click.echo(f"run {run_directory.name} is not running ({state})")
        return
    run_directory.request_stop()  # should it begin meanwhile
    if state.word == "queued":
        backends.queue_of(made.backend).cancel(run_directory)
        write_result(made, run_directory, "stopped")
    deadline = time.monotonic() + timeout
    for state in _states(run_directory):
        if state.is_active and time.monotonic() > deadline:
            raise UserError(
                f"run {run_directory.name} has not stopped within {timeout:g} s; see `launch status`"
            )
    click.echo(f"run {run_directory.name} is {state}")


@main.command("list")
@_root
def list_runs(root: Path) -> None:
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
def clusters() -> None:
    """The clusters that --cluster knows."""
    from configs.clusters import named
    from launcher.clusters import KINDS, default, slurm

    for kind, meaning in KINDS.items():
        click.echo(f"{kind:<12} {meaning}")
    for name, cluster in named().items():
        spec = slurm(name, cluster)
        click.echo(
            f"{name:<12} {spec.processes} × {spec.devices_per_process} {spec.platform} on {spec.hosts} nodes"
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
def tensorboard(name: str | None, root: Path) -> None:
    """Open TensorBoard on one run, or on all of --root."""
    run_directory = _find(root, name)
    logdir = str(root) if name is None else console.logdir(run_directory)
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
    config: str, overrides: tuple[str, ...], cluster: str | None, sbatch: tuple[str, ...], name: str | None,
    root: Path, max_restarts: int,
) -> "Plan":  # fmt: skip
    from launcher import clusters

    _check_is_recipe(config)
    if cluster is None and sbatch:
        raise UserError(
            f"--sbatch {sbatch[0]}: without --cluster nothing is submitted; see `launch clusters`"
        )
    spec = clusters.default() if cluster is None else clusters.resolve(cluster, sbatch)
    return _plan_on(spec, config, overrides, name, root, max_restarts)


def _plan_on(
    spec: "ClusterSpec",
    config: str,
    overrides: tuple[str, ...],
    name: str | None,
    root: Path,
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

    path = directory.path
    old = directory.plan()
    if old is None and path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir()):
        raise UserError(f"{path} is not empty and holds no run; choose another --name or --root")
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


def _find(root: Path, name: str | None) -> "RunDirectory":
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


def _train(plan: "Plan", directory: "RunDirectory", starter: "Starter", *, requeue: bool, begin: bool) -> int:
    """Supervise the run from here; its exit code. `begin`: this is a new launch, not the next job of one."""
    from launcher import backends
    from launcher.supervise import EXIT_SAVED, Wishes, exit_code, supervise

    job = starter.ledger()["job"]
    with (
        directory.locked(),
        _signals(Wishes()) as wishes,
        console.Progress(plan, JOB_PROGRESS_SECONDS if requeue else console.PROGRESS_SECONDS) as progress,
    ):
        directory.claim_checkpoints(plan)
        directory.create(plan)
        if begin:
            directory.begin(job)
        else:
            directory.write_job(job)
        result = supervise(
            plan, directory, starter, wishes=wishes, watch=progress.watch, announce=progress.line
        )
    console.print_result(plan, directory, result, again=not requeue)
    code = exit_code(result)
    if requeue and code == EXIT_SAVED:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a requeue sends to all of the job
        console.say(backends.queue_of(plan.backend).go_on_later(plan, directory))
    elif requeue:
        backends.queue_of(plan.backend).stay_ended()
    return code


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
        click.echo(
            f"\nleft running, in job {directory.job()}: `launch attach {plan.name}` follows it, "
            f"`launch stop {plan.name}` has it save and end"
        )
        return EXIT_STOPPED
    result = directory.result()
    if result is None or result["status"] != state.word:
        click.echo(f"run {plan.name} is {state}; see {directory.path / 'logs'}, and `launch` again to resume")
        return EXIT_CODES.get(state.word, EXIT_CODES["failed"])
    console.print_result(plan, directory, result, again=again)
    return exit_code(result)


@contextlib.contextmanager
def _signals(wishes: Any) -> Iterator[Any]:
    """Ctrl-C and SIGTERM become wishes while a run is supervised."""
    before = {s: signal.signal(s, wishes.interrupted) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wishes
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    main()
