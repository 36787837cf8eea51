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

from configs.schema import DataConfig, RunConfig
from trainer.mesh import each_device, replicated, rows
from trainer.state import Network, TrainState, Weights


class Batch(NamedTuple):
    images: jax.Array
    """(batch, height, width, 3) uint8."""
    labels: jax.Array
    """(batch,) int32; -1 marks padding, which evaluation does not count."""


class StepMetrics(NamedTuple):
    """One train step, as one float32 vector on the device and as floats on the host."""

    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float
    save: float
    """Devices whose process asks for a checkpoint."""
    stop: float
    """Devices whose process asks to stop."""


class EvalSums(NamedTuple):
    """Sums over the counted examples of one batch."""

    loss: float
    correct: float
    examples: float
    stop: float


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
        params: Weights, batch_stats: Weights, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[Weights, jax.Array]]:
        logits, batch_stats = network.apply({**params, **batch_stats}, images, train=True)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), config.train.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        return loss, (batch_stats, accuracy)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def step(leaves: list[jax.Array], batch: Batch, requests: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        state: TrainState = jax.tree.unflatten(structure, leaves)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        images = _augment(batch.images, config.data, key)

        def micro_step(carry: Any, micro: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            batch_stats, sums = carry
            (loss, (batch_stats, accuracy)), grads = gradient(state.params, batch_stats, *micro)
            return (batch_stats, jax.tree.map(jnp.add, sums, (grads, loss, accuracy))), None

        n = config.train.accumulate
        if n == 1:
            (loss, (batch_stats, accuracy)), grads = gradient(
                state.params, state.batch_stats, images, batch.labels
            )
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            micro = (_micro_batches(images, n), _micro_batches(batch.labels, n))
            carry = (state.batch_stats, (zeros, jnp.zeros(()), jnp.zeros(())))
            (batch_stats, sums), _ = jax.lax.scan(micro_step, carry, micro)
            grads, loss, accuracy = jax.tree.map(lambda x: x / n, sums)

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
        in_shardings=(shardings, rows(mesh), each_device(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(config: RunConfig, network: Network, abstract: Weights, mesh: Mesh) -> jax.stages.Wrapped:
    """(weight leaves, batch, requests) -> (EvalSums as a (4,) vector, predictions (batch,) int32)."""
    leaves, structure = jax.tree.flatten(abstract)

    def step(leaves: list[jax.Array], batch: Batch, requests: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.tree.unflatten(structure, leaves)
        logits, _ = network.apply(weights, _normalise(batch.images, config.data), train=False)
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
        in_shardings=(shardings, rows(mesh), each_device(mesh)),
        out_shardings=(replicated(mesh), rows(mesh)),
    )


def _normalise(images: jax.Array, data: DataConfig) -> jax.Array:
    mean, std = (jnp.array(c, jnp.float32) for c in (data.mean, data.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def _augment(images: jax.Array, data: DataConfig, key: jax.Array) -> jax.Array:
    """Mirror and normalise. An image's draw depends on the step and its row, not on the device it is on."""
    if data.flip:
        mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return _normalise(images, data)


def _micro_batches(x: jax.Array, n: int) -> jax.Array:
    """(batch, …) -> (n, batch / n, …). Micro-batch i takes rows i, i + n, …: some of every device's."""
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
