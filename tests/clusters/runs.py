"""Real `launch` commands with real workers on this machine: typed, waited for, read, and ended by pid."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

LONG_SECONDS = 240
LAUNCH = [sys.executable, "-m", "podlaunch"]
STUB = Path(__file__).parents[1] / "stub"
CLUSTER = "local-2"
BATCH, STEPS, SAVE_EVERY = 64, 40, 8
# A constant rate: then runs of every length share one compiled step.
TINY = f"""
model: {{name: resnet4, num_classes: 10, stem: small, width: 32, dtype: float32, batch_norm: 16}}
data: {{source: digits, image_size: 8}}
augment: {{flip: false}}
train: {{batch_size: {BATCH}, steps: {STEPS}, eval_every_epochs: null}}
optimizer: {{learning_rate: 0.02}}
schedule: {{name: constant}}
checkpoint: {{every_steps: {SAVE_EVERY}}}
log: {{every_steps: 1}}
"""


def wait_until(condition: Callable[[], object], what: str, seconds: float = LONG_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


class Command:
    """A `launch` command that was typed; its output goes to a file."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], output: Path, inside: Sequence[str] = ()
    ):
        """`inside`: the command line that runs it elsewhere."""
        self._output = output
        with output.open("wb") as f:
            self.process = subprocess.Popen(
                [*inside, *LAUNCH, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def text(self) -> str:
        return self._output.read_text()

    def wait(self, seconds: float = LONG_SECONDS) -> int:
        return self.process.wait(seconds)


class TerminalCommand:
    """One typed in a terminal of its own; `press` is the keyboard."""

    # The shell's part: a session whose controlling terminal is this one, so that Ctrl-C becomes a signal.
    LOGIN = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        self._keyboard, terminal = pty.openpty()
        self._received = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.LOGIN, *LAUNCH, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment | {"TERM": "xterm"},
        )
        os.close(terminal)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self._received += os.read(self._keyboard, 65536)
            except OSError:  # the last process on the terminal has ended
                return

    def press(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    @property
    def text(self) -> str:
        return self._received.decode(errors="replace")

    def wait(self, seconds: float = LONG_SECONDS) -> int:
        code = self.process.wait(seconds)
        self._reader.join()
        return code


class Run:
    """One run: the commands typed at it, and what they leave in its directory."""

    def __init__(self, folder: Path, recipe: Path, environment: dict[str, str], *, stub: bool):
        """`stub`: workers do without jax, see tests/stub."""
        self.folder, self.recipe = folder, recipe
        self._gate = folder / "gate"
        self.environment = environment | (self.stub_environment() if stub else {})
        self.root = folder / "runs"
        self.path = self.root / recipe.stem
        self._commands: list[Command | TerminalCommand] = []

    def arguments(self, *more: str, cluster: str | None = CLUSTER) -> list[str]:
        where = [] if cluster is None else ["--cluster", cluster]
        return [str(self.recipe), "--root", str(self.root), *where, *more]

    def launch(self, *more: str, cluster: str | None = CLUSTER) -> Command:
        """Type `launch RECIPE …`, and leave it running."""
        return self._typed(self.arguments(*more, cluster=cluster))

    def launch_in_terminal(self, *more: str) -> TerminalCommand:
        command = TerminalCommand(self.arguments(*more), self.environment)
        self._commands.append(command)
        return command

    def command(self, name: str, *more: str) -> Command:
        """Type `launch status …` and the like, and leave it running."""
        return self.plain(name, *more, "--root", str(self.root))

    def plain(self, *arguments: str) -> Command:
        """Type a `launch` command that knows no runs, and leave it running."""
        return self._typed(list(arguments))

    def _typed(self, arguments: list[str]) -> Command:
        output = self.folder / f"output-{len(self._commands)}.txt"
        command = Command(arguments, self.environment, output)
        self._commands.append(command)
        return command

    def stub_environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(STUB), "STUB_GATE": str(self._gate)}

    def hold_at(self, step: int) -> None:
        """No stub goes on from `step` before it is let go, but to stop."""
        new = self._gate.with_suffix(".new")
        new.write_text(str(step))
        new.replace(self._gate)

    def let_go(self) -> None:
        self._gate.unlink()

    def end(self) -> None:
        for command in self._commands:
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait()
        wait_until(lambda: not self.workers(), "the workers end with their launcher")

    # What is there

    def result(self) -> dict:
        return json.loads((self.path / "result.json").read_text())

    def attempts(self) -> list[dict]:
        try:
            return [json.loads(line) for line in (self.path / "attempts.jsonl").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def report(self, process: int = 0) -> dict:
        try:
            return json.loads((self.path / "hosts" / f"{process}.json").read_text())
        except FileNotFoundError:
            return {}

    def checkpoint_steps(self) -> list[int]:
        return sorted(int(p.name) for p in (self.path / "checkpoints").glob("*") if p.name.isdigit())

    def data_position(self, step: int) -> int:
        return json.loads((self.path / f"checkpoints/{step}/data/metadata").read_text())["position"]

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Every array of a checkpoint, by name."""
        folder = self.path / f"checkpoints/{step}/state"
        chain = folder / "chain"
        if chain.exists():  # the stub's
            return {"chain": np.frombuffer(chain.read_bytes(), np.uint8)}
        import jax
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as checkpointer:
            names = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            return checkpointer.restore(folder, restore_args=as_numpy)

    def log(self, attempt: int, process: int = 0) -> str:
        return (self.path / f"logs/attempt-{attempt}/host-{process}.log").read_text()

    def workers(self) -> dict[int, int]:
        """Process id by process number of every worker of this run that lives, from the process table."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            if f"LAUNCH_RUN={self.path}".encode() in environment:
                number = next(v for v in environment if v.startswith(b"LAUNCH_PROCESS="))
                found[int(number.partition(b"=")[2])] = int(process.name)
        return found

    def are_gone(self, gang: dict[int, int]) -> bool:
        """Whether no worker of `gang` lives; others may."""
        return not set(gang.values()) & set(self.workers().values())

    # What is waited for, and done

    def wait_until(
        self,
        condition: Callable[[], object],
        what: str,
        seconds: float = LONG_SECONDS,
        *,
        watching: Command | None = None,
    ) -> None:
        """Wait while a command runs, the newest unless told."""
        command = watching or self._commands[-1]

        def met() -> bool:
            done = bool(condition())
            assert done or command.process.poll() is None, f"it ended before {what}:\n{command.text}"
            return done

        wait_until(met, what, seconds)

    def wait_for_step(self, step: int, *, attempt: int = 1) -> None:
        """Until process 0 has trained to `step` in `attempt`."""

        def reached() -> bool:
            report = self.report()
            begun = (self.path / f"logs/attempt-{attempt}").is_dir()
            return begun and report.get("phase") == "training" and report.get("step", 0) >= step

        self.wait_until(reached, f"step {step} of attempt {attempt}")

    def kill_workers(self, *processes: int) -> None:
        """SIGKILL, as the kernel does when memory runs out."""
        self._signal(signal.SIGKILL, processes)

    def _signal(self, number: int, processes: tuple[int, ...]) -> None:
        pids = self.workers()
        for process in processes:
            os.kill(pids[process], number)

    def freeze(self, *processes: int) -> None:
        """Workers stop where they are, and do not leave by themselves when others end."""
        self._signal(signal.SIGSTOP, processes)

    def thaw(self, *processes: int) -> None:
        self._signal(signal.SIGCONT, processes)

    def kill_with_launcher(self, launched: Command) -> None:
        """SIGKILL to the launcher and to all workers, of which some may be quicker to leave by themselves."""
        pids = self.workers()
        launched.process.kill()
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def assert_saved(self, text: str, verdict: str) -> None:
        """It was stopped before its end, lost nothing, and has told in `text` how to resume it."""
        attempt, result = self.attempts()[-1], self.result()
        assert (attempt["verdict"], attempt["failure"], attempt["steps_lost"]) == (verdict, None, 0)
        assert result["status"] == verdict
        assert 0 < result["step"] == attempt["kept_step"] == self.checkpoint_steps()[-1] < STEPS
        assert re.search(rf"^resume +launch {self.recipe} --root {self.root} ", text, re.MULTILINE)
        assert self.workers() == {}

    def assert_same_bits(self, other: "Run", step: int = STEPS) -> None:
        mine, others = self.arrays(step), other.arrays(step)
        assert mine.keys() == others.keys()
        assert [name for name in mine if not np.array_equal(mine[name], others[name])] == []
        assert self.result()["metrics"]["train/loss"] == other.result()["metrics"]["train/loss"]
