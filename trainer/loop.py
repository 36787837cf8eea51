"""One training, read top to bottom: mesh, data, model, restore, compile, then the loop.

Loop order: step, finite check, save, evaluate, log. Metrics are read LAG steps late, so the devices
always have work queued; all processes read the same numbers at the same step, hence agree on what they do.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import yaml
from jax.sharding import Mesh, NamedSharding

from configs.errors import UserError
from configs.schema import RunConfig, num_examples
from trainer.checkpoint import Checkpointer, DataPosition
from trainer.data import open_splits
from trainer.data.batches import eval_batches, train_batches
from trainer.evaluate import evaluate
from trainer.mesh import each_device, make_mesh, rows, wait_for_all
from trainer.metrics import Interval, Stopwatch, TensorBoard, bound, local_rows, logdir
from trainer.state import Network, TrainState, abstract_state, init_state, make_optimizer, make_schedule
from trainer.step import Batch, StepMetrics, make_eval_step, make_train_step

LAG = 2
REPORT_SECONDS = 0.5

Report = Callable[..., None]


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite. The same steps would do it again, so there is no point in a retry."""

    retryable = False

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Outcome:
    """How a training ended, as it stands in result.json."""

    status: str
    """`completed`, or `stopped` by request after saving."""
    step: int
    epoch: float
    metrics: dict[str, float]
    images_per_second: float
    seconds: dict[str, float]
    """Wall seconds by activity: start-up phases, data_wait, compute, checkpoint, evaluation."""


def train(
    config: RunConfig, *, steps: int, directory: Path, report: Report, stop_requested: Callable[[], bool]
) -> Outcome:
    """Train to `steps` optimizer steps in the run directory, resuming from its newest checkpoint.

    `report(**fields)` is told the phase and progress; `stop_requested()` is asked at each step. Raises
    NonFiniteLossError, UserError for what the user must mend, and whatever Orbax or the data source raises.
    """
    return _Training(config, steps, directory, report, stop_requested).run()


