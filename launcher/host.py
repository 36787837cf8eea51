"""On a host: starts the worker of one process there and watches it, on behalf of a launcher elsewhere.

It says how the worker does in lines of JSON on its standard output, and is told on its standard input:
`stop` has the worker save and end, end of file ends it at once. srun carries both.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launcher import accelerators
from launcher.place import Place, address, hold_port, in_slurm_step
from launcher.plan import Plan
from launcher.rundir import RunDirectory

WORKER = [sys.executable, "-P", "-m", "podlaunch.host", "worker", "--exit-with-stdin"]
# Not inherited: it would contradict the number of CPU devices that the plan names.
CPU_DEVICES_FLAG = "--xla_force_host_platform_device_count"
INTERFACE = "LAUNCH_INTERFACE"
HEARTBEAT_SECONDS = 3.0
MEETING_SECONDS = 600.0
# In the place of an attempt's number: there is nothing to do, or process 0 is refused.
CALLED_OFF, REFUSED = 0, -1
REFUSED_WORDS = "process 0 was refused; see what it has said"


def worker_environment(plan: Plan, process: int, coordinator: str) -> dict[str, str]:
    """What a worker finds in its environment besides the user's own."""
    environment = {
        "LAUNCH_COORDINATOR": coordinator,
        "LAUNCH_PROCESSES": str(plan.processes),
        "LAUNCH_PROCESS": str(process),
        "LAUNCH_RUN": plan.run_directory,
    }
    if plan.platform == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(plan.devices_per_process)}
    return environment


def start_worker(
    plan: Plan, run: RunDirectory, attempt: int, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """In a session of its own, writing to its log. It ends when the standard input that we hold is closed."""
    inherited = dict(os.environ)
    flags = [f for f in inherited.get("XLA_FLAGS", "").split() if not f.startswith(CPU_DEVICES_FLAG)]
    inherited["XLA_FLAGS"] = " ".join(flags)
    with run.log(attempt, int(environment["LAUNCH_PROCESS"])).open("ab") as log:
        return subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=inherited | environment,
            start_new_session=True,
        )


class Host:
    """The worker of one task of a SLURM step, from meeting the others to its end."""

    def __init__(self, place: Place, run: RunDirectory):
        self.place, self._run = place, run
        self.node = place.node
        self._lock = threading.RLock()  # a signal handler may find its own thread holding it
        self._worker: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._port: socket.socket | None = None

    def start(self, attempt: int | None = None) -> bool:
        """Meet the others and start the worker, unless process 0 calls it off.

        Without an `attempt`, process 0 has yet to begin one.
        """
        if attempt is not None:
            self._check_visible(attempt)
        if self.place.process == 0:
            assert attempt is not None
            attempt, coordinator = self._call(attempt)
        else:
            attempt, coordinator = self._listen()
        if attempt == REFUSED:
            raise UserError(REFUSED_WORDS)
        if attempt == CALLED_OFF:
            return False
        plan = self._plan()
        environment = {
            **_network(),
            **worker_environment(plan, self.place.process, coordinator),
            **devices(plan, self.place, accelerators.num_nvidia_gpus()),
        }
        with self._lock:
            try:
                self._worker = start_worker(plan, self._run, attempt, environment)
            except OSError as e:
                raise UserError(
                    f"{self._run.path} cannot be written on {self.place.node}: {e.strerror}"
                ) from None
            if self._stopped:
                self._worker.terminate()
        return True

    def call_off(self, why: int = CALLED_OFF) -> None:
        """Process 0 to the others: there is nothing to do, or it is refused."""
        self._tell(why, "")

    def wait(self) -> int:
        """Exit code of the worker, or minus the signal that killed it."""
        assert self._worker is not None
        return self._worker.wait()

    def ask_to_stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._worker:
                self._worker.terminate()

    def kill(self) -> None:
        with self._lock:
            if self._worker and self._worker.poll() is None:
                os.killpg(self._worker.pid, signal.SIGKILL)

    def _plan(self) -> Plan:
        plan = self._run.plan()
        assert plan is not None  # written before the attempt began
        return plan

    def _check_visible(self, attempt: int) -> None:
        # A directory of the same name may be left on this host's own disk.
        if not self._run.where(attempt):
            raise UserError(
                f"run directory {self._run.path} is not visible on {self.place.node}: it must be on a file "
                "system that all nodes share; choose another place with --root"
            )

    # Where the processes of a step meet: a file that process 0 fills

    def _meeting(self) -> Path:
        return self._run.meeting(f"{self.place.step}.{self.place.restart}")

    def _call(self, attempt: int) -> tuple[int, str]:
        host = address(self.place, os.environ.get(INTERFACE))
        self._port = hold_port(host)
        coordinator = f"{host}:{self._port.getsockname()[1]}"
        self._tell(attempt, coordinator)
        return attempt, coordinator

    def _tell(self, attempt: int, coordinator: str) -> None:
        with self._meeting().open("a", encoding="utf-8") as f:
            f.write(json.dumps([attempt, coordinator]) + "\n")

    def _listen(self) -> tuple[int, str]:
        deadline = time.monotonic() + MEETING_SECONDS
        while time.monotonic() < deadline:
            try:
                # Made by whoever comes first, and opened anew each time: NFS would keep its absence for a minute.
                with self._meeting().open("a+", encoding="utf-8") as f:
                    f.seek(0)
                    line = f.read()
            except OSError:
                line = ""
            if line.endswith("\n"):
                attempt, coordinator = json.loads(line)
                return attempt, coordinator
            time.sleep(0.1)
        raise UserError(
            f"{self.place.node} has heard nothing of process 0 in {self._run.path} for {MEETING_SECONDS:.0f} s: is "
            f"that the same directory on {self.place.nodes[0]}? It must be on a file system that all nodes share"
        )


