"""How long a save holds the loop: asynchronous, as the loop saves, against waiting until it is on disk.

The state is that of ResNet-50 with SGD and momentum, filled with noise. Between saves runs a step that
donates and rewrites every leaf, until the files are committed, so that no save waits for the one before.
HeldError means `save` and each `poll` after it; on the synchronous side `save` and `wait`, checksums included.
The last column is the step that follows: it competes with the writing threads. Bar: 0.15.
With --latency the checkpoints go to gs://, that is, to a server here that answers after so many seconds.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks._common import REPOSITORY, print_table, random_leaves, setup, synthetic_config
from configs import checkpoints as places
from configs.schema import CheckpointConfig
from tests import gcs
from trainer.checkpoint import Checkpointer, DataPosition


@jax.jit(donate_argnums=0)
def train_step(leaves: list[jax.Array]) -> list[jax.Array]:
    return [x * 1.001 if jnp.issubdtype(x.dtype, jnp.floating) else x + 1 for x in leaves]


@contextmanager
def place(directory: str | None, latency: float | None) -> Iterator[str]:
    """Where to save: a new folder, or a bucket of a server in a process of its own."""
    if latency is None:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            yield folder
        return
    command = [sys.executable, "-m", "tests.gcs", "--latency", str(latency)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        os.environ |= gcs.environment(server.stdout.readline().strip())
        try:
            yield f"gs://{gcs.BUCKET}/stall"
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--directory", help="where to save; default: the system's temporary folder")
    parser.add_argument("--latency", type=float, help="save to gs://, on a server here, with these seconds")
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that a synchronous save waits
    abstract = setup(synthetic_config("r50"), steps=1000).abstract
    leaves, structure = random_leaves(abstract), jax.tree.structure(abstract)
    size = sum(leaf.nbytes for leaf in leaves)
    held: dict[str, list[float]] = {"asynchronous": [], "synchronous": []}
    next_step: dict[str, list[float]] = {"asynchronous": [], "synchronous": []}
    complete: list[float] = []
    with place(args.directory, args.latency) as where:
        checkpoints = Checkpointer(Path(where), CheckpointConfig(directory=where, keep_last=1, keep_best=0))
        for step in range(1, 2 * args.rounds + 3):
            mode = "synchronous" if step % 2 else "asynchronous"
            begun = saving = time.perf_counter()
            checkpoints.save(step, jax.tree.unflatten(structure, leaves), DataPosition(step, 0, ""))
            if mode == "synchronous":
                checkpoints.wait()
            seconds, steps, committed = time.perf_counter() - begun, [], False
            while not committed:
                committed = step in places.steps(where)
                begun = time.perf_counter()
                leaves = jax.block_until_ready(train_step(leaves))
                stepped = time.perf_counter()
                checkpoints.poll()
                seconds += time.perf_counter() - stepped
                steps.append(stepped - begun)
            took = time.perf_counter() - saving
            checkpoints.wait()
            if step > 2 and mode == "asynchronous":
                complete.append(took)
            if step > 2:  # the first of each compiles, and opens files and pools
                held[mode].append(seconds)
                next_step[mode].append(steps[0])
        checkpoints.close()
    table = [
        [
            mode,
            *(
                f"{1e3 * x:.0f}"
                for x in (statistics.median(s), min(s), max(s), statistics.median(next_step[mode]))
            ),
        ]
        for mode, s in held.items()
    ]
    print(f"{size / 1e6:.0f} MB in {len(leaves)} leaves")
    print_table(["save", "held ms, median", "least", "most", "next step ms"], table)
    ratio = statistics.median(held["asynchronous"]) / statistics.median(held["synchronous"])
    print(f"an asynchronous save is complete after {statistics.median(complete):.2f} s")
    print(f"asynchronous / synchronous: {ratio:.3f} (bar: at most 0.15)")


if __name__ == "__main__":
    main()
