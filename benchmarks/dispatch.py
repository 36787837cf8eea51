"""Host time of one call of the train step: flat leaves, as the loop calls it, against nnx.jit.

The clock stops when the call returns, not when the device is done, and each call starts on an idle device.
A call costs time per argument and per result, whatever their size: so the networks are whole (ResNet-50 and
ResNet-152, every leaf of weights, statistics and momentum) but narrow, on one tiny image a device, and
compiled without optimisation. "Until done" shows that the device still computes when the call returns; "on
the CPU" is the calling thread's own time, which other programs do not stretch. Bars: 3 ms for ResNet-50,
8 ms for ResNet-152.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import models
from benchmarks._common import Setup, print_table, random_leaves, setup, synthetic_config
from configs.schema import RunConfig
from trainer.step import Batch

BARS_MS = {"r50": 3.0, "r152": 8.0}
TINY = ["model.width=8", "model.batch_norm=global", "data.image_size=32"]

Call = Callable[[], jax.Array]
"""One train step; returns something to wait for."""


def flat(s: Setup) -> tuple[Call, Call]:
    """Our step, compiled ahead of time as trainer/loop.py does, and called through jax.jit."""
    leaves = random_leaves(s.abstract)

    def call(step: Callable[..., tuple[list[jax.Array], jax.Array]]) -> jax.Array:
        nonlocal leaves
        leaves, metrics = step(leaves, s.batch, s.requests)
        return metrics

    return partial(call, s.step.lower(leaves, s.batch, s.requests).compile()), partial(call, s.step)


def usual(config: RunConfig, s: Setup) -> Call:
    """The same training as flax's guides write it."""
    model = models.build(config.model, nnx.Rngs(0))
    decay = partial(jax.tree.map, lambda p: p.ndim > 1)
    o = config.optimizer
    tx = optax.chain(
        optax.add_decayed_weights(o.weight_decay, decay), optax.sgd(s.schedule, o.momentum, o.nesterov)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
        def loss_fn(model: nnx.Module) -> jax.Array:
            logits = model(batch.images / 255, train=True)
            targets = optax.smooth_labels(
                jax.nn.one_hot(batch.labels, logits.shape[-1]), config.train.label_smoothing
            )
            return optax.softmax_cross_entropy(logits, targets).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return jnp.stack([loss, optax.tree.norm(grads)])

    return lambda: step(model, optimizer, s.batch)


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Median milliseconds of each, taken in turn: of the call, on the CPU, until done."""
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            begun, cpu_begun = time.perf_counter(), time.thread_time()
            result = call()
            returned, cpu = time.perf_counter() - begun, time.thread_time() - cpu_begun
            jax.block_until_ready(result)
            if i >= 2:  # the first calls compile and fill jax's caches
                times[name].append((returned, cpu, time.perf_counter() - begun))
    return {
        name: [1e3 * statistics.median(column) for column in zip(*ts, strict=True)]
        for name, ts in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--recipe", choices=BARS_MS, action="append", help="default: both")
    args = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    table, last = [], []
    for recipe in args.recipe or BARS_MS:
        config = synthetic_config(recipe, [*TINY, f"train.batch_size={jax.device_count()}"])
        s = setup(config, steps=1000)
        compiled, jitted = flat(s)
        calls = {"compiled, as the loop": compiled, "jax.jit": jitted, "nnx.jit": usual(config, s)}
        times = measure(calls, args.rounds)
        table += [[f"{recipe} {name}", *(f"{ms:.2f}" for ms in times[name])] for name in calls]
        ours, theirs = times["compiled, as the loop"][0], times["nnx.jit"][0]
        leaves = len(jax.tree.leaves(s.abstract))
        last.append(
            f"{recipe}, {leaves} leaves: {ours:.2f} ms (bar: {BARS_MS[recipe]:g}); "
            f"nnx.jit takes {theirs / ours:.1f} times that"
        )
    print_table(["median ms", "call", "on the CPU", "until done"], table)
    print("\n".join(last))


if __name__ == "__main__":
    main()
