"""The train step and the evaluation step: jitted, functional, over flat leaves.

A call of a jitted function costs time per argument and per level of nesting; a flat list of leaves costs
the least (benchmarks/dispatch.py), so the loop holds leaves and only looks at a TrainState to save or
evaluate it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from configs.schema import RunConfig
from trainer.augment import augment, normalise
from trainer.mesh import batch_sharding, per_device_sharding, replicated_sharding
from trainer.state import Network, TrainState, Weights


class Batch(NamedTuple):
    images: jax.Array
    """(batch, height, width, 3) uint8."""
    labels: jax.Array
    """(batch,) int32; -1 marks padding and masked records, which count for nothing."""


class StepMetrics(NamedTuple):
    """One train step, as one float32 vector on the device and as floats on the host."""

    loss: float
    """Mean over the counted rows, 0 where there is none; so is the gradient."""
    accuracy: float
    """Share of the counted rows whose likeliest class is that of the largest target."""
    grad_norm: float
    learning_rate: float
    save_requests: float
    """Devices whose process asks for a checkpoint."""
    stop_requests: float
    """Devices whose process asks to stop."""


class EvalSums(NamedTuple):
    """Sums over the counted examples of one batch."""

    loss: float
    correct: float
    examples: float
    stop_requests: float


def make_train_step(
    config: RunConfig,
    network: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    mesh: Mesh,
) -> jax.stages.Wrapped:
    """(leaves, batch, requests) -> (leaves, StepMetrics as a (6,) vector). The leaves are donated.

    `requests` is (devices, 2) float32, what each process asks for: [save, stop]. Summed in the step, it
    tells every process the same at the same step, with no barrier of its own.
    """
    leaves, structure = jax.tree.flatten(abstract)

    def loss_fn(
        params: Weights, batch_stats: Weights, images: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, tuple[Weights, jax.Array, jax.Array]]:
        logits, batch_stats = network.apply({**params, **batch_stats}, images, train=True)
        loss = optax.softmax_cross_entropy(logits, targets).sum()  # no target, no loss
        counted = targets.any(-1)
        correct = counted & (logits.argmax(-1) == targets.argmax(-1))
        return loss, (batch_stats, correct.sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32))

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def step(leaves: list[jax.Array], batch: Batch, requests: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        state: TrainState = jax.tree.unflatten(structure, leaves)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        examples = augment(batch.images, batch.labels, key, config)

        def micro_step(batch_stats: Weights, micro: tuple[jax.Array, jax.Array]) -> tuple[Weights, Any]:
            (loss, (batch_stats, *counts)), grads = gradient(state.params, batch_stats, *micro)
            return batch_stats, (grads, loss, *counts)

        n = config.train.accumulate
        if n == 1:
            batch_stats, sums = micro_step(state.batch_stats, examples)
        else:

            def add(carry: tuple[Weights, Any], micro: Any) -> tuple[tuple[Weights, Any], None]:
                batch_stats, sums = micro_step(carry[0], micro)
                return (batch_stats, jax.tree.map(jnp.add, carry[1], sums)), None

            zeros: Any = (jax.tree.map(jnp.zeros_like, state.params), *[jnp.zeros(())] * 3)
            micros = [_micro_batches(x, n) for x in examples]
            (batch_stats, sums), _ = jax.lax.scan(add, (state.batch_stats, zeros), micros)
        # Divided after the sum over devices and micro-batches: each counted row weighs the same, wherever it is.
        *sums, counted = sums
        grads, loss, accuracy = jax.tree.map(lambda x: x / jnp.maximum(counted, 1), sums)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None and config.train.ema_decay is not None:
            # Early on the average is short: min(decay, (1 + t) / (10 + t)), as tf.train.ExponentialMovingAverage.
            decay = jnp.minimum(config.train.ema_decay, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update({**params, **batch_stats}, ema, 1 - decay)
        new = TrainState(state.step + 1, state.key, params, batch_stats, opt_state, ema)
        save, stop = requests.sum(0)
        norm = optax.tree.norm(grads)
        metrics = [loss, accuracy, norm, schedule(state.step), save, stop]  # in the order of StepMetrics
        return jax.tree.leaves(new), jnp.stack(metrics)

    shardings = [leaf.sharding for leaf in leaves]
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), per_device_sharding(mesh)),
        out_shardings=(shardings, replicated_sharding(mesh)),
        donate_argnums=0,
    )


def make_eval_step(config: RunConfig, network: Network, abstract: Weights, mesh: Mesh) -> jax.stages.Wrapped:
    """(weight leaves, batch, requests) -> (EvalSums as a (4,) vector, predictions (batch,) int32)."""
    leaves, structure = jax.tree.flatten(abstract)

    def step(leaves: list[jax.Array], batch: Batch, requests: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.tree.unflatten(structure, leaves)
        logits, _ = network.apply(weights, normalise(batch.images, config.data), train=False)
        counted = batch.labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels, 0))
        predictions = logits.argmax(-1).astype(jnp.int32)
        sums = [  # in the order of EvalSums
            jnp.where(counted, losses, 0).sum(),
            (counted & (predictions == batch.labels)).sum().astype(jnp.float32),
            counted.sum().astype(jnp.float32),
            requests.sum(0)[1],
        ]
        return jnp.stack(sums), predictions

    shardings = [leaf.sharding for leaf in leaves]
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), per_device_sharding(mesh)),
        out_shardings=(replicated_sharding(mesh), batch_sharding(mesh)),
    )


def _micro_batches(x: jax.Array, n: int) -> jax.Array:
    """(batch, …) -> (n, batch / n, …). Micro-batch i takes rows i, i + n, …: some of every device's."""
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
