"""One training, read top to bottom: mesh, data, model, restore, compile, then the loop.

Loop order: step, finite check, save, evaluate, log. Metrics are read LAG steps late, so the devices
always have work queued; all processes read the same numbers at the same step, hence agree on what they do.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import Mesh, NamedSharding

from configs.errors import UserError
from configs.schema import RunConfig, num_examples
from trainer.checkpoint import Checkpointer, DataPosition
from trainer.data import open_splits
from trainer.data.pipeline import eval_batches, train_batches
from trainer.evaluate import Evaluation, evaluate
from trainer.mesh import each_device, make_mesh, rows
from trainer.metrics import Interval, Stopwatch, TensorBoard, local_rows, logdir
from trainer.state import Network, TrainState, abstract_state, init_state, make_optimizer, make_schedule
from trainer.step import Batch, StepMetrics, make_eval_step, make_train_step

LAG = 2
REPORT_SECONDS = 0.5

Report = Callable[..., None]


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite. The same steps would do it again, so there is no point in a retry."""

    retryable = False


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
    NonFiniteLossError, ValueError for what the user must mend, and whatever Orbax or the data source raises.
    """
    begun = time.perf_counter()
    watch = Stopwatch()
    batch_size = config.train.batch_size
    steps_per_epoch = num_examples(config.data)[0] / batch_size

    # Mesh and data
    report(phase="opening data")
    mesh = make_mesh(config.mesh.batch, config.mesh.model)
    with watch.span("open_data"):
        train_split, eval_split = open_splits(config.data, config.model.num_classes)

    # Model, fresh or restored
    report(phase="initialising")
    network = Network(config.model)
    schedule = make_schedule(
        config.schedule, config.optimizer.learning_rate, steps=steps, steps_per_epoch=steps_per_epoch
    )
    optimizer = make_optimizer(config.optimizer, schedule, config.train.clip_norm)
    abstract = abstract_state(config, network, optimizer, mesh)
    with watch.span("restore"):
        checkpoints = Checkpointer(directory / "checkpoints", config.checkpoint)
        start = checkpoints.latest_step or 0
        if start:
            state, data = checkpoints.restore(start, abstract)
            _check_same_data(data, config, train_split.digest)
    if not start:
        with watch.span("initialise"):
            state = init_state(config, network, optimizer, abstract)
    leaves, structure = jax.tree.flatten(state)
    del state

    def current() -> TrainState:
        return jax.tree.unflatten(structure, leaves)

    # Data starts to flow while the step compiles
    batches = train_batches(config, train_split, rows(mesh), position=start * batch_size, steps=steps - start)
    save_due = _SaveDue(config, steps, steps_per_epoch)
    request = _requests(mesh, save_due.wanted, stop_requested)
    report(phase="compiling", step=start, steps=steps)
    with watch.span("compile"):
        jitted = make_train_step(config, network, optimizer, schedule, abstract, mesh)
        train_step = jitted.lower(jax.tree.leaves(abstract), *_abstract_inputs(config, mesh)).compile()
        eval_step = make_eval_step(config, network, abstract.evaluated(), mesh)

    board = TensorBoard(logdir(directory, config.log.tensorboard), active=jax.process_index() == 0)
    if not start:
        board.hyperparameters(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    in_flight: deque[tuple[int, jax.Array]] = deque()
    interval = Interval(batch_size, watch)
    last: dict[str, float] = {}
    stopping = False
    reported = 0.0

    def observe(upto: int) -> None:
        """Read metrics until at most `upto` steps are in flight: the finite check, and what was agreed."""
        nonlocal stopping
        while len(in_flight) > upto:
            step, values = in_flight.popleft()
            metrics = StepMetrics(*np.asarray(values).tolist())
            # An infinite gradient spoils the weights of its step, the loss only of the next.
            if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
                checkpoints.wait()
                kept = checkpoints.latest_step
                raise NonFiniteLossError(
                    f"the loss is {metrics.loss} and the gradient's norm {metrics.grad_norm} at step {step}; "
                    f"the last good checkpoint is {'none' if kept is None else f'step {kept}'}. Lower "
                    f"optimizer.learning_rate, lengthen schedule.warmup_epochs or set train.clip_norm."
                )
            interval.add(metrics)
            save_due.agreed |= metrics.save > 0
            stopping |= metrics.stop > 0

    def save(step: int) -> None:
        with watch.span("checkpoint"):
            observe(upto=0)  # a state behind a loss that is not finite is not kept
            position = DataPosition(step * batch_size, config.train.seed, train_split.digest)
            checkpoints.save(step, current(), position)
        save_due.saved(step)

    def run_evaluation(step: int) -> None:
        nonlocal stopping
        report(phase="evaluating", step=step)
        with watch.span("evaluation"):
            observe(upto=0)
            result = evaluate(
                eval_step,
                jax.tree.leaves(current().evaluated()),
                eval_batches(config, eval_split, rows(mesh)),
                request,
                num_mistakes=config.log.num_images,
            )
        if result is None:
            stopping = True
            return
        checkpoints.score(step, result.metrics[config.checkpoint.metric])
        last.update(result.metrics)
        _log_evaluation(board, step, result)
        report(**result.metrics, phase="training")

    # The loop
    step = start
    if start and save_due.at_evaluation(start) and start not in checkpoints.scores:
        run_evaluation(start)  # the attempt before ended between save and evaluation
    trained_from = time.perf_counter()
    interval.reset()
    while step < steps and not stopping:
        with watch.span("data_wait" if step > start else "first_batch"):
            batch = next(batches)
        if step == 0:
            _log_inputs(board, batch, config.log.num_images)
        with watch.span("first_step" if step == start else "compute"):
            leaves, values = train_step(leaves, batch, request())
            step += 1
            in_flight.append((step, values))
            observe(upto=0 if step == start + 1 else LAG)
        if step == start + 1:
            report(phase="training", step=step, seconds=dict(watch.seconds))
            trained_from = time.perf_counter()
            interval.reset()
        checkpoints.poll()
        if save_due(step) or (stopping and step > start):
            save(step)
        if save_due.at_evaluation(step) and not stopping:
            run_evaluation(step)
        if len(interval) and (step % config.log.every_steps == 0 or step == steps or stopping):
            last.update(interval.summary())
            board.scalars(step, {**interval.summary(), "train/epoch": step / steps_per_epoch})
            interval.reset()
            report(step=step, epoch=step / steps_per_epoch, seconds=dict(watch.seconds), **last)
        elif len(interval) and time.perf_counter() - reported > REPORT_SECONDS:
            reported = time.perf_counter()
            report(step=step, epoch=step / steps_per_epoch, **interval.summary())

    report(phase="saving")
    with watch.span("checkpoint"):
        checkpoints.close()
    board.close()
    trained_seconds = time.perf_counter() - trained_from - watch.seconds["evaluation"]
    watch.seconds["total"] = time.perf_counter() - begun
    return Outcome(
        status="completed" if step == steps else "stopped",
        step=step,
        epoch=step / steps_per_epoch,
        metrics=last,
        images_per_second=max(step - start - 1, 0) * batch_size / trained_seconds,
        seconds=dict(watch.seconds),
    )


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

    def saved(self, step: int) -> None:
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


def _check_same_data(saved: DataPosition, config: RunConfig, digest: str) -> None:
    if (saved.digest, saved.seed) != (digest, config.train.seed):
        raise UserError(
            f"the checkpoint was trained on other data (digest {saved.digest[:12]}, seed {saved.seed}) than "
            f"data.source = {config.data.source} has now (digest {digest[:12]}, seed {config.train.seed}): "
            f"restore the data, or begin another run with --name"
        )


def _log_inputs(board: TensorBoard, batch: Batch, num_images: int) -> None:
    images, labels = local_rows(batch.images)[:num_images], local_rows(batch.labels)[:num_images]
    board.images(0, "train/inputs", images, [str(label) for label in labels])


def _log_evaluation(board: TensorBoard, step: int, result: Evaluation) -> None:
    board.scalars(step, result.metrics)
    board.images(step, "eval/mistakes", result.mistakes, result.captions)
