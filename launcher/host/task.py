"""A task of a SLURM step: starts the worker of one process on its node and watches it.

As a program it does so for a launcher elsewhere, through srun: it reports in lines of JSON on its standard output,
and on its standard input `stop` has the worker save and end, while end of file ends the worker at once.
"""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launcher.gang import EXIT_USER_ERROR, OUT_OF_MEMORY
from launcher.host.external import CANCELLED, STOPPED, start_worker_on
from launcher.host.process import (
    HEARTBEAT_SECONDS,
    kill_group,
    shell_exit_code,
    start_worker,
    worker_environment,
)
from launcher.machine.devices import num_nvidia_gpus
from launcher.machine.memory import num_oom_kills
from launcher.machine.network import address, reserve_port
from launcher.machine.slurm import SlurmTask, current_task, node_address
from launcher.plan import Plan
from launcher.rundir import RunDirectory

INTERFACE = "LAUNCH_INTERFACE"
"""Variable with the cluster's network interface."""
# Containers fetch their images meanwhile, at different speeds.
RENDEZVOUS_SECONDS = 600.0
POLL_SECONDS = 0.1
# What a file system means to say again. NFS may fail otherwise, too, but for a moment, as with a stale handle.
LASTING_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


class SlurmTaskHost:
    """The worker of one task, from the rendezvous with the other tasks to its end."""

    def __init__(self, task: SlurmTask, run: RunDirectory):
        self._task, self._run = task, run
        self.process, self.node = task.process, task.node
        self._lock = threading.RLock()  # a signal handler may find its own thread holding the lock
        self._worker: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._port: socket.socket | None = None
        self._num_oom_kills = num_oom_kills()

    def rendezvous(self, attempt: int | None) -> tuple[int, str]:
        if attempt is not None:
            self._check_visible(attempt)
        if self.process:
            return self._wait_for_process_0()
        assert attempt is not None
        others = [node_address(node) for node in self._task.nodes if node != self.node]
        host = address(self.node, others[:1], os.environ.get(INTERFACE))
        # Held until this process ends: nothing else may take the port before jax's coordinator listens.
        self._port = reserve_port(host)
        coordinator = f"{host}:{self._port.getsockname()[1]}"
        self._announce(attempt, coordinator)
        return attempt, coordinator

    def start(self, plan: Plan, attempt: int, coordinator: str) -> None:
        environment = {
            **_network_environment(),
            **worker_environment(plan, self.process, coordinator),
            **device_environment(plan, self._task, num_nvidia_gpus()),
        }
        with self._lock:
            with self._writing():
                self._worker = start_worker(self._run, attempt, environment)
            if self._stopped:  # the request came during the rendezvous
                self._worker.terminate()

    def cancel(self, reason: int = CANCELLED) -> None:
        self._announce(reason, "")

    def wait(self) -> int:
        if self._worker is None:  # there was a request to stop before it started
            return -signal.SIGTERM
        return self._worker.wait()

    def is_out_of_memory(self, code: int) -> bool:
        """Whether the kernel ended the worker with this exit code because memory ran out."""
        return code == -signal.SIGKILL and num_oom_kills() > self._num_oom_kills

    def request_stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._worker:
                self._worker.terminate()

    def kill(self) -> None:
        with self._lock:
            if self._worker:
                kill_group(self._worker)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise self._cannot_write(e) from None

    def _cannot_write(self, error: OSError) -> UserError:
        problem = f"run directory {self._run.path} cannot be written on {self.node}: {error.strerror}"
        return UserError(f"{problem}; mend that, exclude the node, or choose another place with --root")

    def _check_visible(self, attempt: int) -> None:
        # A directory of the same name may be left on this host's own disk.
        if not self._run.attempts.info(attempt):
            raise UserError(
                f"run directory {self._run.path} is not visible on {self.node}: it must be on a file "
                "system that all nodes share; choose another place with --root"
            )

    # The rendezvous is a file to which process 0 appends a line

    def _rendezvous_file(self) -> Path:
        # A requeued job counts its steps from 0 again, so the number of restarts is part of the name.
        return self._run.rendezvous.file(f"{self._task.step}.{self._task.restart}")

    def _announce(self, attempt: int, coordinator: str) -> None:
        with self._writing(), self._rendezvous_file().open("a", encoding="utf-8") as f:
            f.write(json.dumps([attempt, coordinator]) + "\n")

    def _wait_for_process_0(self) -> tuple[int, str]:
        deadline = time.monotonic() + RENDEZVOUS_SECONDS
        while time.monotonic() < deadline:
            if self._stopped:
                return STOPPED, ""
            try:
                # Whichever task comes first creates the file, and each try opens it anew: NFS would cache for a
                # minute that it is absent.
                with self._rendezvous_file().open("a+", encoding="utf-8") as f:
                    f.seek(0)
                    line = f.read()
            except OSError as e:
                if e.errno in LASTING_ERRORS:
                    raise self._cannot_write(e) from None
                line = ""
            if line.endswith("\n"):  # otherwise the line is still being written
                attempt, coordinator = json.loads(line)
                return attempt, coordinator
            time.sleep(POLL_SECONDS)
        raise UserError(
            f"{self.node} has received nothing from process 0 through {self._run.path} for {RENDEZVOUS_SECONDS:.0f} s: is "
            f"that the same directory on {self._task.nodes[0]}? It must be on a file system that all nodes share"
        )


