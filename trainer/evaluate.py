"""Evaluation: every held-out example is counted exactly once, whatever the batch size and the number of
devices.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from trainer.metrics import fetch_local_rows
from trainer.step import Batch, EvalSums

MAX_BATCHES_IN_FLIGHT = 2
"""Batches that are queued on the devices before the host reads the sums of the oldest."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation."""

    metrics: dict[str, float]
    """eval/accuracy, eval/loss and eval/count."""
    mistakes: np.ndarray
    """(n, height, width, 3) uint8: wrongly classified images among the rows that this process holds."""
    captions: list[str]
    """`label→prediction` for each mistake."""


def evaluate(
    step: Callable[[list[jax.Array], Batch, jax.Array], tuple[jax.Array, jax.Array]],
    leaves: list[jax.Array],
    batches: Iterator[Batch],
    requests: Callable[[], jax.Array],
    *,
    num_mistakes: int,
) -> Evaluation | None:
    """Run `step` over all `batches`. Returns None if the processes agree to stop on the way.

    `requests()` gives the (devices, 2) array of what this process asks for. At most `num_mistakes` wrongly
    classified images are kept.
    """
    in_flight: list[tuple[Batch, jax.Array, jax.Array]] = []
    # float64, because float32 loses digits in the sum over a large split.
    totals = np.zeros(len(EvalSums._fields))
    mistakes: list[tuple[np.ndarray, str]] = []

    def collect() -> bool:
        batch, sums, predictions = in_flight.pop(0)
        totals[:] += np.asarray(sums, np.float64)
        if len(mistakes) < num_mistakes:
            mistakes.extend(_mistakes(batch, predictions))
        return EvalSums(*totals).stop_requests > 0

    for batch in batches:
        in_flight.append((batch, *step(leaves, batch, requests())))
        # Reading the sums waits for the devices, which by then have the next batches queued.
        if len(in_flight) > MAX_BATCHES_IN_FLIGHT and collect():
            return None
    while in_flight:
        if collect():
            return None
    sums = EvalSums(*totals)
    shown = mistakes[:num_mistakes]
    return Evaluation(
        metrics={
            "eval/accuracy": float(sums.correct / sums.examples),
            "eval/loss": float(sums.loss / sums.examples),
            "eval/count": int(sums.examples),
        },
        mistakes=np.array([image for image, _ in shown]),
        captions=[caption for _, caption in shown],
    )


def _mistakes(batch: Batch, predictions: jax.Array) -> Iterator[tuple[np.ndarray, str]]:
    """The wrongly classified images of a batch on this process, each with its caption."""
    images, labels, predicted = (fetch_local_rows(x) for x in (batch.images, batch.labels, predictions))
    for i in np.flatnonzero((labels >= 0) & (labels != predicted)):
        yield images[i], f"{labels[i]}→{predicted[i]}"
