"""One step does what its config says: against plain references, and in the compiled program itself."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.trainer.small import Trainable, config_of, shared
from trainer.state import Network, TrainState, make_optimizer, make_schedule
from trainer.step import Batch, StepMetrics, make_eval_step


def one_step(
    *overrides: str, masked: Sequence[int] = ()
) -> tuple[Trainable, TrainState, TrainState, StepMetrics]:
    """The state before and after a step over one batch, and its metrics."""
    t = shared("schedule.name=constant", *overrides)
    before = jax.tree.map(np.array, t.fresh())
    batch = mask(t.batch(), masked)
    leaves, values = t.step(jax.tree.leaves(t.fresh()), batch, t.requests(save=1))
    after = jax.tree.unflatten(jax.tree.structure(t.abstract), leaves)
    return t, before, after, StepMetrics(*np.asarray(values).tolist())


def mask(batch: Batch, masked: Sequence[int]) -> Batch:
    labels = np.asarray(batch.labels).copy()
    labels[list(masked)] = -1
    return batch._replace(labels=jax.device_put(labels, batch.labels.sharding))


def plain_gradient(
    t: Trainable, state: TrainState, smoothing: float, masked: Sequence[int] = ()
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient of the batch without the masked rows, written out."""
    batch = t.batch()
    counted = jnp.asarray(~np.isin(np.arange(len(batch.labels)), masked), jnp.float32)
    images = (jnp.asarray(np.asarray(batch.images), jnp.float32) / 255 - 0.305) / 0.376
    labels = jnp.asarray(np.asarray(batch.labels))

    stats = jax.tree.map(jnp.asarray, state.batch_stats)

    def loss(params: dict[str, jax.Array], counted: jax.Array) -> jax.Array:
        logits, _ = t.network.apply({**params, **stats}, images, train=True)
        logs = jax.nn.log_softmax(logits)
        right = jnp.take_along_axis(logs, labels[:, None], 1)[:, 0]
        losses = -((1 - smoothing) * right + smoothing * logs.mean(1))
        return (counted * losses).sum() / jnp.maximum(counted.sum(), 1)

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params, counted)
    return float(value), jax.tree.map(np.array, gradient)


@pytest.mark.parametrize("masked", [[], [0, 1, 2, 7, 31], range(32)], ids=["whole", "masked", "all masked"])
def test_sgd_nesterov_with_decay_on_kernels_only_equals_the_formula(masked: Sequence[int]) -> None:
    t, before, after, metrics = one_step(
        "optimizer.learning_rate=0.1", "optimizer.weight_decay=0.01", "optimizer.momentum=0.9", masked=masked
    )
    loss, gradient = plain_gradient(t, before, smoothing=0.1, masked=masked)
    assert metrics.loss == pytest.approx(loss, abs=1e-5)
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    for name, old in before.params.items():
        g = gradient[name] + (0.01 * old if old.ndim > 1 else 0)
        np.testing.assert_allclose(after.params[name], old - 0.1 * (g + 0.9 * g), atol=2e-6, err_msg=name)
    assert int(after.step) == 1
    correct = metrics.accuracy * (32 - len(masked))
    assert correct == pytest.approx(round(correct), abs=1e-4)
    assert metrics.accuracy <= 1


def test_weight_decay_spares_batch_norm_and_biases_of_resnet50() -> None:
    config = config_of("model.name=resnet50", "model.width=64", "model.num_classes=1000", "model.stem=imagenet",
                       "optimizer.weight_decay=1", "optimizer.momentum=0", "optimizer.nesterov=false")  # fmt: skip
    network = Network(config.model)
    params, _ = jax.eval_shape(network.init, jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(1.0), None)

    # The optimizer does not look at sizes, so one element stands for each weight.
    ones = {name: jnp.ones((1,) * leaf.ndim) for name, leaf in params.items()}
    # With no gradient an update is the decay alone.
    update, _ = optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)
    sizes = {-1: 0, 0: 0}
    for name, leaf in params.items():
        sizes[int(update[name].item())] += leaf.size
    assert sizes == {-1: 25_502_912, 0: 54_120}


