"""One training, read top to bottom: mesh, data, model, restore, compile, then the loop.

In the loop the order is: step, finite check, save, evaluate, log. Metrics are read METRICS_LAG steps late, so
the devices always have work queued. All processes read the same numbers at the same step, so all decide alike.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from configs.errors import UserError
from configs.schema import RunConfig, num_examples
from trainer.checkpoint import Checkpointer, DataPosition
from trainer.data import open_splits
from trainer.data.batches import eval_batches, train_batches
from trainer.evaluate import evaluate
from trainer.mesh import batch_sharding, make_mesh, per_device_sharding, wait_for_all
from trainer.metrics import LogInterval, Stopwatch, TensorBoard, bottleneck, fetch_local_rows, logdir
from trainer.state import Network, TrainState, abstract_state, make_init, make_optimizer, make_schedule
from trainer.step import Batch, StepMetrics, abstract_inputs, make_eval_step, make_train_step

METRICS_LAG = 2
"""Steps that are queued on the devices before the host reads the metrics of the oldest."""
REPORT_SECONDS = 0.5
"""The progress line is renewed at least this often."""

Report = Callable[..., None]
"""Called with the fields of the progress report that have changed."""


class NonFiniteLossError(Exception):
    """The loss or the gradient became NaN or infinite. A retry would meet the same at the same step."""

    retryable = False

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Outcome:
    """How a training ended, as result.json has it."""

    status: str
    """`completed`, or `stopped`: saved and ended at somebody's request."""
    step: int
    epoch: float
    metrics: dict[str, float]
    """The last train and evaluation metrics, under the names that TensorBoard shows."""
    images_per_second: float
    """Mean over the run, without start-up and evaluation."""
    seconds: dict[str, float]
    """Wall seconds by activity: the phases of start-up, data_wait, compute, checkpoint, evaluation."""


def train(
    config: RunConfig, *, steps: int, directory: Path, report: Report, stop_requested: Callable[[], bool]
) -> Outcome:
    """Train to `steps` optimizer steps in the run directory, resuming from its newest checkpoint.

    `report(**fields)` is called with the phase and the progress; `stop_requested()` is called at each step
    and says whether this process asks all to stop. Raises NonFiniteLossError, UserError if the user must
    mend something, and what Orbax or the data source raises.
    """
    return _Training(config, steps, directory, report, stop_requested).run()