def devices(plan: Plan, place: Place, visible: int) -> dict[str, str]:
    """Which of the `visible` GPUs are the process's: jax by itself would take one in each process of a step.

    SLURM shows each process all GPUs of its node, or its own alone.
    """
    if plan.platform == "cpu":
        return {}
    wanted = plan.devices_per_process
    if visible == wanted:
        first = 0
    elif visible == wanted * place.processes_per_node:
        first = place.local_process * wanted
    else:
        raise UserError(
            f"{place.node} shows {visible} GPUs to process {place.process}; the plan for cluster "
            f'"{plan.cluster}" has {wanted} for each of the {place.processes_per_node} processes of a node'
        )
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(str(first + i) for i in range(wanted))}


def _network() -> dict[str, str]:
    """The interface asked for, for NCCL, too, unless the user has told it another."""
    interface = os.environ.get(INTERFACE)
    return {"NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", interface)} if interface else {}


def exit_code(code: int) -> int:
    """As a shell gives it: 128 + N for what signal N has killed."""
    return code if code >= 0 else 128 - code


class _Channel:
    """What this host tells the launcher."""

    def __init__(self, place: Place):
        self._who = {"process": place.process, "host": place.node, "step": place.step}
        self._lock = threading.Lock()

    def __call__(self, **words: Any) -> None:
        with self._lock:
            print(json.dumps(self._who | words), flush=True)

    def beat(self) -> None:
        while True:
            self()
            time.sleep(HEARTBEAT_SECONDS)


def _obey(host: Host) -> None:
    for line in sys.stdin.buffer:
        if line.strip() == b"stop":
            host.ask_to_stop()
    host.kill()
    os._exit(1)


def main() -> None:
    """Entry point of `python -m podlaunch.host task RUN ATTEMPT`, a task of the launcher's srun; never returns."""
    place = in_slurm_step()
    assert place is not None
    host, say = Host(place, RunDirectory(Path(sys.argv[1]))), _Channel(place)
    # SLURM signals the worker, too. It may be there before the worker is.
    signal.signal(signal.SIGTERM, lambda *_: host.ask_to_stop())
    threading.Thread(target=say.beat, name="heartbeat", daemon=True).start()
    threading.Thread(target=_obey, args=(host,), name="commands", daemon=True).start()
    try:
        host.start(int(sys.argv[2]))
        code, error = host.wait(), ""
    except UserError as e:
        code, error = 2, str(e)
    try:
        say(exit=code, error=error)
    finally:
        os._exit(exit_code(code))  # at once: the other threads read and write for ever


if __name__ == "__main__":
    main()