def test_clipping_bounds_the_norm_of_what_is_applied() -> None:
    _, before, after, metrics = one_step(
        "train.clip_norm=0.01", "optimizer.learning_rate=1.0", "optimizer.momentum=0",
        "optimizer.nesterov=false", "optimizer.weight_decay=0",
    )  # fmt: skip
    moved = np.sqrt(sum(((np.asarray(after.params[n]) - p) ** 2).sum() for n, p in before.params.items()))
    assert metrics.grad_norm > 0.1
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("masked", [[], [0, 2, 4, 6, 8, 9]])  # five of one micro-batch, one of the other
def test_accumulation_equals_one_large_batch(masked: list[int]) -> None:
    # Groups of two: rows i, i + 2, … make the micro-batches, so the large batch is permuted to match.
    t = shared("schedule.name=constant", "train.accumulate=2")
    large = shared("schedule.name=constant")
    batch = mask(t.batch(), masked)
    order = np.concatenate([np.arange(0, 32, 2), np.arange(1, 32, 2)])
    permuted = Batch(*(jax.device_put(np.asarray(x)[order], x.sharding) for x in batch))
    states, metrics = [], []
    for trainable, rows in ((t, batch), (large, permuted)):
        leaves, values = trainable.step(jax.tree.leaves(trainable.fresh()), rows, trainable.requests())
        states.append(jax.tree.unflatten(jax.tree.structure(trainable.abstract), leaves))
        metrics.append(np.asarray(values))
    np.testing.assert_allclose(*metrics, rtol=1e-4)
    for name, weight in states[0].params.items():
        np.testing.assert_allclose(weight, states[1].params[name], atol=1e-6, err_msg=name)


def test_average_of_weights_follows_its_formula() -> None:
    _, before, after, _ = one_step("train.ema_decay=0.99")
    decay = 1 / 10  # (1 + 0) / (10 + 0) at the first step
    assert after.ema is not None
    for name, old in {**before.params, **before.batch_stats}.items():
        new = np.asarray({**after.params, **after.batch_stats}[name])
        np.testing.assert_allclose(after.ema[name], decay * old + (1 - decay) * new, atol=1e-6)
    assert after.eval_weights() is after.ema


def test_adamw_learns() -> None:
    _, before, after, metrics = one_step("optimizer.name=adamw", "optimizer.learning_rate=0.001")
    moved = np.abs(np.asarray(after.params["classifier.kernel"]) - before.params["classifier.kernel"])
    assert moved.max() == pytest.approx(0.001, rel=0.01)  # Adam's first step is the learning rate
    assert metrics.learning_rate == pytest.approx(0.001)


def test_what_one_process_asks_all_processes_read() -> None:
    *_, metrics = one_step()
    assert (metrics.save_requests, metrics.stop_requests) == (1, 0)


def collectives(*overrides: str) -> int:
    t = shared(*overrides)
    text = t.step.lower(jax.tree.leaves(t.abstract), t.batch(), t.requests()).compile().as_text()
    return len(
        re.findall(
            r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
        )
    )


def test_batch_norm_over_groups_adds_no_collective_to_the_gradients() -> None:
    assert (
        collectives("model.batch_norm=8") == 1
    )  # 8 images a device: gradient, statistics and metrics in one
    assert collectives("model.batch_norm=4") == 1
    # Each of the three batch norms all-reduces its statistics once on the way forward and once on the way back.
    assert collectives("model.batch_norm=global") == 1 + 2 * 3


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_schedules_warm_up_and_end_where_they_say(name: str, middle: float, end: float) -> None:
    schedule = config_of(
        f"schedule.name={name}", "schedule.warmup_epochs=1", "schedule.final_fraction=0.1"
    ).schedule
    lr = make_schedule(schedule, 1.0, steps=110, steps_per_epoch=10)
    assert [round(float(lr(s)), 4) for s in (0, 5, 10, 60, 110)] == [0.0, 0.5, 1.0, middle, end]


def test_padding_is_not_counted_in_evaluation() -> None:
    t = shared()
    weights = t.fresh().eval_weights()
    step = make_eval_step(t.config, t.network, t.abstract.eval_weights(), t.mesh)
    batch = t.batch()
    labels = np.asarray(batch.labels).copy()
    labels[5:] = -1
    padded = batch._replace(labels=jax.device_put(labels, batch.labels.sharding))
    sums, predictions = step(jax.tree.leaves(weights), padded, t.requests())
    loss, correct, examples, stop = np.asarray(sums)
    assert (examples, stop) == (5, 0)
    assert correct == (np.asarray(predictions)[:5] == labels[:5]).sum()
    logits, _ = t.network.apply(
        weights, (jnp.asarray(np.asarray(batch.images[:5]), jnp.float32) / 255 - 0.305) / 0.376, train=False
    )
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels[:5]).sum()
    assert loss == pytest.approx(float(expected), rel=1e-5)
