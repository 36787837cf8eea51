"""Commands that scripts type on hosts: `launch supervise` in a SLURM job, `launch worker` in each process."""

import os
import signal
import sys
from pathlib import Path

import click

from configs.errors import UserError
from launcher.commands import console, execution
from launcher.commands.arguments import plan_on, recipe_arguments, run_name
from launcher.commands.runs import check_can_resume, is_complete, state_of

# A job may begin before the launcher that submitted it has recorded its id.
PATIENCE_SECONDS = 60.0


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def supervise(directory: Path) -> None:
    """Run what is planned in DIRECTORY, in this SLURM job; the last line of its script."""
    from launcher import backends
    from launcher.rundir import RunDirectory

    run = RunDirectory(directory)
    if not directory.is_dir():
        raise UserError(
            f"run directory {directory} is not visible on {os.uname().nodename}: it must be on a file system that "
            "all nodes share; choose another place with --root"
        )
    with run.locked(patience_seconds=PATIENCE_SECONDS):
        plan = run.plan()
    if plan is None or plan.submission is None:
        raise UserError(f"{directory} holds no plan for a SLURM job; see `launch --help`")
    backend = backends.get(plan.backend)
    backend.check(plan)
    sys.exit(execution.train(plan, run, backend, requeue=True, begin=False))


@click.command()
@recipe_arguments
def worker(config: Path, overrides: tuple[str, ...], name: str | None, root: str) -> None:
    """Be one process of a run: srun … launch worker CONFIG, or on each VM of a TPU slice."""
    from launcher import backends, clusters
    from launcher.backends import slurm_commands
    from launcher.host.external import REFUSED, ExternalExecutor, WorkerHost
    from launcher.host.process import shell_exit_code
    from launcher.host.task import SlurmTaskHost
    from launcher.host.tpu_vm import TpuVmHost
    from launcher.machine import metadata
    from launcher.machine.slurm import current_task
    from launcher.rundir import RunDirectory

    task = current_task()
    vm = None if task else metadata.tpu_worker()
    if task is not None:
        run = RunDirectory(Path(root).absolute() / run_name(config, name))
        host: WorkerHost = SlurmTaskHost(task, run)
        process, spec, stopped_by = (
            task.process,
            clusters.from_slurm_task(task),
            slurm_commands.current_stop_cause,
        )
    elif vm is not None:
        if not root.startswith("gs://"):
            raise UserError(
                f"--root {root}: the VMs of a slice share no folder; give --root gs://bucket/prefix"
            )
        run = RunDirectory(f"{root}/{run_name(config, name)}")
        host = vm_host = TpuVmHost(vm, run)
        process, spec, stopped_by = vm_host.process, clusters.from_tpu_worker(vm), lambda: "preempted"
    else:
        raise UserError(
            "launch worker: this is no task of a SLURM step and no TPU VM; type `launch CONFIG`, or srun before it"
        )
    if process:
        signal.signal(signal.SIGTERM, lambda *_: host.request_stop())
        sys.exit(shell_exit_code(host.wait()) if host.start() else 0)
    try:
        plan = plan_on(spec, config, overrides, name, root, max_restarts=0)
        if vm is not None and run.plan() and (state := state_of(run)).is_active:
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
