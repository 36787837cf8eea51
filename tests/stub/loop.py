"""trainer/loop.py without a network: its state is a hash chain of the samples it was given.

It reports, saves, stops and resumes as the real one does. Two things the environment may ask of it:
STUB_STEP_SECONDS, how long a step takes, and STUB_GATE, a file with the last step that may be taken as yet.
"""

import hashlib
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from configs import checkpoints, google
from configs.schema import RunConfig, num_examples

STEP_SECONDS = float(os.environ.get("STUB_STEP_SECONDS", "0.02"))
GATE = os.environ.get("STUB_GATE")
GATE_SECONDS = 0.02


@dataclass(frozen=True)
class Outcome:
    status: str
    step: int
    epoch: float
    metrics: dict[str, float]
    images_per_second: float
    seconds: dict[str, float]


def train(
    config: RunConfig, *, steps: int, directory: Path, report: Callable[..., None], stop_requested: Callable[[], bool]
) -> Outcome:  # fmt: skip
    return _Training(config, steps, directory, report, stop_requested).run()


class _Training:
    def __init__(
        self, config: RunConfig, steps: int, directory: Path, report: Callable[..., None],
        stop_requested: Callable[[], bool],
    ):  # fmt: skip
        self.config, self.steps, self.report, self.stop_requested = config, steps, report, stop_requested
        self.seconds: dict[str, float] = defaultdict(float)
        self.metrics: dict[str, float] = {}
        num_train, self.num_eval = num_examples(config.data)
        self.steps_per_epoch = num_train / config.train.batch_size
        print(f"process {jax.process_index()} begins", flush=True)
        report(phase="opening data")
        with self.span("open_data"):
            pass
        report(phase="initialising")
        self.checkpoints = _Checkpoints(config.checkpoint.directory or str(directory / "checkpoints"))
        with self.span("restore"):
            self.step, self.state = self.checkpoints.newest() or (0, _hash(config.train.seed))
        self.start = self.step
        if not self.start:
            with self.span("initialise"):
                pass
        if jax.process_index() == 0:
            _write(config.log.tensorboard or str(directory / "tensorboard"), "events.out.tfevents.stub", b"")
        report(phase="compiling", step=self.start, start=self.start, steps=steps)
        with self.span("compile"):
            jax.gather("compiled")

    def run(self) -> Outcome:
        """Step, save, evaluate, log; until the last step or an agreed stop."""
        stopping, begun, saved_at = False, time.perf_counter(), time.monotonic()
        if self.start and self._evaluation_due():
            self._evaluate()
        while self.step < self.steps and not stopping:
            minutes = self.config.checkpoint.every_minutes
            save_wanted = minutes is not None and time.monotonic() - saved_at > 60 * minutes
            said = jax.gather([self.state, self.stop_requested(), save_wanted, self._is_held()])
            assert {state for state, *_ in said} == {self.state}, "the processes do not train the same"
            stopping = any(stop for _, stop, _, _ in said)
            if said[0][3] and not stopping:
                time.sleep(GATE_SECONDS)
                continue
            first = self.step == self.start
            with self.span("first_batch" if first else "data_wait"):
                pass
            with self.span("first_step" if first else "compute"):
                time.sleep(STEP_SECONDS)
                size = self.config.train.batch_size
                self.state = _hash(self.state, self.config.train.seed, self.step * size, size)
                self.step += 1
            if first:
                self.report(phase="training", step=self.step, seconds=dict(self.seconds))
            if stopping or said[0][2] or self._save_due():
                saved_at = time.monotonic()
                self._save()
            if self._evaluation_due() and not stopping:
                self._evaluate()
            self._log(stopping)
        self.report(phase="saving")
        done = (self.step - self.start) * self.config.train.batch_size
        return Outcome(
            status="completed" if self.step == self.steps and "eval/count" in self.metrics else "stopped",
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            metrics=self.metrics,
            images_per_second=done / (time.perf_counter() - begun),
            seconds=dict(self.seconds),
        )

    @contextmanager
    def span(self, activity: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[activity] += time.perf_counter() - begun

    def _is_held(self) -> bool:
        """Whether the next step is not to be taken yet; what process 0 says counts."""
        try:
            return GATE is not None and self.step >= int(Path(GATE).read_text())
        except FileNotFoundError:
            return False

    def _evaluation_due(self) -> bool:
        every = (self.config.train.eval_every_epochs or float("inf")) * self.steps_per_epoch
        return self.step == self.steps or self.step // every > (self.step - 1) // every

    def _save_due(self) -> bool:
        every = self.config.checkpoint.every_steps
        return self._evaluation_due() or (every is not None and self.step % every == 0)

    def _save(self) -> None:
        with self.span("checkpoint"):
            if jax.process_index() == 0:
                size, seed = self.config.train.batch_size, self.config.train.seed
                position = {"position": self.step * size, "seed": seed, "digest": "stub"}
                self.checkpoints.save(self.step, self.state, position, keep=self.config.checkpoint.keep_last)
            jax.gather("saved")

    def _evaluate(self) -> None:
        self.report(phase="evaluating", step=self.step)
        with self.span("evaluation"):
            self.metrics |= {
                "eval/accuracy": _fraction(self.state),
                "eval/loss": 1.0,
                "eval/count": self.num_eval,
            }
        self.report(**self.metrics, phase="training")

    def _log(self, stopping: bool) -> None:
        if self.step % self.config.log.every_steps and self.step != self.steps and not stopping:
            return
        self.metrics |= {
            "train/loss": _fraction(self.state),
            "train/accuracy": _fraction(self.state),
            "train/grad_norm": 1.0,
            "train/learning_rate": self.config.optimizer.learning_rate,
            "speed/images_per_second": self.config.train.batch_size / (STEP_SECONDS or 0.001),
            "speed/data_wait_share": 0.0,
            "step_seconds/total": STEP_SECONDS,
            "step_seconds/data_wait": 0.0,
            "step_seconds/checkpoint_stall": 0.0,
            "step_seconds/compute": STEP_SECONDS,
        }
        epoch, data = self.step / self.steps_per_epoch, {"data/ready_batches": 1}
        self.report(
            step=self.step, epoch=epoch, seconds=dict(self.seconds), bound="compute-bound", **self.metrics, **data
        )  # fmt: skip


def _hash(*words: Any) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _fraction(state: str) -> float:
    """Some figure that tells two states apart."""
    return int(state[:8], 16) / 2**32


class _Checkpoints:
    """Complete as configs/checkpoints.py has it: by a folder's name, or by an object that is written last."""

    def __init__(self, place: str):
        self._place = place
        if not place.startswith("gs://") and jax.process_index() == 0:
            for unfinished in Path(place).glob("*.tmp"):
                shutil.rmtree(unfinished)

    def newest(self) -> tuple[int, str] | None:
        steps = checkpoints.steps(self._place)
        if not steps:
            return None
        return steps[-1], _read(f"{self._place}/{steps[-1]}", "state/chain").decode()

    def save(self, step: int, state: str, position: dict[str, Any], *, keep: int) -> None:
        in_bucket = self._place.startswith("gs://")
        place = f"{self._place}/{step}" if in_bucket else f"{self._place}/{step}.tmp"
        _write(place, "state/chain", state.encode())
        _write(place, "data/metadata", json.dumps(position).encode())
        if in_bucket:
            _write(place, checkpoints.COMMITTED, b"")
        else:
            Path(place).rename(f"{self._place}/{step}")
        for old in checkpoints.steps(self._place)[:-keep]:
            _delete(f"{self._place}/{old}")


def _read(place: str, name: str) -> bytes:
    if place.startswith("gs://"):
        bucket, prefix = google.bucket_and_prefix(place)
        return bytes(google.client().bucket(bucket).blob(prefix + name).download_as_bytes())
    return (Path(place) / name).read_bytes()


def _write(place: str, name: str, content: bytes) -> None:
    if place.startswith("gs://"):
        bucket, prefix = google.bucket_and_prefix(place)
        google.client().bucket(bucket).blob(prefix + name).upload_from_string(content, retry=google.retry())
    else:
        file = Path(place) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _delete(place: str) -> None:
    if place.startswith("gs://"):
        bucket, prefix = google.bucket_and_prefix(place)
        for blob in google.client().list_blobs(bucket, prefix=prefix):
            blob.delete()
    else:
        shutil.rmtree(place)
