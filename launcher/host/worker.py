"""One process of the gang, on its host: join, verify, train, and exit with a code that tells how it went.

The one file of launcher/ that imports jax and trainer, and only inside functions: the lifeline must hold, and the
clock run, before the seconds that these imports take.
"""

import contextlib
import dataclasses
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import cache_folder
from launcher.machine.devices import cuda_advice, has_cuda_plugin, num_nvidia_gpus
from launcher.machine.provenance import differences
from launcher.plan import Plan
from launcher.rundir import RunDirectory

BEGUN = time.time()
# jax's default is 100 s, in which the devices of all other hosts would wait for a host that is gone.
HEARTBEAT_TIMEOUT_SECONDS = 30
INITIALIZATION_TIMEOUT_SECONDS = 300
# How long a process that is done waits for its peers. jax's default is 300 s.
SHUTDOWN_TIMEOUT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Membership:
    """This process's place in the gang."""

    coordinator: str | None
    processes: int
    process: int


def membership() -> Membership:
    """From LAUNCH_COORDINATOR, LAUNCH_PROCESSES and LAUNCH_PROCESS; one process where none is set.

    In a SLURM step, launcher/host/task.py has set them. Raises UserError where some are missing or impossible.
    """
    names = ("LAUNCH_COORDINATOR", "LAUNCH_PROCESSES", "LAUNCH_PROCESS")
    values = [os.environ.get(name) for name in names]
    if values == [None, None, None]:
        return Membership(None, 1, 0)
    coordinator, processes, process = (value or "" for value in values)
    if missing := [name for name, value in zip(names, values, strict=True) if not value]:
        raise UserError(
            f"{', '.join(missing)} not set, but the others of {', '.join(names)} are: set all or none"
        )
    if not (process.isdecimal() and processes.isdecimal() and int(process) < int(processes)):
        raise UserError(
            f"LAUNCH_PROCESS = {process} of LAUNCH_PROCESSES = {processes}: must be at least 0 and below LAUNCH_PROCESSES"
        )
    return Membership(coordinator, int(processes), int(process))


class Reporter:
    """Keeps the newest report of this process in the run directory, and writes it again each second as a heartbeat."""

    def __init__(self, run: RunDirectory, member: Membership):
        self._run, self._process = run, member.process
        self._lock = threading.Lock()
        self._report: dict[str, Any] = {
            "process": member.process,
            "processes": member.processes,
            # SLURM may know its nodes by other names than they know themselves.
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "pid": os.getpid(),
            "begun": BEGUN,
        }
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def __call__(self, **fields: Any) -> None:
        with self._lock:
            self._report |= fields
            self._report["time"] = time.time()
            self._run.hosts.write_report(self._process, self._report)

    def _beat(self) -> None:
        while True:
            time.sleep(1.0)
            with contextlib.suppress(OSError, UserError):  # on a full disk, the write that matters raises
                self()


class StopSignal:
    """Whether SIGTERM has arrived.

    Until the training loop first asks, SIGTERM ends the process: in the minutes of joining and compiling there is
    nothing to save, and Python, which is inside a call of XLA, could not run a handler.
    """

    def __init__(self) -> None:
        self._received = False
        self._handled = False

    def __call__(self) -> bool:
        if not self._handled:
            signal.signal(signal.SIGTERM, self._handle)
            self._handled = True
        return self._received

    def _handle(self, signum: int, frame: Any) -> None:
        self._received = True


def main() -> None:
    """Entry point of `python -m podlaunch.host worker`; never returns."""
    faulthandler.enable()
    if "--exit-with-stdin" in sys.argv[1:]:
        # A thread, since the launcher may end while this process is inside a call of XLA.
        threading.Thread(target=_exit_with_stdin, name="lifeline", daemon=True).start()
    code = 1
    try:
        code = _work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Not sys.exit: at exit jax waits 60 s and more for peers that a failure has already ended.
        # In `finally`: a log that cannot be written, as on a full disk, would otherwise lead to that wait.
        os._exit(code)


def _exit_with_stdin() -> None:
    """The launcher holds the other end of standard input; end of file means that the launcher is gone."""
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(1)


