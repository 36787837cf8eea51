"""TrainState: all that a train step reads and writes, and all that a checkpoint holds.

Weights are flat dicts from a dotted name ("stages.0.1.convs.0.kernel") to an array, so checkpoints do not
depend on how a network nests its modules.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import models
from configs.schema import ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig
from trainer.mesh import weight_sharding

Weights = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step, as a pytree of arrays."""

    step: jax.Array
    """Number of steps taken, int32 scalar."""
    key: jax.Array
    """The root of all randomness on the devices, uint32 (2,). Each step folds its own number into it."""
    params: Weights
    """Trainable weights, float32."""
    batch_stats: Weights
    """Running mean and variance of each batch norm, float32."""
    opt_state: optax.OptState
    ema: Weights | None
    """Moving average of params and batch_stats together, or None where the recipe has no `train.ema_decay`."""

    def eval_weights(self) -> Weights:
        """The weights to evaluate: the moving average if there is one, else params and batch_stats."""
        return self.ema if self.ema is not None else {**self.params, **self.batch_stats}


class Network:
    """A model of models/ as two pure functions over flat weights."""

    def __init__(self, config: ModelConfig):
        self._config = config
        # Shapes are all that is needed here, so nothing is computed and no memory is used.
        model = nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0)))
        self._graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        self._structures = [jax.tree.structure(params), jax.tree.structure(batch_stats)]
        self._names = [list(_by_dotted_name(params)), list(_by_dotted_name(batch_stats))]

    def init(self, key: jax.Array) -> tuple[Weights, Weights]:
        """Fresh (params, batch_stats) for a PRNG key, all float32."""
        model = models.build(self._config, nnx.Rngs(key))
        _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        return _by_dotted_name(params), _by_dotted_name(batch_stats)

    def apply(self, weights: Weights, images: jax.Array, *, train: bool) -> tuple[jax.Array, Weights]:
        """Run the network on images (batch, height, width, 3), float.

        Returns logits (batch, num_classes) float32, and the batch_stats after this batch. With `train` the
        batch itself is what batch norm normalises by, otherwise the running statistics are.
        """
        states = [
            jax.tree.unflatten(structure, [weights[name] for name in names])
            for structure, names in zip(self._structures, self._names, strict=True)
        ]
        # With a copy, because value_and_grad runs this at an inner trace level, and nnx forbids a write there
        # to variables that were made outside.
        model = nnx.merge(self._graph, *states, copy=True)
        logits = model(images, train=train)
        return logits, _by_dotted_name(nnx.state(model, nnx.BatchStat))


def _by_dotted_name(state: nnx.State) -> Weights:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in leaves
    }


def make_schedule(
    schedule: ScheduleConfig, peak: float, *, steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to `peak`, then cosine, linear or constant until `steps`."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    final = peak * schedule.final_fraction
    decay_steps = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=schedule.final_fraction),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[schedule.name]
    # Without warm-up the first of the two is never used. It still has a step, because optax complains of
    # none.
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, clip_norm: float | None
) -> optax.GradientTransformation:
    """SGD (with Nesterov momentum if asked) or AdamW, after clipping the gradient to the norm `clip_norm`.

    Weight decay is applied to kernels, and not to batch norm or biases (He et al. 2019, arXiv:1812.01187,
    3.1).
    """

    def kernels(params: Weights) -> dict[str, bool]:
        # Kernels are the only weights with more than one dim.
        return {name: p.ndim > 1 for name, p in params.items()}

    # Clipping comes first, so that weight decay is not part of the norm.
    chain = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    if config.name == "sgd":
        chain += [
            # Before momentum: the decay is part of the gradient, as in PyTorch's SGD.
            optax.add_decayed_weights(config.weight_decay, kernels),
            optax.sgd(schedule, config.momentum or None, config.nesterov),
        ]
    else:
        chain += [
            optax.adamw(
                schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=kernels
            )
        ]
    return optax.chain(*chain)


def abstract_state(
    config: RunConfig, network: Network, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A TrainState of jax.ShapeDtypeStruct: the shape, dtype and sharding on `mesh` of every leaf."""
    shapes = jax.eval_shape(lambda: _build_state(config, network, optimizer))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=weight_sharding(mesh, leaf)),
        shapes,
    )


def make_init(
    config: RunConfig,
    network: Network,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
) -> jax.stages.Wrapped:
    """Build the program that makes a fresh TrainState as `abstract` lays it out: each device makes only its shards."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # This program runs once. On the CPU, optimising it takes several times as long as running it unoptimised.
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(
        lambda: _build_state(config, network, optimizer), out_shardings=shardings, compiler_options=options
    )


def _build_state(config: RunConfig, network: Network, optimizer: optax.GradientTransformation) -> TrainState:
    key = jax.random.key(config.train.seed)
    params, batch_stats = network.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=None if config.train.ema_decay is None else jax.tree.map(_copy, {**params, **batch_stats}),
    )


def _copy(x: Any) -> Any:
    # The average needs buffers of its own, because the first step donates those of the weights.
    return x + 0
