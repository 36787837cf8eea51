"""The `launch` command: parse, print, exit code. With data.py the only place that prints.

Heavy modules are imported where they are used: `launch --help` answers before pydantic would have loaded.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError
from launcher.data import check_datasets, data

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.rundir import RunDirectory

DEFAULT_ROOT = Path("runs")
FOLLOW_SECONDS = 0.3


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


def _planning(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments from which a plan is made."""
    command = click.option("--name", help="Name of the run. Default: the recipe's file name.")(_root(command))
    command = click.option("--cluster", help="Where to run; see `launch clusters`. Default: this machine.")(
        command
    )
    command = click.argument("overrides", nargs=-1, metavar="[section.key=value]...")(command)
    return click.argument("config", type=str)(command)


@main.command()
@_planning
@click.option("--dry-run", is_flag=True, help="Print the plan and the commands, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask before going on with changed settings.")
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="How often a failed attempt is tried again from the last checkpoint.",
)
def run(
    config: str, overrides: tuple[str, ...], cluster: str | None, name: str | None, root: Path,
    dry_run: bool, yes: bool, max_restarts: int,
) -> None:  # fmt: skip
    """Train CONFIG, or go on with it where it was left."""
    from launcher import backends
    from launcher.rundir import RunDirectory
    from launcher.supervise import EXIT_CODES, Wishes, supervise

    plan = _plan(config, overrides, cluster, name, root)
    backend = backends.get(plan.backend)
    directory = RunDirectory(Path(plan.run_directory))
    if dry_run:
        _print_plan(plan)
        click.echo(backend.render(plan))
        return
    changes = _check_can_continue(plan, directory)
    if _already_done(plan, directory):
        return
    if plan.config["data"]["source"] == "records" and plan.backend == "local":
        check_datasets(plan.run_config())  # elsewhere they may be within reach of the hosts alone
    _print_plan(plan)
    for change in changes:
        click.echo(f"changed     {change}")
    if changes and not yes and sys.stdin.isatty():
        click.confirm("Go on with this run?", default=True, abort=True)
    with directory.locked(), _signals(Wishes()) as wishes, _Progress(plan) as progress:
        directory.claim_checkpoints(plan)
        directory.create(plan)
        result = supervise(
            plan,
            directory,
            backend,
            max_restarts=max_restarts,
            wishes=wishes,
            watch=progress.watch,
            announce=progress.line,
        )
    _print_result(plan, directory, result)
    failure = result["failure"]
    user_error = failure is not None and failure["cause"] == "exit code 2"
    sys.exit(2 if user_error else EXIT_CODES[result["status"]])


@main.command()
@_planning
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON, as a run would keep it.")
def plan(
    config: str, overrides: tuple[str, ...], cluster: str | None, name: str | None, root: Path, as_json: bool
) -> None:
    """Show what `run` would do, and check all of it."""
    made = _plan(config, overrides, cluster, name, root)
    if as_json:
        click.echo(made.to_json())
    else:
        _print_plan(made)


@main.command()
@click.argument("name", required=False)
@_root
def status(name: str | None, root: Path) -> None:
    """How a run stands; without NAME, the one launched last."""
    run_directory = _find(root, name)
    made = run_directory.plan()
    assert made is not None
    report = run_directory.report(0)
    click.echo(f"run         {run_directory.name} ({_state(run_directory)})")
    click.echo(f"directory   {run_directory.path}")
    if report:
        click.echo(f"progress    {_progress_text(made, report)}")
        click.echo(f"last word   {time.time() - report['time']:.0f} s ago, {report.get('phase')}")
    steps = run_directory.checkpoint_steps()
    click.echo(f"checkpoints {', '.join(map(str, steps)) or 'none yet'}")
    for a in run_directory.attempts():
        click.echo(
            f"attempt {a['attempt']:<4}{a['verdict']}, steps {a['from_step']} to {a['reached_step']} "
            f"in {_duration(a['wall_seconds'])}"
        )
        if a["failure"]:
            from launcher.supervise import describe

            click.echo(f"            {describe(a['failure'])}")


@main.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines are written, until the run ends.")
@click.option("--host", type=click.IntRange(min=0), help="Only this host.")
@_root
def logs(name: str | None, follow: bool, host: int | None, root: Path) -> None:
    """Logs of the newest attempt, each line with its host."""
    run_directory = _find(root, name)
    made = run_directory.plan()
    assert made is not None
    if host is not None and host >= made.processes:
        raise UserError(f"--host {host}: the run has hosts 0 to {made.processes - 1}")
    hosts = range(made.processes) if host is None else [host]
    offsets: dict[Path, int] = {}
    while True:
        running = run_directory.is_running()
        attempt = run_directory.last_attempt()
        for h in hosts:
            _print_new_lines(
                run_directory.log(attempt, h), offsets, prefix=f"[host {h}] " if host is None else ""
            )
        if not follow or not running:
            return
        time.sleep(FOLLOW_SECONDS)


