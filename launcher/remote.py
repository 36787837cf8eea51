"""The gang on hosts that are reached by ssh: waits for them, brings them code and Python, and follows their agents.

What it does on a host is a command there; what becomes of a worker is its agent's to know, so a connection may
break at any time, and another launcher can take up where this one has left.
"""

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.clusters import TpuCluster
from configs.errors import UserError
from configs.google import UnreachableError
from launcher import shipping
from launcher.agent import FOLDER, identity, of_slices
from launcher.backends import PREEMPTED, Exit, drain
from launcher.plan import Plan
from launcher.providers import Machine, Provider, Request
from launcher.rundir import RunDirectory
from launcher.ssh import HostError, Ssh, connected

PORT_OF_SLICES = 8080  # libtpu's default
BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
CLOCK_SECONDS = 60.0
CONDITION_SECONDS = 15.0
FIRST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.5, 10.0
# A VM that is there, but out of reach for so long, is given up.
LOST_SECONDS = 60.0
# A host's word in the run directory is at most half a minute old, if it lives; clocks may differ.
WRITES_SECONDS = 90.0
KILL_SECONDS = 10.0
NOTICE_SECONDS = 10.0


def check_secrets(cluster: TpuCluster) -> None:
    """Raises UserError where this machine cannot give the workers theirs."""
    missing = [name for name in cluster.secrets if name not in os.environ]
    if missing:
        raise UserError(
            f"secrets = {', '.join(missing)}: not in the environment; export what the workers are to get"
        )


class _Asked(Exception):  # noqa: N818
    """To end, before anything runs."""


