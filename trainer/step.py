"""The train step and the evaluation step: jitted pure functions over a flat list of arrays.

Calling a jitted function costs time for each argument and for each level of nesting, and a flat list of
leaves costs the least (benchmarks/dispatch.py). So the loop holds leaves, and builds a TrainState of them
only to save or to evaluate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from configs.schema import RunConfig
from trainer.augment import augment, normalise
from trainer.mesh import batch_sharding, per_device_sharding, replicated_sharding
from trainer.state import Network, TrainState, Weights


class Batch(NamedTuple):
    """A global batch as the data source gives it, sharded over the batch axis of the mesh."""

    images: jax.Array
    """(batch, height, width, 3) uint8."""
    labels: jax.Array
    """(batch,) int32; -1 marks padding and masked records, which do not count in any metric or gradient."""


class StepMetrics(NamedTuple):
    """The metrics of one train step: one float32 vector on the device, floats on the host."""

    loss: float
    """Mean over the counted rows, 0 where there are none. The gradient is that of this mean."""
    accuracy: float
    """Fraction of the counted rows whose most likely class is the one with the largest target."""
    grad_norm: float
    learning_rate: float
    save_requests: float
    """Number of devices whose process asks for a checkpoint."""
    stop_requests: float
    """Number of devices whose process asks to stop."""


class EvalSums(NamedTuple):
    """Sums over the counted examples of one evaluation batch."""

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
    """Build the train step: (leaves, batch, requests) -> (new leaves, StepMetrics as a (6,) float32 vector).

    `leaves` are those of a TrainState laid out as `abstract`; their buffers are donated. `requests` is
    (devices, 2) float32, [save, stop] of each device's process: 1 asks for it. Their sums are part of the
    metrics, so all processes learn of a request at the same step, without a barrier.
    """
    leaves, structure = jax.tree.flatten(abstract)

    def step(leaves: list[jax.Array], batch: Batch, requests: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        state: TrainState = jax.tree.unflatten(structure, leaves)
        # A function of the step alone, so that a resumed run draws what an uninterrupted one would have
        # drawn.
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        examples = augment(batch.images, batch.labels, key, config)
        batch_stats, (*sums, counted) = _sum_gradients(network, state, examples, config.train.accumulate)
        # Divided after the sum over devices and micro-batches, so each counted row has the same weight
        # wherever it is. Where no row counts, the division is by 1, and the gradient stays 0.
        grads, loss, accuracy = jax.tree.map(lambda x: x / jnp.maximum(counted, 1), sums)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None and config.train.ema_decay is not None:
            # A short average at first: min(decay, (1 + t) / (10 + t)), as tf.train.ExponentialMovingAverage
            # has it.
            decay = jnp.minimum(config.train.ema_decay, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update({**params, **batch_stats}, ema, 1 - decay)
        new = TrainState(state.step + 1, state.key, params, batch_stats, opt_state, ema)
        # After this sum all processes read the same, whatever each of them has asked for.
        save, stop = requests.sum(0)
        metrics = [
            loss,
            accuracy,
            optax.tree.norm(grads),
            schedule(state.step),
            save,
            stop,
        ]  # as in StepMetrics
        return jax.tree.leaves(new), jnp.stack(metrics)

    shardings = [leaf.sharding for leaf in leaves]
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), per_device_sharding(mesh)),
        out_shardings=(shardings, replicated_sharding(mesh)),
        # Large models do not have room for two states.
        donate_argnums=0,
    )


def make_eval_step(config: RunConfig, network: Network, abstract: Weights, mesh: Mesh) -> jax.stages.Wrapped:
    """Build the evaluation step: (leaves, batch, requests) -> (EvalSums, predicted classes).

    `leaves` are those of weights laid out as `abstract`, `requests` is as in the train step. The sums come as
    a (4,) float32 vector, the predictions as (batch,) int32.
    """
    leaves, structure = jax.tree.flatten(abstract)

    def step(leaves: list[jax.Array], batch: Batch, requests: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.tree.unflatten(structure, leaves)
        logits, _ = network.apply(weights, normalise(batch.images, config.data), train=False)
        # A label of -1 is outside of the classes, so its loss is computed for class 0 and then dropped.
        counted = batch.labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels, 0))
        predictions = logits.argmax(-1).astype(jnp.int32)
        sums = [  # as in EvalSums
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


def abstract_inputs(config: RunConfig, mesh: Mesh) -> tuple[Batch, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the batch and the requests of both steps, to compile them ahead of time."""
    size, pixels = config.train.batch_size, config.data.image_size

    def abstract(shape: tuple[int, ...], dtype: type, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = Batch(
        images=abstract((size, pixels, pixels, 3), jnp.uint8, batch_sharding(mesh)),
        labels=abstract((size,), jnp.int32, batch_sharding(mesh)),
    )
    return batch, abstract((mesh.size, 2), jnp.float32, per_device_sharding(mesh))


def _sum_gradients(
    network: Network, state: TrainState, examples: tuple[jax.Array, jax.Array], num_micro_batches: int
) -> tuple[Weights, Any]:
    """New batch_stats, and (gradients, loss, correct, counted), summed one micro-batch at a time."""

    def loss_fn(
        params: Weights, batch_stats: Weights, images: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, tuple[Weights, jax.Array, jax.Array]]:
        # A sum and not a mean, because micro-batches may differ in the number of rows that count.
        logits, batch_stats = network.apply({**params, **batch_stats}, images, train=True)
        # The targets of a row that does not count are all 0, and so is its loss.
        loss = optax.softmax_cross_entropy(logits, targets).sum()
        counted = targets.any(-1)
        # Mixed targets have two classes; the one with the larger weight is the one to predict.
        correct = counted & (logits.argmax(-1) == targets.argmax(-1))
        return loss, (batch_stats, correct.sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32))

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def micro_step(batch_stats: Weights, micro: Any) -> tuple[Weights, Any]:
        (loss, (batch_stats, *counts)), grads = gradient(state.params, batch_stats, *micro)
        return batch_stats, (grads, loss, *counts)

    def add(carry: tuple[Weights, Any], micro: Any) -> tuple[tuple[Weights, Any], None]:
        batch_stats, sums = micro_step(carry[0], micro)
        return (batch_stats, jax.tree.map(jnp.add, carry[1], sums)), None

    # Without a scan, whose loop would keep the compiler from optimising across it.
    if num_micro_batches == 1:
        return micro_step(state.batch_stats, examples)
    zeros: Any = (jax.tree.map(jnp.zeros_like, state.params), *[jnp.zeros(())] * 3)
    micro_batches = [_split_micro_batches(x, num_micro_batches) for x in examples]
    # In a scan only one micro-batch has its activations in memory at a time.
    return jax.lax.scan(add, (state.batch_stats, zeros), micro_batches)[0]


def _split_micro_batches(x: jax.Array, n: int) -> jax.Array:
    """(batch, …) -> (n, batch / n, …). Micro-batch i has rows i, i + n, …: a part of every device's."""
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
