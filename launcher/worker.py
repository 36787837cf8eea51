"""One process of the gang, on its host: join, verify, train, and leave with a code that means something.

The one file of launcher/ that imports jax and trainer, and only inside functions: the lifeline must
hold, and the clock run, before their seconds of import.
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
from launcher.plan import Plan
from launcher.provenance import differences
from launcher.rundir import RunDirectory

BEGUN = time.time()
HEARTBEAT_TIMEOUT_SECONDS = 30
INITIALIZATION_TIMEOUT_SECONDS = 300
SHUTDOWN_TIMEOUT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Membership:
    """This process's place in the gang."""

    coordinator: str | None
    processes: int
    process: int


def membership() -> Membership:
    """From LAUNCH_COORDINATOR, LAUNCH_PROCESSES and LAUNCH_PROCESS; one process where none is set.

    In a SLURM step, launcher/host.py has set them.
    """
    names = ("LAUNCH_COORDINATOR", "LAUNCH_PROCESSES", "LAUNCH_PROCESS")
    values = [os.environ.get(name) for name in names]
    if values == [None, None, None]:
        return Membership(None, 1, 0)
    missing = [name for name, value in zip(names, values, strict=True) if not value]
    if missing:
        raise UserError(
            f"{', '.join(missing)} not set, but others of {', '.join(names)} are: set all or none"
        )
    try:
        member = Membership(values[0], int(values[1] or ""), int(values[2] or ""))
    except ValueError:
        member = Membership(values[0], 0, 0)
    if not 0 <= member.process < member.processes:
        raise UserError(
            f"LAUNCH_PROCESS = {values[2]} of LAUNCH_PROCESSES = {values[1]}: must be a number from 0, below the other"
        )
    return member


class Reporter:
    """Keeps this process's newest word in the run directory, and says it again each second: a heartbeat."""

    def __init__(self, run: RunDirectory, member: Membership):
        self._run, self._process = run, member.process
        self._lock = threading.Lock()
        self._words: dict[str, Any] = {
            "process": member.process,
            "processes": member.processes,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": BEGUN,
        }
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def __call__(self, **words: Any) -> None:
        with self._lock:
            self._words |= words
            self._words["time"] = time.time()
            self._run.write_report(self._process, self._words)

    def _beat(self) -> None:
        while True:
            time.sleep(1.0)
            with contextlib.suppress(OSError):  # a full disk is told by what fails for it
                self()


class StopSignal:
    """Whether SIGTERM has come. Until the loop first asks, SIGTERM just ends the process: in the minutes
    of joining and compiling there is nothing to save, and Python could not handle it anyway.
    """

    def __init__(self) -> None:
        self._come = False
        self._handled = False

    def __call__(self) -> bool:
        if not self._handled:
            signal.signal(signal.SIGTERM, self._handle)
            self._handled = True
        return self._come

    def _handle(self, signum: int, frame: Any) -> None:
        self._come = True


def main() -> None:
    """Entry point of `python -m podlaunch.host worker`; never returns."""
    faulthandler.enable()
    if "--exit-with-stdin" in sys.argv[1:]:
        threading.Thread(target=_exit_with_stdin, name="lifeline", daemon=True).start()
    code = 1
    try:
        code = _work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Not sys.exit: at exit jax waits 60 s and more for peers that a failure has already taken.
        # Always: a log that cannot be written, as on a full disk, would leave this process waiting there.
        os._exit(code)


def _exit_with_stdin() -> None:
    """The launcher holds the other end of standard input; end of file means that it is gone."""
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
        _tell(reporter, e, retryable=False)
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Exception as e:  # noqa: BLE001 (the outermost layer: the failure is told before the process leaves)
        _tell(reporter, e, retryable=getattr(e, "retryable", True))
        traceback.print_exc()
        return 1


def _tell(reporter: Reporter | None, error: Exception, *, retryable: bool) -> None:
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
    with contextlib.suppress(OSError):
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
            cluster_detection_method="deactivate",
            coordinator_bind_address=member.coordinator,  # by default all interfaces
            initialization_timeout=INITIALIZATION_TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS,
        )
    _verify(plan, jax)
    start = {"import": imported - BEGUN, "join": time.time() - imported}

    def report(**words: Any) -> None:
        if "seconds" in words:
            words["seconds"] = start | words["seconds"]
        reporter(**words)

    outcome = train(
        plan.run_config(),
        steps=plan.steps,
        directory=Path(plan.run_directory),
        report=report,
        stop_requested=StopSignal(),
    )
    report(
        phase=outcome.status, seconds=outcome.seconds, outcome=dataclasses.asdict(outcome), **outcome.metrics
    )
    if member.processes > 1:
        jax.distributed.shutdown()
    return 0 if outcome.status == "completed" else 75


def _configure(jax: Any) -> None:
    """Compiled programs are kept between runs, unless the user has said where."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # Stop requests are agreed on in the step; jax's own service would take SIGTERM from us.
    jax.config.update("jax_enable_preemption_service", False)


def _check_code(plan: Plan) -> None:
    if found := differences(plan.provenance):
        raise UserError(
            f"{socket.gethostname()} does not have what this run was planned with: {'; '.join(found)}. Give all hosts "
            "the same, then `launch` again; a run of days wants a checkout of its own (git worktree)"
        )


def _verify(plan: Plan, jax: Any) -> None:
    """Never train on other devices than planned, alone beside one's peers least of all."""
    seen = (jax.process_count(), jax.local_device_count(), jax.default_backend())
    planned = (plan.processes, plan.devices_per_process, plan.platform)
    if seen != planned:
        raise UserError(
            f"process {jax.process_index()} on {socket.gethostname()} sees {seen[0]} processes, {seen[1]} "
            f'local devices of platform {seen[2]}; the plan for cluster "{plan.cluster}" has {planned[0]}, '
            f"{planned[1]} and {planned[2]}. Choose the --cluster that this machine is, or mend jax's installation"
        )


if __name__ == "__main__":
    main()