class RemoteGang:
    """The agents of one attempt, from waiting for their hosts to their ends."""

    def __init__(
        self,
        plan: Plan,
        run: RunDirectory,
        attempt: int,
        *,
        provider: Provider,
        name: str,
        request: Callable[[], Request] | None,
        key: str | None,
        adopted: bool,
    ):
        """`request`: what to ask for where the hosts called `name` are gone, if they may be replaced; `key`: what
        they must take from this machine, `user:public key`, unless that is otherwise arranged."""
        self._plan, self._run, self._attempt = plan, run, attempt
        self._cluster = TpuCluster.model_validate(plan.submission)
        self._provider, self._name, self._request, self._key = provider, name, request, key
        self._folder = f"{FOLDER}/{identity(plan.run_directory)}"
        self._running = set(range(plan.processes))
        self._news: queue.SimpleQueue[tuple[float, Exit]] = queue.SimpleQueue()
        self._channels: dict[int, subprocess.Popen[bytes]] = {}
        self._orders: list[bytes] = []
        """`stop` and `kill`, also for hosts that are out of reach at the moment."""
        self._lock = threading.Lock()
        self._asked = threading.Event()
        self._left = threading.Event()
        self._killed: float | None = None
        self._silent_since: dict[int, float] = {}
        self._words: dict[int, str] = {}
        self._machines: list[Machine] = []
        self._seconds: dict[str, float] = {}
        self._copied_bytes = 0
        self._looked = 0.0
        threading.Thread(target=self._work, args=(adopted,), daemon=True).start()

    def poll(self, timeout: float) -> list[Exit]:
        """Of an adopted gang several exits may be news: they come in the order in which they happened."""
        news = sorted(drain(self._news, timeout), key=lambda item: item[0])
        if self._killed is not None and time.monotonic() - self._killed > KILL_SECONDS:
            news += [(0.0, Exit(process, -signal.SIGKILL)) for process in sorted(self._running)]
        exits = [exit_ for _, exit_ in news if exit_.process in self._running]
        self._running -= {exit_.process for exit_ in exits}
        return exits

    def ask_to_stop(self) -> None:
        self._asked.set()
        self._tell(b"stop\n")

    def kill(self) -> None:
        if self._killed is None:
            self._killed = time.monotonic()
            self._asked.set()
            self._tell(b"kill\n")

    def leave(self) -> None:
        self._left.set()
        with self._lock:
            for channel in self._channels.values():
                channel.terminate()

    def stopped_by(self) -> str:
        return PREEMPTED

    def _tell(self, order: bytes) -> None:
        with self._lock:
            self._orders.append(order)
            for channel in self._channels.values():
                self._send(channel, order)

    def _send(self, channel: "subprocess.Popen[bytes]", order: bytes) -> None:
        assert channel.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            channel.stdin.write(order)
            channel.stdin.flush()

    def _end(self, code: int, process: int = 0, host: str = "", cause: str = "", error: str = "") -> None:
        """All processes, because of one."""
        self._news.put((time.time(), Exit(process, code, host, cause, error)))
        for other in range(self._plan.processes):
            if other != process:
                self._news.put((time.time(), Exit(other, -signal.SIGTERM)))

    # The thread that does it all

    def _work(self, adopted: bool) -> None:
        try:
            while not self._left.is_set():
                with self._timed("hosts"):
                    self._machines = self._hosts()
                with connected(self._cluster, self._machines) as ssh:
                    if adopted or self._prepare(ssh):
                        return self._follow(ssh)
                self._asked.wait(NOTICE_SECONDS)
        except _Asked:
            self._end(-signal.SIGTERM)
        except HostError as e:
            words = "; ".join([str(e), *getattr(e, "__notes__", [])])
            self._end(2 if e.is_users else 1, e.process, e.host, "" if e.is_users else "not started", words)
        except UserError as e:
            self._end(2, error=str(e))
        except Exception as e:  # noqa: BLE001 (the outermost layer of this thread: nobody else would end the attempt)
            self._end(1, cause="launcher failed", error=f"{type(e).__name__}: {e}")

    def _go_on(self) -> None:
        if self._asked.is_set() or self._left.is_set():
            raise _Asked

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._seconds[what] = round(time.monotonic() - begun, 3)
        self._go_on()

    def _say(self, words: str, *, queued: bool = False) -> None:
        """Instead of process 0, before it can speak."""
        self._run.write_report(0, {"phase": words, "queued": queued, "time": time.time()})

    def _hosts(self) -> list[Machine]:
        """Wait for the slice; make it anew where it was lost."""
        has_waited, shown = False, ""
        begun = time.monotonic()
        for look in itertools.count():
            self._go_on()
            try:
                condition = self._provider.condition(self._name)
                word = condition.word
                if word == "ready":
                    if self._key:
                        self._provider.let_in(self._name, self._key)
                    return self._provider.machines(self._name)
                if word in ("absent", "lost"):
                    if self._request is None:
                        raise HostError(0, self._name, f"it is {condition}", is_users=True)
                    if has_waited:  # a request that fails in the queue, or is over there, would again
                        raise HostError(0, self._name, str(condition), is_users=True)
                    self._say(f"{self._name} is {condition}: creating it anew", queued=True)
                    self._create(word)
                has_waited = has_waited or word in ("waiting", "creating")
                words = condition.detail or word
            except UnreachableError as e:
                words = str(e)
            except UserError as e:  # a quota that others use up now; the user may stop it
                words = f"refused for now: {e}"
            if words != shown or look % 6 == 0:
                shown = words
                self._say(f"{words}, for {time.monotonic() - begun:.0f} s", queued=True)
            self._asked.wait(min(FIRST_LOOK_SECONDS * 1.3**look, LONGEST_LOOK_SECONDS))
        raise AssertionError

    def _create(self, word: str) -> None:
        assert self._request is not None
        if word == "lost":
            self._provider.delete(self._name)
        self._go_on()  # that may have taken minutes
        self._provider.create(self._request())

    # Before the workers

    def _prepare(self, ssh: Ssh) -> bool:
        """Start the workers, unless their hosts are about to be taken away."""
        check_secrets(self._cluster)
        if len(self._machines) != self._plan.hosts:
            raise UserError(
                f"{self._name} has {len(self._machines)} VMs; cluster {self._plan.cluster} has {self._plan.hosts}: "
                "name the cluster that this TPU is"
            )
        with self._timed("ssh"):
            self._say(f"reaching {self._plan.hosts} hosts by ssh")
            probes = ssh.each(lambda p: self._probe(ssh, p))
        folders = [probe["folder"] for probe in probes]
        with self._timed("copy"):
            self._copy(ssh, probes)
        with self._timed("environment"):
            pythons = ssh.each(lambda p: self._python(ssh, p, folders[p]), at_once=self._plan.hosts)
        with self._timed("checks"):
            self._say("checking the hosts")
            coordinator, notice = self._preflight(ssh, folders, pythons)
        if notice:
            self._say(f"not on these hosts: {notice}; waiting for what becomes of them", queued=True)
            return False
        with self._timed("start"):
            self._say("starting the workers")
            ssh.each(lambda p: self._start(ssh, p, folders[p], pythons[p], coordinator))
        where = {
            "tpu": self._name,
            "agents": [[folder, python] for folder, python in zip(folders, pythons, strict=True)],
            "start_seconds": self._seconds,
            "copied_bytes": self._copied_bytes,
        }
        self._run.write_where(self._attempt, self._run.where(self._attempt) | where)
        return True

    def _probe(self, ssh: Ssh, process: int) -> dict[str, Any]:
        self._go_on()
        begun = time.time()
        command = ("python3", "-I", "-c", BOOTSTRAP.read_text(), "probe", self._folder)
        probe = json.loads(ssh.run(process, *command, seconds=self._cluster.contact_seconds))
        host, needed = self._machines[process].internal, self._cluster.min_disk_gib
        if probe["disk_bytes"] < needed * 2**30:
            raise HostError(
                process, host,
                f"{probe['home']} has {probe['disk_bytes'] / 2**30:.1f} GiB free, min_disk_gib = {needed:g}: make room "
                "there, or lower it", is_users=True,
            )  # fmt: skip
        if not begun - CLOCK_SECONDS < probe["time"] < time.time() + CLOCK_SECONDS:
            raise HostError(
                process, host,
                f"its clock is {probe['time'] - begun:+.0f} s off this machine's: Google's services would refuse one "
                "of them; set the wrong one", is_users=True,
            )  # fmt: skip
        return dict(probe)

    def _copy(self, ssh: Ssh, probes: list[dict[str, Any]]) -> None:
        packed = self._run.code()
        if not packed:
            raise UserError(
                f"{self._run.place} has no code.tar.gz, from which hosts get the code: `launch` it anew"
            )
        code = shipping.Code(packed)
        missing: dict[str, bytes | None] = {}
        for probe in probes:  # most hosts lack the same
            missing.setdefault(_state_of(probe), code.missing(probe["files"]))
        tars = [missing[_state_of(probe)] for probe in probes]
        size = sum(len(tar) for tar in tars if tar)
        self._copied_bytes = size
        self._say(f"copying the code to {sum(1 for tar in tars if tar)} hosts, {size / 2**20:.1f} MiB in all")

        def copy(process: int) -> None:
            tar = tars[process]
            if tar is not None:
                self._go_on()
                receive = ("python3", "-I", "-c", BOOTSTRAP.read_text(), "receive", self._folder)
                ssh.run(process, *receive, text=tar)

        ssh.each(copy)

    def _python(self, ssh: Ssh, process: int, folder: str) -> str:
        self._go_on()
        if self._cluster.python:
            return self._cluster.python
        self._say("making the environment of the hosts from the lock file")
        environments = f"{Path(folder).parent}/environments"
        made = ssh.run(process, "sh", f"{folder}/code/{shipping.SETUP}", environments)
        return made.decode().strip().splitlines()[-1]

    def _module(self, folder: str, python: str, module: str, *arguments: str) -> tuple[str, ...]:
        """The command line of a module of the code on a host."""
        settings = dict(self._cluster.environment)
        settings["PYTHONPATH"] = ":".join(filter(None, [f"{folder}/code", settings.get("PYTHONPATH")]))
        variables = [f"{name}={value}" for name, value in settings.items()]
        return ("env", *variables, python, "-P", "-m", f"launcher.{module}", *arguments)

    def _preflight(self, ssh: Ssh, folders: list[str], pythons: list[str]) -> tuple[str, str]:
        """The address at which the processes are to meet, and a notice that a host has been given. Raises HostError."""
        meeting = self._machines[0].internal
        questions = {"plan": json.loads(self._plan.to_json()), "address": meeting}

        def ask(process: int) -> dict[str, Any]:
            self._go_on()
            text = json.dumps({**questions, "process": process, "ports": first["ports"]}) + "\n"
            folder = folders[process]
            command = self._module(folder, pythons[process], "preflight", folder)
            return self._agreed(process, json.loads(ssh.run(process, *command, text=text.encode())), first)

        listening = ssh.open(0, *self._module(folders[0], pythons[0], "preflight", folders[0]))
        assert listening.stdin is not None
        assert listening.stdout is not None
        try:
            listening.stdin.write((json.dumps({**questions, "process": 0}) + "\n").encode())
            listening.stdin.flush()
            line = listening.stdout.readline()
            if not line:
                assert listening.stderr is not None
                raise HostError(
                    0, meeting, (listening.stderr.read().decode().strip().splitlines() or ["?"])[-1]
                )
            first = json.loads(line)
            self._agreed(0, first, first)
            others = ssh.each(ask, range(1, self._plan.processes))
        finally:
            with contextlib.suppress(OSError):
                listening.stdin.close()
            listening.wait()
        for port in first["ports"]:
            if all(port in answers["ports"] for answers in others):
                return f"{meeting}:{port}", max(answers["notice"] for answers in (first, *others))
        process = next(
            p for p, answers in enumerate(others, start=1) if first["ports"][0] not in answers["ports"]
        )
        raise HostError(
            process, self._machines[process].internal,
            f"it does not reach host 0 at {meeting}, TCP ports {', '.join(map(str, first['ports']))}: let the firewall of "
            f"network {self._cluster.network or 'default'} pass TCP between the VMs", is_users=True,
        )  # fmt: skip

    def _agreed(self, process: int, answers: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
        problems = list(answers["problems"])
        if answers["here"] != first["here"]:
            problems.append(f"it has other code or packages than host 0: {answers['here']}, {first['here']}")
        if problems:
            raise HostError(process, self._machines[process].internal, "; ".join(problems), is_users=True)
        return answers

    def _start(self, ssh: Ssh, process: int, folder: str, python: str, coordinator: str) -> None:
        self._go_on()
        order = {
            "plan": json.loads(self._plan.to_json()),
            "attempt": self._attempt,
            "process": process,
            "coordinator": coordinator,
            "environment": self._cluster.environment | self._of_slices(process),
            "secrets": {name: os.environ[name] for name in self._cluster.secrets},
        }
        command = self._module(folder, python, "agent", "start", folder)
        ssh.run(process, *command, text=json.dumps(order).encode())

    def _of_slices(self, process: int) -> dict[str, str]:
        slices = self._machines[-1].slice + 1
        if slices == 1:
            return {}
        coordinator = f"{self._machines[0].internal}:{PORT_OF_SLICES}"
        return of_slices(coordinator, slices, self._machines[process].slice)

    # While they run

    def _follow(self, ssh: Ssh) -> None:
        agents = self._run.where(self._attempt)["agents"]
        threads = [
            threading.Thread(target=self._listen, args=(ssh, process, *agents[process]), daemon=True)
            for process in range(self._plan.processes)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not self._left.wait(1.0):
            if self._running:
                self._look_after()

    def _listen(self, ssh: Ssh, process: int, folder: str, python: str) -> None:
        try:
            self._hear_out(ssh, process, folder, python)
        except Exception as e:  # noqa: BLE001 (the outermost layer of this thread: nobody else would end the attempt)
            host = self._machines[process].internal
            self._news.put(
                (time.time(), Exit(process, 1, host, "launcher failed", f"{type(e).__name__}: {e}"))
            )

    def _hear_out(self, ssh: Ssh, process: int, folder: str, python: str) -> None:
        """Over as many connections as it takes."""
        command = self._module(folder, python, "agent", "watch", folder, str(self._attempt))
        while process in self._running and not self._left.is_set():
            channel = ssh.open(process, *command)
            with self._lock:
                self._channels[process] = channel
                for order in self._orders:
                    self._send(channel, order)
            assert channel.stdout is not None
            assert channel.stderr is not None
            for line in channel.stdout:
                self._silent_since.pop(process, None)
                words = json.loads(line) if line.startswith(b"{") else {}
                if "exit" in words:
                    self._ended(process, words)
                    channel.terminate()
                    return
            self._words[process] = (
                channel.stderr.read().decode(errors="replace").strip().splitlines() or [""]
            )[-1]
            self._silent_since.setdefault(process, time.monotonic())
            channel.wait()
            self._left.wait(1.0)

    def _ended(self, process: int, words: dict[str, Any]) -> None:
        host = words.get("host", self._machines[process].internal)
        error = words.get("error", "")
        self._news.put((words["time"], Exit(process, words["exit"], host, words.get("cause", ""), error)))

    def _writes(self, process: int) -> bool:
        """Whether a host still writes to the run directory, so that only our way to it is blocked."""
        return time.time() - self._run.report(process).get("time", 0.0) < WRITES_SECONDS

    def _look_after(self) -> None:
        """Tell a slice that was taken away, and a host that is lost, from a connection of ours that is."""
        silent = {
            p: time.monotonic() - since for p, since in list(self._silent_since.items()) if p in self._running
        }
        if not silent and time.monotonic() - self._looked < CONDITION_SECONDS:
            return
        if silent and time.monotonic() - self._looked < 2.0:
            return
        self._looked = time.monotonic()
        try:
            condition = self._provider.condition(self._name)
        except (UnreachableError, UserError):  # it is we who are cut off
            self._silent_since = dict.fromkeys(self._silent_since, time.monotonic())
            return
        if condition.word in ("lost", "absent", "leaving"):
            process = min(self._running, default=0)
            self._end(1, process, self._machines[process].internal, PREEMPTED, f"{self._name} is {condition}")
            self._left.set()
            return
        for process, seconds in silent.items():
            if seconds > LOST_SECONDS and not self._writes(process):
                host = self._machines[process].internal
                error = f"nothing was heard of it for {seconds:.0f} s, and {self._name} is {condition.word}: "
                # What is repaired or restarted by Google is nobody's failure.
                cause = "lost" if condition.word == "ready" else PREEMPTED
                self._news.put(
                    (time.time(), Exit(process, 1, host, cause, error + self._words.get(process, "")))
                )


def _state_of(probe: dict[str, Any]) -> str:
    return json.dumps(probe["files"], sort_keys=True)
