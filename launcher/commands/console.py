"""What `launch` prints of a run: the plan, the live line, the result, new lines of logs."""

import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.rundir import RunDirectory


PROGRESS_SECONDS = 2.0


# What a terminal obeys instead of showing: its own escape sequences, and the other control characters.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text`, which hosts and others who write to a run directory may have chosen, for a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _COLOUR.sub("", text))


def echo(text: str, *, err: bool = False) -> None:
    """Print what may contain the words of others."""
    try:
        click.echo(printable(text), err=err)
    except BrokenPipeError:
        # Ctrl-C also ends the reader of `launch … | tee log`, while the run has yet to save.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_plan(plan: "Plan") -> None:
    mesh, model = plan.mesh, plan.config["model"]
    share = f", {plan.parameter_share:.1%} of the parameters on each device" if mesh["model"] > 1 else ""
    rows = {
        "run": f"{plan.name}  ({plan.config_file})",
        "cluster": f"{plan.cluster}: {plan.processes} process{'es' * (plan.processes > 1)} × "
        f"{plan.devices_per_process} {plan.platform} = {plan.devices} device{'s' * (plan.devices > 1)}",
        "mesh": f"batch {mesh['batch']} × model {mesh['model']}{share}",
        "batch": f"{plan.global_batch} global, {plan.per_device_batch} per device",
        "steps": f"{plan.steps} ({plan.epochs:.4g} epochs of {plan.steps_per_epoch:.4g} steps)",
        "model": f"{model['name']}, {plan.parameters:,} parameters, {model['dtype']}",
        "directory": plan.run_directory,
    }
    for label, text in rows.items():
        echo(f"{label:<12}{text}")


def print_result(plan: "Plan", run: "RunDirectory", result: dict[str, Any], *, again: bool = True) -> None:
    """How a run ended, and where its files are; `again`: with the command line that resumes it."""
    from launcher.supervise import describe_failure

    metrics, steps = result["metrics"], run.checkpoint_steps()
    attempts = f"{result['attempts']} attempt{'s' * (result['attempts'] > 1)}"
    step, time_taken = (
        f"step {result['step']} (epoch {result['epoch']:.4g})",
        duration(result["wall_seconds"]),
    )
    echo(f"\n{result['status']:<12}{step}, {attempts}, {time_taken}")
    if result["failure"]:
        echo(f"{'cause':<12}{describe_failure(result['failure'])}")
        print_lines(result["failure"]["lines"])
        echo(f"{'logs':<12}{run.hosts.logs(run.attempts.last())}")
    if "eval/accuracy" in metrics:
        echo(
            f"{'result':<12}{metrics['eval/accuracy']:.2%} of {metrics['eval/count']} held-out images, "
            f"eval loss {metrics['eval/loss']:.4f}"
        )
    if steps:
        echo(f"{'checkpoints':<12}{run.checkpoints()} (newest: step {steps[-1]})")
    echo(f"{'look':<12}tensorboard --logdir {shlex.quote(run.tensorboard())}")
    if again and result["status"] != "completed":
        mend = "fix the cause, then " if result["failure"] and not result["failure"]["retryable"] else ""
        echo(f"{'resume':<12}{mend}{shlex.join(['launch', *sys.argv[1:]])}")


def print_lines(lines: Iterable[str]) -> None:
    """Lines of a log, below what they explain."""
    for line in lines:
        echo(f"            | {line}")


def bad_nodes_text(run: "RunDirectory") -> str:
    """What becomes of the nodes that failed twice; empty where there are none."""
    bad, excluded = run.job.bad_nodes(), run.job.excluded_nodes()
    if not bad:
        return ""
    then = "excluded" if excluded else "tried again, since no other nodes are left for the job"
    return f"failed twice and {then}: {', '.join(bad)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_text(plan: "Plan", report: dict[str, Any]) -> str:
    """One line: step, epoch, loss, accuracy, images/s, share of time waiting for data, ETA."""
    step, speed = report.get("step", 0), report.get("speed/images_per_second")
    phase = report.get("phase", "starting")
    if speed is None:
        return f"{phase} …"
    text = (
        f"step {step}/{plan.steps}  epoch {report['epoch']:.2f}/{plan.epochs:.4g}  "
        f"loss {report['train/loss']:.4f}  accuracy {report['train/accuracy']:.2%}  "
        f"{speed:,.0f} images/s  data wait {report['speed/data_wait_share']:.0%}{input_text(report)}  "
        f"ETA {duration((plan.steps - step) * plan.global_batch / speed)}"
    )
    if "eval/accuracy" in report:
        text += f"  eval {report['eval/accuracy']:.2%}"
    return text if phase == "training" else f"{text}  ({phase})"


def input_text(report: dict[str, Any]) -> str:
    """The bottleneck, and figures of reading where images are read, in brackets."""
    parts = [report["bound"]] if "bound" in report else []
    if "data/ready_batches" in report:
        parts.append(f"{report['data/ready_batches']} ready")
    if "data/get_p50_ms" in report:
        times = "/".join(f"{report[f'data/get_p{q}_ms']:.0f}" for q in (50, 95, 99))
        parts.append(f"GET p50/95/99 {times} ms")
    if "data/cache_hit_share" in report:
        parts.append(f"cache {report['data/cache_hit_share']:.0%}")
    if report.get("data/hedges"):
        parts.append(f"hedges {report['data/hedges']}, won {report['data/hedges_won']}")
    troubles = {name: report.get(f"data/{name}") for name in ("retries", "checksum_failures", "bad_records")}
    parts += [f"{count} {name.replace('_', ' ')}" for name, count in troubles.items() if count]
    return f" ({', '.join(parts)})" if parts else ""


class Progress:
    """The live line: redrawn in place in a terminal, elsewhere a plain line each time it changes."""

    def __init__(self, plan: "Plan", plain_seconds: float = PROGRESS_SECONDS):
        self._plan, self._plain_seconds = plan, plain_seconds
        self._last = ""
        self._printed = 0.0
        self._attempt = 0
        self._live: Any = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=5, transient=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def print(self, text: str) -> None:
        """Print a line that stays above the live line."""
        if self._live:
            self._live.console.print(printable(text), markup=False, highlight=False)
        else:
            echo(text)

    def update(self, attempt: int, report: dict[str, Any]) -> None:
        if report.get("start") and attempt > self._attempt:
            self._attempt = attempt
            self.print(f"resuming from step {report['start']}")
        text = progress_text(self._plan, report)
        if self._live:
            from rich.text import Text

            self._live.update(Text(printable(text), no_wrap=True, overflow="ellipsis"))
            return
        starting = text.endswith("…")
        due = starting or time.monotonic() - self._printed > self._plain_seconds
        if text != self._last and due:
            echo(text)
            self._last, self._printed = text, time.monotonic()


def print_new_lines(
    run: "RunDirectory", attempt: int, process: int, offsets: dict[tuple[int, int], int], *, prefix: str
) -> None:
    """Print the complete lines that were added to a log since `offsets`: bytes, by attempt and process."""
    offset = offsets.get((attempt, process), 0)
    content = run.hosts.read_log(attempt, process, offset)
    whole = content[: content.rfind(b"\n") + 1]
    offsets[attempt, process] = offset + len(whole)
    for line in whole.decode("utf-8", errors="replace").splitlines():
        echo(f"{prefix}{line}")
