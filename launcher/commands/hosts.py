"""Commands that scripts type on hosts: `launch supervise` in a SLURM job, `launch worker` in each process."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from configs.errors import UserError
from launcher.commands import console, execution
from launcher.commands.arguments import plan_on, recipe_arguments, root_of, run_name
from launcher.commands.runs import check_can_resume, is_complete, state_of

if TYPE_CHECKING:
    from launcher.host.external import WorkerHost
    from launcher.plan import ClusterSpec
    from launcher.rundir import RunDirectory

# A job may begin before the launcher that submitted it has recorded its id and released the lock.
LOCK_TIMEOUT_SECONDS = 60.0


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def supervise(directory: Path) -> None:
    """Carry out the plan in DIRECTORY, in this SLURM job; the last line of its script."""
    from launcher import backends
    from launcher.rundir import RunDirectory

    run = RunDirectory(directory)
    if not directory.is_dir():
        raise UserError(
            f"run directory {directory} is not visible on {os.uname().nodename}: it must be on a file system that "
            "all nodes share; choose another place with --root"
        )
    with run.locked(timeout_seconds=LOCK_TIMEOUT_SECONDS):
        plan = run.plan()
    if plan is None or plan.submission is None:
        raise UserError(f"{directory} contains no plan for a SLURM job; submit one with `launch --cluster`")
    backend = backends.get(plan.backend)
    backend.check(plan)
    sys.exit(execution.train(plan, run, backend, requeue=True, begin=False))


@click.command()
@recipe_arguments
def worker(config: Path, overrides: tuple[str, ...], name: str | None, root: str | None) -> None:
    """Run one process of a run that you start yourself: by srun, or on each VM of a TPU slice."""
    from launcher import backends
    from launcher.host.external import REFUSED, ExternalExecutor, start_worker_on
    from launcher.host.process import shell_exit_code

    host, run, spec, stopped_by = _worker_here(root, run_name(config, name))
    if host.process:
        signal.signal(signal.SIGTERM, lambda *_: host.request_stop())
        sys.exit(shell_exit_code(host.wait()) if start_worker_on(host, run) else 0)
    try:
        plan = plan_on(spec, config, overrides, name, root, max_restarts=0)
        if plan.backend == "tpu" and run.plan() and (state := state_of(run)).is_active:
            raise UserError(f"run {plan.name} is {state}; end it first with `launch stop {plan.name}`")
        check_can_resume(plan, run)
    except UserError:
        host.cancel(REFUSED)
        raise
    if is_complete(plan, run):
        host.cancel()
        return
    console.print_plan(plan)
    executor = ExternalExecutor(host, backends.get(plan.backend).job_info(), stopped_by)
    sys.exit(execution.train(plan, run, executor, requeue=False, begin=True))


def _worker_here(
    root: str | None, name: str
) -> tuple["WorkerHost", "RunDirectory", "ClusterSpec", Callable[[], str]]:
    """The host that `launch worker` was typed on, its run and cluster, and what `Gang.stopped_by` is to answer.

    Raises UserError where this is neither a task of SLURM nor a TPU VM.
    """
    from launcher import clusters
    from launcher.backends import slurm_commands
    from launcher.host.task import SlurmTaskHost
    from launcher.host.tpu_vm import TpuVmHost
    from launcher.machine import metadata
    from launcher.machine.slurm import current_task
    from launcher.rundir import RunDirectory

    if task := current_task():
        run, spec = (
            RunDirectory(Path(root_of(root, "slurm")).absolute() / name),
            clusters.from_slurm_task(task),
        )
        return SlurmTaskHost(task, run), run, spec, slurm_commands.current_stop_cause
    vm = metadata.tpu_worker()
    if vm is None:
        raise UserError(
            "launch worker: neither in a SLURM step nor on a TPU VM; run `launch CONFIG`, or `srun … launch worker CONFIG`"
        )
    root = root_of(root, "tpu")
    if not root.startswith("gs://"):
        raise UserError(
            f"--root {root}: the VMs of a slice do not share a file system; give --root gs://bucket/prefix"
        )
    run = RunDirectory(f"{root}/{name}")
    return TpuVmHost(vm, run), run, clusters.from_tpu_worker(vm), lambda: "preempted"