def _work() -> int:
    reporter = None
    try:
        member = membership()
        directory = os.environ.get("LAUNCH_RUN")
        if not directory:
            raise UserError("LAUNCH_RUN is not set: it names the run directory with the plan; use `launch`")
        run = RunDirectory(Path(directory))
        plan = run.plan()
        if plan is None:
            raise UserError(f"LAUNCH_RUN = {directory}: there is no plan.json; use `launch`")
        reporter = Reporter(run, member)
        _check_code(plan)
        return _train(plan, member, reporter)
    except UserError as e:
        _report_failure(reporter, e, retryable=False)
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Exception as e:  # noqa: BLE001 (the outermost layer: the failure is reported before the process ends)
        _report_failure(reporter, e, retryable=getattr(e, "retryable", True))
        traceback.print_exc()
        return 1


def _report_failure(reporter: Reporter | None, error: Exception, *, retryable: bool) -> None:
    if reporter is None:
        return
    message = str(error).strip().splitlines() or [""]
    is_users = isinstance(error, UserError)
    failure = {
        "error": str(error) if is_users else f"{type(error).__name__}: {message[0]}",
        "traceback": [] if is_users else "".join(traceback.format_exception(error)).splitlines(),
        "retryable": retryable,
        "step": getattr(error, "step", None),
    }
    with contextlib.suppress(OSError, UserError):
        reporter(phase="failed", failure=failure)


def _train(plan: Plan, member: Membership, reporter: Reporter) -> int:
    reporter(phase="importing", cluster=plan.cluster, mesh=plan.mesh)
    import jax

    from trainer.loop import train

    imported = time.time()
    reporter(phase="joining")
    _configure(jax)
    if member.processes > 1:
        jax.distributed.initialize(
            member.coordinator,
            member.processes,
            member.process,
            # Detection would choose the devices as well: in a SLURM step, one GPU for each process.
            cluster_detection_method="deactivate",
            coordinator_bind_address=member.coordinator,  # by default all interfaces
            initialization_timeout=INITIALIZATION_TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS,
        )
    _verify(plan, jax)
    reporter(devices=_describe_devices(jax))
    start = {"import": imported - BEGUN, "join": time.time() - imported}

    def report(**fields: Any) -> None:
        if "seconds" in fields:
            fields["seconds"] = start | fields["seconds"]
        reporter(**fields)

    config, directory = plan.run_config(), Path(plan.run_directory)
    outcome = train(config, steps=plan.steps, directory=directory, report=report, stop_requested=StopSignal())
    result = dataclasses.asdict(outcome)
    report(phase=outcome.status, seconds=outcome.seconds, outcome=result, **outcome.metrics)
    if member.processes > 1:
        # The coordinator is in process 0: if that left first, the others would abort, and the run seem to have failed.
        jax.distributed.shutdown()
    return 0 if outcome.status == "completed" else 75


def _describe_devices(jax: Any) -> str:
    """All devices of the run, such as `32 × NVIDIA H100 80GB HBM3 in 4 slices`; see trainer/mesh.py on slices."""
    devices = jax.devices()
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    return f"{len(devices)} × {devices[0].device_kind} in {num_slices} slice{'s' if num_slices > 1 else ''}"


def _configure(jax: Any) -> None:
    """Keep compiled programs between runs, unless the user has chosen another folder for them."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        # By default only what takes a second is kept, but a start compiles many small programs, too.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # The processes agree on stop requests in the train step; jax's own service would take SIGTERM from us.
    jax.config.update("jax_enable_preemption_service", False)


def _check_code(plan: Plan) -> None:
    if changes := differences(plan.provenance):
        raise UserError(
            f"{socket.gethostname()} differs from the machine that planned this run: {'; '.join(changes)}. Give all hosts "
            "the same code and packages, then repeat the `launch` command. For a long run use a separate checkout (git worktree), so that edits do not affect it"
        )


def _verify(plan: Plan, jax: Any) -> None:
    """Raises UserError where the devices are not the planned ones, as where a process has not found its peers."""
    processes, devices, platform = jax.process_count(), jax.local_device_count(), jax.default_backend()
    if plan.platform == "gpu" and platform == "cpu" and not has_cuda_plugin() and (gpus := num_nvidia_gpus()):
        raise UserError(
            f"{socket.gethostname()} has {gpus} NVIDIA GPUs, but its jax is installed without CUDA: {cuda_advice()}"
        )
    if (processes, devices, platform) != (plan.processes, plan.devices_per_process, plan.platform):
        raise UserError(
            f"process {jax.process_index()} on {socket.gethostname()} sees {processes} processes, {devices} local "
            f'devices of platform {platform}; the plan for cluster "{plan.cluster}" has {plan.processes}, '
            f"{plan.devices_per_process} and {plan.platform}. Choose the --cluster that this machine is, or mend jax's "
            "installation"
        )
