"""A small real recipe, and a training over it that a test can cut short, resume and look into."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.load import load
from configs.schema import RunConfig
from trainer import mesh as meshes
from trainer.loop import Outcome, train
from trainer.state import Network, TrainState, abstract_state, make_init, make_optimizer, make_schedule
from trainer.step import Batch, make_train_step

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = (
    "model.name=resnet4",
    "mesh.batch=4",
    "model.width=4",
    "model.batch_norm=4",
    "train.batch_size=32",
    "train.eval_every_epochs=null",
    "schedule.warmup_epochs=0",
    "log.every_steps=5",
)


def config_of(*overrides: str) -> RunConfig:
    return load(QUICKSTART, [*SMALL, *overrides])


@dataclass
class Trainable:
    """All that a step needs, built as the loop builds it."""

    config: RunConfig
    steps: int = 20
    devices: Sequence[jax.Device] | None = None
    """None: all of this process."""
    mesh: jax.sharding.Mesh = field(init=False)
    network: Network = field(init=False)
    abstract: TrainState = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.mesh = meshes.make_mesh(config.mesh.batch, config.mesh.model, self.devices)
        self.network = Network(config.model)
        self.schedule = make_schedule(
            config.schedule, config.optimizer.learning_rate, steps=self.steps, steps_per_epoch=45
        )
        self.optimizer = make_optimizer(config.optimizer, self.schedule, config.train.clip_norm)
        self.abstract = abstract_state(config, self.network, self.optimizer, self.mesh)

    def init(self) -> TrainState:
        """A fresh state, made by the program that the loop makes it by."""
        return make_init(self.config, self.network, self.optimizer, self.abstract, self.mesh)()

    @cached_property
    def _on_host(self) -> TrainState:
        return jax.tree.map(np.array, self.init())

    def fresh(self) -> TrainState:
        """The same state in buffers of its own, to be donated, without running that program again."""
        return jax.tree.map(
            lambda x, like: jax.device_put(x.copy(), like.sharding), self._on_host, self.abstract
        )

    @cached_property
    def step(self) -> jax.stages.Wrapped:
        return make_train_step(
            self.config, self.network, self.optimizer, self.schedule, self.abstract, self.mesh
        )

    def batch(self, seed: int = 0) -> Batch:
        rng = np.random.default_rng(seed)
        size, pixels = self.config.train.batch_size, self.config.data.image_size
        images = rng.integers(0, 256, (size, pixels, pixels, 3), np.uint8)
        labels = rng.integers(0, self.config.model.num_classes, size, np.int32)
        sharding = meshes.batch_sharding(self.mesh)
        return Batch(jax.device_put(images, sharding), jax.device_put(labels, sharding))

    def requests(self, save: float = 0, stop: float = 0) -> jax.Array:
        rows = np.zeros((self.mesh.size, 2), np.float32)
        rows[0] = save, stop
        return jax.device_put(rows, meshes.per_device_sharding(self.mesh))


@cache
def shared(*overrides: str) -> Trainable:
    """The same one for the same overrides, so that tests share what they compile."""
    return Trainable(config_of(*overrides))


@dataclass
class Recorder:
    """Keeps what the loop reports, and asks it to stop once `stop_at` steps are under way."""

    stop_at: int | None = None
    asked: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)

    def report(self, **words: Any) -> None:
        self.reports.append(words)

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.stop_at is not None and self.asked >= self.stop_at


def run(directory: Path, *overrides: str, steps: int = 20, recorder: Recorder | None = None) -> Outcome:
    """Train `steps` steps of the small recipe in `directory`."""
    recorder = recorder or Recorder()
    return train(
        config_of(*overrides),
        steps=steps,
        directory=directory,
        report=recorder.report,
        stop_requested=recorder.stop_requested,
    )


def equal_states(a: TrainState, b: TrainState) -> bool:
    """Bit for bit."""
    return all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
