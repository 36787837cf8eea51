"""Our side of benchmarks/accelerator.py, in a process of its own: prints a line of JSON for each thing measured.

python -m benchmarks._accelerator synthetic SECONDS section.key=value …    bare step, its kernels, the loop
python -m benchmarks._accelerator streamed SECONDS section.key=value …     the input alone, the loop on it
"""

import json
import os
import sys
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from benchmarks._common import REPOSITORY
from benchmarks._kernels import kernels_of, summary
from benchmarks.compiled import counted_bytes
from benchmarks.loop_overhead import BareLoop
from configs.load import load
from configs.schema import RunConfig
from launcher.host.worker import Membership, Reporter
from launcher.rundir import RunDirectory
from trainer.data import open_splits
from trainer.data.batches import train_batches
from trainer.loop import train
from trainer.mesh import batch_sharding, make_mesh

WARM_UP_STEPS = 10
TRACED_STEPS = 10
ENDLESS = 100_000
"""Steps: more than any measurement takes."""


def tell(measured: str, **figures: Any) -> None:
    print(json.dumps({"measured": measured, **figures}), flush=True)


class Window:
    """Stands in for `stop_requested`, which the loop asks at each step: a clock for so many seconds, then a stop."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._steps = -WARM_UP_STEPS
        self._begun = self._ended = 0.0

    def __call__(self) -> bool:
        self._ended = time.perf_counter()
        self._steps += 1
        if self._steps <= 0:
            self._begun = self._ended
        return self._ended - self._begun > self._seconds and self._steps > 0

    @property
    def steps_per_second(self) -> float:
        return self._steps / (self._ended - self._begun)


def bare_rate(bare: BareLoop, seconds: float) -> float:
    """Steps per second of a `for` around the compiled step, whose device is waited for every ten steps."""
    steps, took = 0, 0.0
    while took < seconds:
        took += bare.seconds(10)
        steps += 10
    return steps / took


def measure_bare(config: RunConfig, seconds: float) -> BareLoop:
    size, begun = config.train.batch_size, time.perf_counter()
    bare = BareLoop(config, steps=ENDLESS)
    compile_seconds = time.perf_counter() - begun
    bare.seconds(WARM_UP_STEPS)
    rate = bare_rate(bare, seconds)
    tell(
        "bare step",
        images_per_second=rate * size,
        compile_seconds=compile_seconds,
        bytes_per_image=counted_bytes(bare.step.as_text()) / size,
        temporary_bytes=bare.step.memory_analysis().temp_size_in_bytes,
    )
    return bare


def trace(bare: BareLoop) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the calls
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            bare.seconds(TRACED_STEPS)
        tell("kernels", **summary(kernels_of(Path(folder)), TRACED_STEPS))


def measure_input(config: RunConfig, seconds: float) -> None:
    """What the host delivers to the device when nothing trains."""
    split, _ = open_splits(config)
    sharding = batch_sharding(make_mesh(1, 1))
    with closing(train_batches(config, split, sharding, position=0, steps=ENDLESS)) as batches:
        for batch in islice(batches, 2 * config.data.prefetch_batches + 1):  # those that were ready
            jax.block_until_ready(batch)
        begun, taken = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            jax.block_until_ready(next(batches))
            taken += 1
        rate = taken * config.train.batch_size / (time.perf_counter() - begun)
    tell("input alone", images_per_second=rate, cores=len(os.sched_getaffinity(0)))


def measure_loop(config: RunConfig, seconds: float, name: str) -> None:
    """The real loop, as a worker calls it, until the window asks it to stop."""
    window = Window(seconds)
    # The reporter goes on writing, also while the folder is deleted.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = RunDirectory(Path(folder))
        run.attempts.begin({})
        report = Reporter(run, Membership(None, 1, 0))
        outcome = train(config, steps=ENDLESS, directory=run.path, report=report, stop_requested=window)
        spent = outcome.seconds
        tell(
            name,
            images_per_second=window.steps_per_second * config.train.batch_size,
            data_wait_share=spent["data_wait"] / (spent["data_wait"] + spent["compute"]),
        )


def main() -> None:
    what, seconds, *overrides = sys.argv[1:]
    config = load(REPOSITORY / "configs" / "r50.yaml", overrides)
    device = jax.devices()[0]
    tell("device", platform=device.platform, kind=device.device_kind, jax=jax.__version__)
    if what == "synthetic":
        bare = measure_bare(config, float(seconds))
        measure_loop(config, float(seconds), "loop, synthetic")
        trace(bare)  # last, since a profiler may fail where training works
    else:
        measure_input(config, float(seconds))
        measure_loop(config, float(seconds), "loop, streamed")
    os._exit(0)  # as a worker leaves: threads of the reader and the heartbeat would hold the process


if __name__ == "__main__":
    main()