@main.command()
@click.argument("name", required=False)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for the save.")
@_root
def stop(name: str | None, timeout: float, root: Path) -> None:
    """Have a run save and end."""
    run_directory = _find(root, name)
    if not run_directory.is_running():
        click.echo(f"run {run_directory.name} is not running ({_state(run_directory)})")
        return
    run_directory.request_stop()
    deadline = time.monotonic() + timeout
    while run_directory.is_running():
        if time.monotonic() > deadline:
            raise UserError(
                f"run {run_directory.name} has not stopped within {timeout:g} s; see `launch status`"
            )
        time.sleep(FOLLOW_SECONDS)
    click.echo(f"run {run_directory.name} is {_state(run_directory)}")


@main.command("list")
@_root
def list_runs(root: Path) -> None:
    """All runs, the one launched last first."""
    from launcher.rundir import runs

    found = runs(root)
    if not found:
        click.echo(f"no runs in {root}")
    for run_directory in found:
        made, report = run_directory.plan(), run_directory.report(0)
        assert made is not None
        step = report.get("step", 0)
        click.echo(
            f"{run_directory.name:<24} {_state(run_directory):<12} step {step}/{made.steps:<10} {made.cluster}"
        )


@main.command()
def clusters() -> None:
    """The clusters that --cluster knows."""
    from launcher.clusters import KINDS, default

    for kind, meaning in KINDS.items():
        click.echo(f"{kind:<12} {meaning}")
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
    logdir = str(root) if name is None else _logdir(run_directory)
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
    config: str, overrides: tuple[str, ...], cluster: str | None, name: str | None, root: Path
) -> "Plan":
    from configs.load import load
    from launcher import clusters
    from launcher.plan import make_plan
    from launcher.rundir import check_name

    path = Path(config)
    _check_is_recipe(config)
    loaded = load(path, overrides)
    spec = clusters.resolve(cluster) if cluster is not None else clusters.default()
    return make_plan(
        loaded,
        spec,
        name=check_name(path.stem, "the recipe's file name; give another with --name")
        if name is None
        else check_name(name),
        root=root,
        config_file=path,
        provenance=_provenance(),
    )


def _provenance() -> dict[str, Any]:
    """Which code runs: commit and dirty flag where it is a checkout, and the packages that matter."""
    home = Path(__file__).parent.parent

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError):
            done = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
        return None

    packages = ("podlaunch", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    changes = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": sys.version.split()[0],
        "packages": versions,
    }


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
    _print_result(plan, directory, result)
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


# What is printed