class _Training:
    """One training on this process: all is prepared when it is made, then `run` tells the story."""

    def __init__(
        self,
        config: RunConfig,
        steps: int,
        directory: Path,
        report: Report,
        stop_requested: Callable[[], bool],
    ):
        self.config, self.steps, self.report = config, steps, report
        self.watch = Stopwatch()
        self.steps_per_epoch = num_examples(config.data)[0] / config.train.batch_size

        report(phase="opening data")
        self.mesh = make_mesh(config.mesh.batch, config.mesh.model)
        with self.watch.span("open_data"):
            self.train_split, self.eval_split = open_splits(config)

        report(phase="initialising")
        network = Network(config.model)
        schedule = make_schedule(
            config.schedule,
            config.optimizer.learning_rate,
            steps=steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        optimizer = make_optimizer(config.optimizer, schedule, config.train.clip_norm)
        abstract = abstract_state(config, network, optimizer, self.mesh)
        with self.watch.span("restore"):
            self.checkpoints = Checkpointer(directory / "checkpoints", config.checkpoint)
            self.start = self.checkpoints.latest_step or 0
            state = self._restore(abstract) if self.start else None
        if state is None:
            with self.watch.span("initialise"):
                state = init_state(config, network, optimizer, abstract)
        self.leaves, self._structure = jax.tree.flatten(state)
        self.step = self.start

        self.board = TensorBoard(
            logdir(directory, config.log.tensorboard), active=jax.process_index() == 0, start=self.start
        )
        if not self.start:
            self.board.hyperparameters(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        # Data starts to flow while the step compiles.
        self.batches = train_batches(
            config,
            self.train_split,
            rows(self.mesh),
            position=self.start * config.train.batch_size,
            steps=steps - self.start,
        )
        self.save_due = _SaveDue(config, steps, self.steps_per_epoch)
        self.request = _requests(self.mesh, self.save_due.wanted, stop_requested)
        report(phase="compiling", step=self.start, start=self.start, steps=steps)
        with self.watch.span("compile"):
            train_step = make_train_step(config, network, optimizer, schedule, abstract, self.mesh)
            eval_step = make_eval_step(config, network, abstract.evaluated(), self.mesh)
            inputs = _abstract_inputs(config, self.mesh)
            self.train_step = train_step.lower(jax.tree.leaves(abstract), *inputs).compile()
            self.eval_step = eval_step.lower(jax.tree.leaves(abstract.evaluated()), *inputs).compile()
            wait_for_all("compiled")  # before the first collective

        self.in_flight: deque[tuple[int, jax.Array]] = deque()
        self.interval = Interval(config.train.batch_size, self.watch)
        self.metrics: dict[str, float] = {}
        self.stopping = False
        """All processes have agreed to stop."""
        self._reported = 0.0

    def run(self) -> Outcome:
        """Step, finite check, save, evaluate, log; until the last step or an agreed stop."""
        if (
            self.start
            and self.save_due.at_evaluation(self.start)
            and self.start not in self.checkpoints.scores
        ):
            self.evaluate()  # the attempt before ended between save and evaluation
        begun = time.perf_counter()
        self.interval.reset()
        while self.step < self.steps and not self.stopping:
            first = self.step == self.start
            with self.watch.span("first_batch" if first else "data_wait"):
                batch = next(self.batches)
            if self.step == 0:
                self._log_inputs(batch)
            with self.watch.span("first_step" if first else "compute"):
                self.leaves, values = self.train_step(self.leaves, batch, self.request())
                self.step += 1
                self.in_flight.append((self.step, values))
                self.observe(upto=0 if first else LAG)
            if first:
                self.report(phase="training", step=self.step, seconds=dict(self.watch.seconds))
                begun = time.perf_counter()
                self.interval.reset()
            self.checkpoints.poll()
            if self.save_due(self.step) or self.stopping:
                self.save()
            if self.save_due.at_evaluation(self.step) and not self.stopping:
                self.evaluate()
            self.log()

        self.report(phase="saving")
        self.batches.close()
        with self.watch.span("checkpoint"):
            self.checkpoints.close()
        self.board.close()
        seconds = time.perf_counter() - begun - self.watch.seconds["evaluation"]
        steps = max(self.step - self.start - 1, 0)
        return Outcome(
            status="completed"
            if self.step == self.steps and self.step in self.checkpoints.scores
            else "stopped",
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            metrics=self.metrics,
            images_per_second=steps * self.config.train.batch_size / seconds,
            seconds=dict(self.watch.seconds),
        )

    def state(self) -> TrainState:
        return jax.tree.unflatten(self._structure, self.leaves)

    def observe(self, upto: int) -> None:
        """Read metrics until at most `upto` steps are in flight: the finite check, and what was agreed."""
        while len(self.in_flight) > upto:
            step, values = self.in_flight.popleft()
            metrics = StepMetrics(*np.asarray(values).tolist())
            # An infinite gradient spoils the weights of its step, the loss only of the next.
            if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
                self._fail_non_finite(step, metrics)
            self.interval.add(metrics)
            self.save_due.agreed |= metrics.save > 0
            self.stopping |= metrics.stop > 0

    def save(self) -> None:
        with self.watch.span("checkpoint"):
            self.observe(upto=0)  # a state behind a loss that is not finite is not kept
            position = DataPosition(
                self.step * self.config.train.batch_size, self.config.train.seed, self.train_split.digest
            )
            self.checkpoints.save(self.step, self.state(), position)
        self.save_due.saved()

    def evaluate(self) -> None:
        self.report(phase="evaluating", step=self.step)
        with (
            self.watch.span("evaluation"),
            closing(eval_batches(self.config, self.eval_split, rows(self.mesh))) as batches,
        ):
            result = evaluate(
                self.eval_step,
                jax.tree.leaves(self.state().evaluated()),
                batches,
                self.request,
                num_mistakes=self.config.log.num_images,
            )
        if result is None:
            self.stopping = True
            return
        self.checkpoints.score(self.step, result.metrics[self.config.checkpoint.metric])
        self.metrics.update(result.metrics)
        self.board.scalars(self.step, result.metrics)
        self.board.images(self.step, "eval/mistakes", result.mistakes, result.captions)
        self.report(**result.metrics, phase="training")

    def log(self) -> None:
        """TensorBoard each `log.every_steps`; the progress line at least twice a second."""
        if not len(self.interval):
            return
        epoch = self.step / self.steps_per_epoch
        if self.step % self.config.log.every_steps == 0 or self.step == self.steps or self.stopping:
            summary = self.interval.summary()
            self.interval.reset()
            self.metrics.update(summary)
            data, in_words = self.batches.metrics(), bound(summary["speed/data_wait_share"])
            self.board.scalars(self.step, {**summary, **data, "train/epoch": epoch})
            self.board.text(self.step, "speed/bound", in_words)
            seconds = dict(self.watch.seconds)
            self.report(step=self.step, epoch=epoch, seconds=seconds, bound=in_words, **self.metrics, **data)
        elif time.perf_counter() - self._reported > REPORT_SECONDS:
            self._reported = time.perf_counter()
            self.report(step=self.step, epoch=epoch, **self.interval.summary())

    def _log_inputs(self, batch: Batch) -> None:
        n = self.config.log.num_images
        labels = [str(label) for label in local_rows(batch.labels)[:n]]
        self.board.images(0, "train/inputs", local_rows(batch.images)[:n], labels)

    def _fail_non_finite(self, step: int, metrics: StepMetrics) -> NoReturn:
        self.checkpoints.wait()
        self.board.close()
        kept = self.checkpoints.latest_step
        raise NonFiniteLossError(
            f"the loss is {metrics.loss} and the gradient's norm {metrics.grad_norm} at step {step}; "
            f"the last good checkpoint is {'none' if kept is None else f'step {kept}'}. Begin another run (--name) "
            f"with a lower optimizer.learning_rate, a longer schedule.warmup_epochs or train.clip_norm",
            step,
        )

    def _restore(self, abstract: TrainState) -> TrainState:
        state, saved = self.checkpoints.restore(self.start, abstract)
        digest, seed = self.train_split.digest, self.config.train.seed
        if (saved.digest, saved.seed) != (digest, seed):
            raise UserError(
                f"the checkpoint was trained on other data (digest {saved.digest[:12]}, seed {saved.seed}) "
                f"than data.source = {self.config.data.source} has now (digest {digest[:12]}, seed {seed}): "
                f"restore the data, or begin another run with --name"
            )
        return state


class _SaveDue:
    """When to save: every n steps, every n minutes by the clock of process 0, at evaluations, at the end."""

    def __init__(self, config: RunConfig, steps: int, steps_per_epoch: float):
        self._config = config
        self._steps = steps
        self._eval_interval = (config.train.eval_every_epochs or math.inf) * steps_per_epoch
        self._saved_at = time.monotonic()
        self.agreed = False
        """A process asked for a save, and all have read that."""

    def __call__(self, step: int) -> bool:
        every = self._config.checkpoint.every_steps
        return self.agreed or self.at_evaluation(step) or (every is not None and step % every == 0)

    def at_evaluation(self, step: int) -> bool:
        return step == self._steps or step // self._eval_interval > (step - 1) // self._eval_interval

    def wanted(self) -> bool:
        """Whether this process asks for a save: only process 0 does, since clocks differ."""
        minutes = self._config.checkpoint.every_minutes
        elapsed = time.monotonic() - self._saved_at
        return minutes is not None and jax.process_index() == 0 and elapsed > 60 * minutes

    def saved(self) -> None:
        self._saved_at = time.monotonic()
        self.agreed = False


def _requests(
    mesh: Mesh, save_wanted: Callable[[], bool], stop_requested: Callable[[], bool]
) -> Callable[[], jax.Array]:
    """What this process asks of all, as the (devices, 2) input of a step: [save, stop]."""
    sharding = each_device(mesh)

    @cache  # nearly always the same array: nothing is sent to the devices for it
    def array(save: bool, stop: bool) -> jax.Array:
        return jax.make_array_from_callback(
            (mesh.size, 2), sharding, lambda index: np.array([[save, stop]], np.float32)
        )

    return lambda: array(save_wanted(), stop_requested())


def _abstract_inputs(config: RunConfig, mesh: Mesh) -> tuple[Any, ...]:
    """A step's inputs after the leaves: batch and requests."""
    size, pixels = config.train.batch_size, config.data.image_size

    def abstract(shape: tuple[int, ...], dtype: type, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = Batch(
        images=abstract((size, pixels, pixels, 3), np.uint8, rows(mesh)),
        labels=abstract((size,), np.int32, rows(mesh)),
    )
    return batch, abstract((mesh.size, 2), np.float32, each_device(mesh))