class _Training:
    """One training on this process: the constructor prepares everything, then `run` tells the story."""

    def __init__(
        self,
        config: RunConfig,
        steps: int,
        directory: Path,
        report: Report,
        stop_requested: Callable[[], bool],
    ):
        self.config, self.steps, self.report = config, steps, report
        self.stopwatch = Stopwatch()
        # Not rounded: a batch may reach over the end of an epoch.
        self.steps_per_epoch = num_examples(config.data)[0] / config.train.batch_size

        # Each phase is reported before it begins, because the watchdog has a time limit for each.
        report(phase="opening data")
        self.mesh = make_mesh(config.mesh.batch, config.mesh.model)
        with self.stopwatch.span("open_data"):
            self.train_split, self.eval_split = open_splits(config)

        report(phase="initialising")
        network = Network(config.model)
        schedule = make_schedule(
            config.schedule, config.optimizer.learning_rate, steps=steps, steps_per_epoch=self.steps_per_epoch
        )
        optimizer = make_optimizer(config.optimizer, schedule, config.train.clip_norm)
        abstract = abstract_state(config, network, optimizer, self.mesh)
        with self.stopwatch.span("restore"):
            self.checkpoints = Checkpointer(directory / "checkpoints", config.checkpoint)
            self.start_step = self.checkpoints.latest_step or 0
            state = self._restore(abstract) if self.start_step else None
        if state is None:
            with self.stopwatch.span("initialise"):
                state = make_init(config, network, optimizer, abstract, self.mesh)()
        self.leaves, self._structure = jax.tree.flatten(state)
        self.step = self.start_step

        self.tensorboard = self._open_tensorboard(directory)
        # The first batches are made while the step compiles.
        position, rest = self.start_step * config.train.batch_size, steps - self.start_step
        sharding = batch_sharding(self.mesh)
        self.batches = train_batches(config, self.train_split, sharding, position=position, steps=rest)
        self.save_schedule = _SaveSchedule(config, steps, self.steps_per_epoch)
        self.make_requests = _request_maker(self.mesh, self.save_schedule.requests_save, stop_requested)
        report(phase="compiling", step=self.start_step, start=self.start_step, steps=steps)
        with self.stopwatch.span("compile"):
            train_step = make_train_step(config, network, optimizer, schedule, abstract, self.mesh)
            inputs = abstract_inputs(config, self.mesh)
            self.train_step = train_step.lower(jax.tree.leaves(abstract), *inputs).compile()
            weights = abstract.eval_weights()
            eval_step = make_eval_step(config, network, weights, self.mesh)
            self.eval_step = eval_step.lower(jax.tree.leaves(weights), *inputs).compile()
            # Some processes compile for longer. A collective would give up on them, this barrier does not.
            wait_for_all("compiled")

        self.in_flight: deque[tuple[int, jax.Array]] = deque()
        self.interval = LogInterval(config.train.batch_size, self.stopwatch)
        # The newest figures of each kind, for result.json.
        self.metrics: dict[str, float] = {}
        self.stopping = False
        """Whether all processes have agreed to stop."""
        self._reported_at = 0.0

    def run(self) -> Outcome:
        """Step, finite check, save, evaluate, log; until the last step or until all agree to stop."""
        if (
            self.start_step
            and self.save_schedule.evaluation_due(self.start_step)
            and self.start_step not in self.checkpoints.scores
        ):
            self.evaluate()  # the attempt before ended after the save but before its evaluation
        started = time.perf_counter()
        self.interval.reset()
        while self.step < self.steps and not self.stopping:
            # The first batch and the first step include filling pipelines and loading programs: they count as
            # start-up.
            first = self.step == self.start_step
            with self.stopwatch.span("first_batch" if first else "data_wait"):
                batch = next(self.batches)
            if self.step == 0:
                self._log_inputs(batch)
            with self.stopwatch.span("first_step" if first else "compute"):
                self.leaves, values = self.train_step(self.leaves, batch, self.make_requests())
                self.step += 1
                self.in_flight.append((self.step, values))
                self.read_metrics(max_in_flight=0 if first else METRICS_LAG)
            if first:
                self.report(phase="training", step=self.step, seconds=dict(self.stopwatch.seconds))
                # The first step has waited for the pipeline to fill; images per second count from here.
                started = time.perf_counter()
                self.interval.reset()
            # A save that failed in the background ends the run at the next step, not at its end.
            self.checkpoints.poll()
            if self.save_schedule.save_due(self.step) or self.stopping:
                self.save()
            # After the save, so that a crash in evaluation costs no training.
            if self.save_schedule.evaluation_due(self.step) and not self.stopping:
                self.evaluate()
            self.log()

        self.report(phase="saving")
        self.batches.close()
        with self.stopwatch.span("checkpoint"):
            self.checkpoints.close()
        self.tensorboard.close()
        seconds = time.perf_counter() - started - self.stopwatch.seconds["evaluation"]
        steps = max(self.step - self.start_step - 1, 0)
        return Outcome(
            # A stop during the last evaluation leaves a run without its result; it evaluates when it is
            # launched again.
            status="completed"
            if self.step == self.steps and self.step in self.checkpoints.scores
            else "stopped",
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            metrics=self.metrics,
            images_per_second=steps * self.config.train.batch_size / seconds,
            seconds=dict(self.stopwatch.seconds),
        )

    def state(self) -> TrainState:
        """The train state of the newest step, which may still be running."""
        return jax.tree.unflatten(self._structure, self.leaves)

    def read_metrics(self, max_in_flight: int) -> None:
        """Read the metrics of the oldest steps until at most `max_in_flight` steps are queued on the devices.

        Raises NonFiniteLossError, and notes what the processes have agreed on.
        """
        while len(self.in_flight) > max_in_flight:
            step, values = self.in_flight.popleft()
            # Waits until the devices have finished this step.
            metrics = StepMetrics(*np.asarray(values).tolist())
            # An infinite gradient damages the weights at once, but shows in the loss only one step later.
            if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
                self._raise_non_finite(step, metrics)
            self.interval.add(metrics)
            self.save_schedule.save_agreed |= metrics.save_requests > 0
            self.stopping |= metrics.stop_requests > 0

    def save(self) -> None:
        with self.stopwatch.span("checkpoint"):
            # Raises if the loss is not finite, so that no damaged state is ever saved.
            self.read_metrics(max_in_flight=0)
            position = DataPosition(
                self.step * self.config.train.batch_size, self.config.train.seed, self.train_split.digest
            )
            self.checkpoints.save(self.step, self.state(), position)
        self.save_schedule.note_saved()

    def evaluate(self) -> None:
        self.report(phase="evaluating", step=self.step)
        with (
            self.stopwatch.span("evaluation"),
            closing(eval_batches(self.config, self.eval_split, batch_sharding(self.mesh))) as batches,
        ):
            result = evaluate(
                self.eval_step,
                jax.tree.leaves(self.state().eval_weights()),
                batches,
                self.make_requests,
                num_mistakes=self.config.log.num_images,
            )
        if result is None:
            self.stopping = True
            return
        self.checkpoints.record_score(self.step, result.metrics[self.config.checkpoint.metric])
        self.metrics.update(result.metrics)
        self.tensorboard.scalars(self.step, result.metrics)
        self.tensorboard.images(self.step, "eval/mistakes", result.mistakes, result.captions)
        self.report(**result.metrics, phase="training")

    def log(self) -> None:
        """Write to TensorBoard every `log.every_steps` steps; renew the progress line twice a second."""
        if not len(self.interval):
            return
        epoch = self.step / self.steps_per_epoch
        if self.step % self.config.log.every_steps == 0 or self.step == self.steps or self.stopping:
            summary = self.interval.summary()
            self.interval.reset()
            self.metrics.update(summary)
            data, limited_by = self.batches.metrics(), bottleneck(summary["speed/data_wait_share"])
            self.tensorboard.scalars(self.step, {**summary, **data, "train/epoch": epoch})
            self.tensorboard.text(self.step, "speed/bound", limited_by)
            seconds = dict(self.stopwatch.seconds)
            self.report(
                step=self.step, epoch=epoch, seconds=seconds, bound=limited_by, **self.metrics, **data
            )
        elif time.perf_counter() - self._reported_at > REPORT_SECONDS:
            self._reported_at = time.perf_counter()
            self.report(step=self.step, epoch=epoch, **self.interval.summary())

    def _open_tensorboard(self, directory: Path) -> TensorBoard:
        folder = logdir(directory, self.config.log.tensorboard)
        tensorboard = TensorBoard(folder, active=jax.process_index() == 0, start=self.start_step)
        if not self.start_step:
            tensorboard.hyperparameters(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))
        return tensorboard

    def _log_inputs(self, batch: Batch) -> None:
        n = self.config.log.num_images
        labels = [str(label) for label in fetch_local_rows(batch.labels)[:n]]
        self.tensorboard.images(0, "train/inputs", fetch_local_rows(batch.images)[:n], labels)

    def _raise_non_finite(self, step: int, metrics: StepMetrics) -> NoReturn:
        # The last good state may still be on its way to disk.
        self.checkpoints.wait()
        self.tensorboard.close()
        kept = self.checkpoints.latest_step
        raise NonFiniteLossError(
            f"the loss is {metrics.loss} and the gradient's norm {metrics.grad_norm} at step {step}; "
            f"the last good checkpoint is {'none' if kept is None else f'step {kept}'}. Begin another run (--name) "
            f"with a lower optimizer.learning_rate, a longer schedule.warmup_epochs or train.clip_norm",
            step,
        )

    def _restore(self, abstract: TrainState) -> TrainState:
        state, saved = self.checkpoints.restore(self.start_step, abstract)
        # With other data the position in the order of samples would mean something else.
        digest, seed = self.train_split.digest, self.config.train.seed
        if (saved.digest, saved.seed) != (digest, seed):
            raise UserError(
                f"the checkpoint was trained on other data (digest {saved.digest[:12]}, seed {saved.seed}) "
                f"than data.source = {self.config.data.source} has now (digest {digest[:12]}, seed {seed}): "
                f"restore the data, or begin another run with --name"
            )
        return state