def _say(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:
        # Ctrl-C ends the reader of `launch … | tee log`, too; the run has yet to save.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_plan(plan: "Plan") -> None:
    mesh, model = plan.mesh, plan.config["model"]
    rows = {
        "run": f"{plan.name}  ({plan.config_file})",
        "cluster": f"{plan.cluster}: {plan.processes} process{'es' * (plan.processes > 1)} × "
        f"{plan.devices_per_process} {plan.platform} = {plan.devices} device{'s' * (plan.devices > 1)}",
        "mesh": f"batch {mesh['batch']} × model {mesh['model']}",
        "batch": f"{plan.global_batch} global, {plan.per_device_batch} per device",
        "steps": f"{plan.steps} ({plan.epochs:.4g} epochs of {plan.steps_per_epoch:.4g} steps)",
        "model": f"{model['name']}, {plan.parameters:,} parameters, {model['dtype']}",
        "directory": plan.run_directory,
    }
    for label, text in rows.items():
        click.echo(f"{label:<12}{text}")


def _print_result(plan: "Plan", directory: "RunDirectory", result: dict[str, Any]) -> None:
    from launcher.supervise import describe

    metrics, steps = result["metrics"], directory.checkpoint_steps()
    attempts = f"{result['attempts']} attempt{'s' * (result['attempts'] > 1)}"
    _say(
        f"\n{result['status']:<12}step {result['step']} (epoch {result['epoch']:.4g}), {attempts}, {_duration(result['wall_seconds'])}"
    )
    if result["failure"]:
        _say(f"{'cause':<12}{describe(result['failure'])}")
        for line in result["failure"]["lines"]:
            _say(f"            | {line}")
        _say(f"{'logs':<12}{directory.logs(directory.last_attempt())}")
    if "eval/accuracy" in metrics:
        _say(
            f"{'result':<12}{metrics['eval/accuracy']:.2%} of {metrics['eval/count']} held-out images, "
            f"eval loss {metrics['eval/loss']:.4f}"
        )
    if steps:
        _say(f"{'checkpoints':<12}{directory.checkpoints()} (newest: step {steps[-1]})")
    _say(f"{'look':<12}tensorboard --logdir {shlex.quote(_logdir(directory))}")
    if result["status"] != "completed":
        mend = "mend it, then " if result["failure"] and not result["failure"]["retryable"] else ""
        _say(f"{'resume':<12}{mend}{shlex.join(['launch', *sys.argv[1:]])}")


def _logdir(directory: "RunDirectory") -> str:
    plan = directory.plan()
    assert plan is not None
    return str(plan.config["log"]["tensorboard"] or directory.path / "tensorboard")


def _state(directory: "RunDirectory") -> str:
    if directory.is_running():
        return "running"
    result = directory.result()
    return result["status"] if result else "interrupted"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _progress_text(plan: "Plan", report: dict[str, Any]) -> str:
    """One line: step, epoch, loss, accuracy, images/s, share of time waiting for data, ETA."""
    step, speed = report.get("step", 0), report.get("speed/images_per_second")
    phase = report.get("phase", "starting")
    if speed is None:
        return f"{phase} …"
    text = (
        f"step {step}/{plan.steps}  epoch {report['epoch']:.2f}/{plan.epochs:.4g}  "
        f"loss {report['train/loss']:.4f}  accuracy {report['train/accuracy']:.2%}  "
        f"{speed:,.0f} images/s  data wait {report['speed/data_wait_share']:.0%}{_input_text(report)}  "
        f"ETA {_duration((plan.steps - step) * plan.global_batch / speed)}"
    )
    if "eval/accuracy" in report:
        text += f"  eval {report['eval/accuracy']:.2%}"
    return text if phase == "training" else f"{text}  ({phase})"


def _input_text(report: dict[str, Any]) -> str:
    """How the input does, in brackets: the verdict, and where images are read, what reading is like."""
    words = [report["bound"]] if "bound" in report else []
    if "data/ready_batches" in report:
        words.append(f"{report['data/ready_batches']} ready")
    if "data/get_p50_ms" in report:
        times = "/".join(f"{report[f'data/get_p{q}_ms']:.0f}" for q in (50, 95, 99))
        words.append(f"GET p50/95/99 {times} ms")
    if "data/cache_hit_share" in report:
        words.append(f"cache {report['data/cache_hit_share']:.0%}")
    if report.get("data/hedges"):
        words.append(f"hedges {report['data/hedges']}, won {report['data/hedges_won']}")
    troubles = {"retries": "retries", "checksum_failures": "checksum failures", "bad_records": "bad records"}
    words += [
        f"{report[f'data/{key}']} {name}" for key, name in troubles.items() if report.get(f"data/{key}")
    ]
    return f" ({', '.join(words)})" if words else ""


class _Progress:
    """The live line: redrawn in place in a terminal, elsewhere a plain line each time there is news."""

    PLAIN_SECONDS = 2.0

    def __init__(self, plan: "Plan"):
        self._plan = plan
        self._last = ""
        self._printed = 0.0
        self._attempt = 0
        self._live: Any = None

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=5, transient=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            _say(text)

    def watch(self, attempt: int, report: dict[str, Any]) -> None:
        if report.get("start") and attempt > self._attempt:
            self._attempt = attempt
            self.line(f"resuming from step {report['start']}")
        text = _progress_text(self._plan, report)
        if self._live:
            from rich.text import Text

            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))
            return
        starting = text.endswith("…")
        due = starting or time.monotonic() - self._printed > self.PLAIN_SECONDS
        if text != self._last and due:
            _say(text)
            self._last, self._printed = text, time.monotonic()


@contextlib.contextmanager
def _signals(wishes: Any) -> Iterator[Any]:
    """Ctrl-C and SIGTERM become wishes while a run is supervised."""
    before = {s: signal.signal(s, wishes.interrupted) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wishes
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _print_new_lines(path: Path, offsets: dict[Path, int], *, prefix: str) -> None:
    """Print the whole lines that `path` has gained."""
    if not path.exists():
        return
    with path.open("rb") as f:
        f.seek(offsets.get(path, 0))
        content = f.read()
    whole = content[: content.rfind(b"\n") + 1]
    offsets[path] = offsets.get(path, 0) + len(whole)
    for line in whole.decode("utf-8", errors="replace").splitlines():
        click.echo(f"{prefix}{line}")


if __name__ == "__main__":
    main()