def device_environment(plan: Plan, task: SlurmTask, visible: int) -> dict[str, str]:
    """The variable that names which of the `visible` GPUs the process uses; none on CPU. Raises UserError.

    SLURM shows each process either all GPUs of its node or its own alone. By itself jax would use one GPU in each
    process of a step (https://github.com/jax-ml/jax/issues/16788).
    """
    if plan.platform == "cpu":
        return {}
    wanted = plan.devices_per_process
    if visible == wanted:
        first = 0
    elif visible == wanted * task.processes_per_node:
        first = task.local_process * wanted
    else:
        raise UserError(
            f"{task.node} shows {visible} GPUs to process {task.process}; the plan for cluster "
            f'"{plan.cluster}" has {wanted} for each of the {task.processes_per_node} processes of a node'
        )
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(str(first + i) for i in range(wanted))}


def _network_environment() -> dict[str, str]:
    """The cluster's interface for NCCL, too, unless the user has named another one to NCCL."""
    interface = os.environ.get(INTERFACE)
    return {"NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", interface)} if interface else {}


class _Reports:
    """Lines of JSON for the launcher."""

    def __init__(self, task: SlurmTask):
        self._sender = {"process": task.process, "host": task.node, "step": task.step}
        self._lock = threading.Lock()

    def send(self, **fields: Any) -> None:
        with self._lock:
            print(json.dumps(self._sender | fields), flush=True)

    def send_heartbeats(self) -> None:
        while True:
            self.send()
            time.sleep(HEARTBEAT_SECONDS)


def _read_commands(host: SlurmTaskHost) -> None:
    for line in sys.stdin.buffer:
        if line.strip() == b"stop":
            host.request_stop()
    # End of file: the launcher has closed the channel, or is gone.
    host.kill()
    os._exit(1)


def main() -> None:
    """Entry point of `python -m podlaunch.host task RUN ATTEMPT`, a task of the launcher's srun; never returns."""
    task = current_task()
    assert task is not None
    run = RunDirectory(Path(sys.argv[1]))
    host, reports = SlurmTaskHost(task, run), _Reports(task)
    # SLURM signals the worker, too, but this process may get the signal before the worker exists.
    signal.signal(signal.SIGTERM, lambda *_: host.request_stop())
    threading.Thread(target=reports.send_heartbeats, name="heartbeat", daemon=True).start()
    threading.Thread(target=_read_commands, args=(host,), name="commands", daemon=True).start()
    cause = error = ""
    try:
        start_worker_on(host, run, int(sys.argv[2]))
        code = host.wait()
        if host.is_out_of_memory(code):
            cause, error = (
                OUT_OF_MEMORY,
                f"the kernel ended it on {host.node}; raise the job's memory for each process",
            )
    except UserError as e:
        code, error = EXIT_USER_ERROR, str(e)
    try:
        reports.send(exit=code, cause=cause, error=error)
    finally:
        os._exit(shell_exit_code(code))  # at once: the other threads never end