class _SaveSchedule:
    """When to save: every n steps, every n minutes by the clock of process 0, at evaluations, and at the end."""

    def __init__(self, config: RunConfig, steps: int, steps_per_epoch: float):
        self._config = config
        self._steps = steps
        self._eval_interval = (config.train.eval_every_epochs or math.inf) * steps_per_epoch
        self._saved_at = time.monotonic()
        self.save_agreed = False
        """Whether a process has asked for a save, and all processes have read that."""

    def save_due(self, step: int) -> bool:
        every = self._config.checkpoint.every_steps
        return self.save_agreed or self.evaluation_due(step) or (every is not None and step % every == 0)

    def evaluation_due(self, step: int) -> bool:
        # The interval may be a fraction of steps: evaluate at the first step at or after each multiple of it.
        return step == self._steps or step // self._eval_interval > (step - 1) // self._eval_interval

    def requests_save(self) -> bool:
        """Whether this process asks for a save. Only process 0 does, because the clocks of the hosts differ."""
        # In minutes by the monotonic clock, which no change of the host's time moves.
        minutes = self._config.checkpoint.every_minutes
        elapsed = time.monotonic() - self._saved_at
        return minutes is not None and jax.process_index() == 0 and elapsed > 60 * minutes

    def note_saved(self) -> None:
        self._saved_at = time.monotonic()
        self.save_agreed = False


def _request_maker(
    mesh: Mesh, save_requested: Callable[[], bool], stop_requested: Callable[[], bool]
) -> Callable[[], jax.Array]:
    """A function that gives what this process asks of all, as the (devices, 2) input of a step: [save, stop]."""
    sharding = per_device_sharding(mesh)

    # The array is nearly always the same one. Cached, it is not sent to the devices anew for each step.
    @cache
    def array(save: bool, stop: bool) -> jax.Array:
        return jax.make_array_from_callback(
            (mesh.size, 2), sharding, lambda index: np.array([[save, stop]], np.float32)
        )

    return lambda: array(save_requested(), stop_requested())
