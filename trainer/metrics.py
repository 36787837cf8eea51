"""What a run reports: TensorBoard events, and the figures behind the progress line."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from trainer.grid import captioned_grid
from trainer.step import StepMetrics
from trainer.upload import Uploader

INPUT_BOUND_SHARE = 0.1
"""A run that waits for data for more than this share of its time is called input-bound."""


class Stopwatch:
    """Wall seconds by activity. Time outside of all spans is compute: the loop waits for the devices."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, activity: str) -> Iterator[None]:
        """Count the time within the context as `activity`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - started


class LogInterval:
    """The train metrics since the last log entry. Its clock stops during evaluation."""

    def __init__(self, batch_size: int, stopwatch: Stopwatch):
        self._batch_size = batch_size
        self._stopwatch = stopwatch
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._steps: list[StepMetrics] = []
        self._started = time.perf_counter()
        self._before = dict(self._stopwatch.seconds)

    def add(self, step: StepMetrics) -> None:
        """Add the metrics of one step."""
        self._steps.append(step)

    def __len__(self) -> int:
        return len(self._steps)

    def summary(self) -> dict[str, float]:
        """Means over the interval, images a second, and seconds a step by activity, by TensorBoard's names."""
        n = len(self._steps)
        spent = {
            activity: seconds - self._before.get(activity, 0.0)
            for activity, seconds in self._stopwatch.seconds.items()
        }
        elapsed = time.perf_counter() - self._started - spent.get("evaluation", 0.0)
        # What the loop does between waiting and saving is to wait for the devices.
        data_wait = spent.get("data_wait", 0.0)
        checkpoint = spent.get("checkpoint", 0.0)
        return {
            "train/loss": float(np.mean([s.loss for s in self._steps])),
            "train/accuracy": float(np.mean([s.accuracy for s in self._steps])),
            "train/grad_norm": float(np.mean([s.grad_norm for s in self._steps])),
            "train/learning_rate": self._steps[-1].learning_rate,
            "speed/images_per_second": n * self._batch_size / elapsed,
            "speed/data_wait_share": data_wait / elapsed,
            "step_seconds/total": elapsed / n,
            "step_seconds/data_wait": data_wait / n,
            "step_seconds/checkpoint_stall": checkpoint / n,
            "step_seconds/compute": (elapsed - data_wait - checkpoint) / n,
        }


def bottleneck(data_wait_share: float) -> str:
    """What limits the speed, in words."""
    return "input-bound" if data_wait_share > INPUT_BOUND_SHARE else "compute-bound"


class TensorBoard:
    """Event files in a folder or under gs://. A process for which `active` is false writes nothing.

    When a run resumes from step `start`, TensorBoard drops what an earlier attempt wrote about later steps.
    """

    def __init__(self, logdir: str, *, active: bool, start: int = 0):
        self._writer: SummaryWriter | None = None
        self._uploader: Uploader | None = None
        if not active:
            return
        if logdir.startswith("gs://"):
            self._uploader = Uploader(logdir)
            logdir = str(self._uploader.folder)
        # Flushed often, so that TensorBoard shows a run within seconds of what happens.
        self._writer = SummaryWriter(logdir, flush_secs=5, purge_step=start + 1 if start else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write one value for each name."""
        for name, value in values.items() if self._writer else ():
            self._writer.add_scalar(name, value, step)  # type: ignore[union-attr]

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text, which may be Markdown."""
        if self._writer:
            self._writer.add_text(name, text, step)

    def hyperparameters(self, text: str) -> None:
        """Write the run's config, as YAML."""
        self.text(0, "config", f"```yaml\n{text}\n```")

    def images(self, step: int, name: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """Write a grid of images (n, height, width, 3) uint8 with a caption below each."""
        if self._writer and len(images):
            self._writer.add_image(name, captioned_grid(images, captions), step, dataformats="HWC")

    def close(self) -> None:
        """Flush all events; under gs://, upload the last of them."""
        if self._writer:
            self._writer.close()
        if self._uploader:
            self._uploader.close()


def fetch_local_rows(array: Any) -> np.ndarray:
    """The rows of a batch-sharded array that this process holds, in ascending order, as one numpy array."""
    # Devices along the model axis hold copies of the same rows; the dict keeps one copy of each.
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def logdir(directory: Path, configured: str | None) -> str:
    """Where event files go: to the place that the recipe names, or to tensorboard/ in the run directory."""
    return configured or str(directory / "tensorboard")
