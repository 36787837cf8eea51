"""Images a second of the real loop against a bare `for` around the same compiled step.

The real side is one call of trainer.loop.train as a worker makes it: Grain, transfer to the device, metrics,
TensorBoard at the shipped interval, and the worker's report file. The bare side calls the step on one batch
that is on the device already. They take turns: where the loop asks `stop_requested`, before a step, it is
held after every 50 steps until its device is idle, and the bare side has its 50. Compilation, the first
steps, the evaluation and the save at the end thus fall outside. Bar: 0.98 of the bare `for`.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax

from benchmarks._common import print_table, random_leaves, setup, synthetic_config
from configs.schema import RunConfig
from launcher.host.worker import Membership, Reporter
from launcher.rundir import RunDirectory
from trainer.loop import train

WARM_UP_STEPS = 10
SMALL = [
    "model.width=32",
    "model.dtype=float32",
    "model.batch_norm=global",
    "data.image_size=64",
    "data.eval.num_examples=32",
    "train.batch_size=32",
    "train.eval_every_epochs=null",
    "checkpoint.every_minutes=null",
]


class BareLoop:
    def __init__(self, config: RunConfig, *, steps: int):
        s = setup(config, steps=steps)
        self._leaves = random_leaves(s.abstract)
        self._inputs = s.batch, s.requests
        self.step = s.step.lower(self._leaves, *self._inputs).compile()

    def seconds(self, steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            self._leaves, _ = self.step(self._leaves, *self._inputs)
        jax.block_until_ready(self._leaves)
        return time.perf_counter() - begun


class TakingTurns:
    """Stands in for `stop_requested`: the clock of the real loop, and what holds it."""

    def __init__(self, bare: BareLoop, *, rounds: int, steps: int):
        self._bare, self._rounds, self._steps = bare, rounds, steps
        self._next_step = 0
        self._begun: float | None = None
        self.seconds: list[tuple[float, float]] = []
        """(loop, bare) of each round."""

    def __call__(self) -> bool:
        self._next_step += 1
        if (self._next_step - 1 - WARM_UP_STEPS) % self._steps == 0 and len(self.seconds) < self._rounds:
            jax.block_until_ready(jax.live_arrays())  # the loop's steps in flight are its own time
            now = time.perf_counter()
            bare = self._bare.seconds(self._steps)
            if self._begun is not None:
                self.seconds.append((now - self._begun, bare))
            self._begun = time.perf_counter()
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="on configs/r18.yaml")
    args = parser.parse_args()
    config = synthetic_config("r18", [*SMALL, *args.overrides])
    steps = config.log.every_steps  # so that each round has one log entry
    total = WARM_UP_STEPS + args.rounds * steps + 1  # the last step is followed by a save and an evaluation
    turns = TakingTurns(BareLoop(config, steps=total), rounds=args.rounds, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        run.attempts.begin({})
        report = Reporter(run, Membership(None, 1, 0))
        train(config, steps=total, directory=run.path, report=report, stop_requested=turns)
    table, images = [], steps * config.train.batch_size
    for i, (loop, bare) in enumerate(turns.seconds, 1):
        ms = [f"{1e3 * seconds / steps:.1f}" for seconds in (loop, bare)]
        table.append([str(i), *ms, f"{images / loop:.1f}", f"{images / bare:.1f}", f"{bare / loop:.3f}"])
    print_table(
        ["round", "loop ms/step", "bare ms/step", "loop images/s", "bare images/s", "loop / bare"], table
    )
    ratio = statistics.median(bare / loop for loop, bare in turns.seconds)
    print(f"loop / bare, median of {args.rounds} rounds: {ratio:.3f} (bar: at least 0.98)")


if __name__ == "__main__":
    main()
