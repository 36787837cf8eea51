"""What several benchmarks share: a recipe on synthetic images, its train step and inputs, and a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax

from configs.load import load
from configs.schema import RunConfig, num_examples
from trainer.mesh import batch_sharding, make_mesh, per_device_sharding
from trainer.state import Network, TrainState, abstract_state, make_optimizer, make_schedule
from trainer.step import Batch, make_train_step

REPOSITORY = Path(__file__).parent.parent


def synthetic_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """configs/`recipe`.yaml on synthetic images, with all devices of this process along the batch axis."""
    fixed = ["data.source=synthetic", f"mesh.batch={jax.device_count()}"]
    return load(REPOSITORY / "configs" / f"{recipe}.yaml", [*fixed, *overrides])


@dataclass(frozen=True)
class Setup:
    """A train step and its inputs, made as trainer/loop.py makes them."""

    step: jax.stages.Wrapped
    abstract: TrainState
    batch: Batch
    requests: jax.Array
    schedule: optax.Schedule


def setup(config: RunConfig, *, steps: int) -> Setup:
    mesh = make_mesh(config.mesh.batch, config.mesh.model)
    network = Network(config.model)
    size, pixels = config.train.batch_size, config.data.image_size
    schedule = make_schedule(
        config.schedule,
        config.optimizer.learning_rate,
        steps=steps,
        steps_per_epoch=num_examples(config.data)[0] / size,
    )
    optimizer = make_optimizer(config.optimizer, schedule, config.train.clip_norm)
    abstract = abstract_state(config, network, optimizer, mesh)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, pixels, pixels, 3), np.uint8)
    labels = rng.integers(0, config.model.num_classes, size, np.int32)
    return Setup(
        step=make_train_step(config, network, optimizer, schedule, abstract, mesh),
        abstract=abstract,
        batch=Batch(
            jax.device_put(images, batch_sharding(mesh)), jax.device_put(labels, batch_sharding(mesh))
        ),
        requests=jax.device_put(np.zeros((mesh.size, 2), np.float32), per_device_sharding(mesh)),
        schedule=schedule,
    )


def random_leaves(abstract: TrainState) -> list[jax.Array]:
    """A state that needs no compilation: small positive noise, which no file format can compress."""
    rng = np.random.default_rng(0)
    return [
        jax.device_put((0.01 * rng.random(leaf.shape, np.float32)).astype(leaf.dtype), leaf.sharding)
        for leaf in jax.tree.leaves(abstract)
    ]


def print_table(header: Sequence[str], table: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell: the first is text, the others figures."""
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    for first, *rest in (header, *table):
        figures = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *figures]))
