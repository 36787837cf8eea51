"""Training from gs://, with checkpoints and events there too: killed, it ends with the bits of an uninterrupted run
from local files; moved to other processes, it goes on with the same samples.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.clusters.runs import Run
from tests.gcs import BUCKET, Fault, Server, environment
from tests.trainer import datasets

pytestmark = pytest.mark.cluster

NUM_TRAIN, NUM_EVAL, CLASSES, BATCH, STEPS, SAVE_EVERY = 160, 44, 10, 32, 40, 8
# A constant rate, and groups of batch norm that fit on a device of any of the clusters.
RECIPE = f"""
model: {{name: resnet4, num_classes: {CLASSES}, stem: small, width: 8, dtype: float32, batch_norm: 8}}
data:
  source: records
  train: {{path: DATA/train, num_examples: {NUM_TRAIN}}}
  eval: {{path: DATA/eval, num_examples: {NUM_EVAL}}}
  image_size: 16
  lanes: 8
  window: 8
augment: {{mixup: 0.2}}
train: {{batch_size: {BATCH}, steps: {STEPS}, eval_every_epochs: null}}
optimizer: {{learning_rate: 0.02}}
schedule: {{name: constant}}
checkpoint: {{every_steps: {SAVE_EVERY}}}
log: {{every_steps: 1}}
"""
IN_BUCKET = (f"checkpoint.directory=gs://{BUCKET}/checkpoints", f"log.tensorboard=gs://{BUCKET}/events")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both splits."""
    folder = tmp_path_factory.mktemp("data")
    for split, size, seed in (("train", NUM_TRAIN, 0), ("eval", NUM_EVAL, 1)):
        labels = [i % CLASSES for i in range(size)]
        datasets.write(folder / split, datasets.jpegs(size, size=24, seed=seed), labels)
    return folder


@pytest.fixture
def server(data: Path) -> Iterator[Server]:
    """A Cloud Storage that holds the same."""
    server = Server()
    server.put_folder(data, "data/")
    yield server
    server.close()


def make(make_run: Callable[..., Run], data: str, variables: dict[str, str] | None = None) -> Run:
    run = make_run(environment=os.environ | (variables or {}), stub=False)
    run.recipe.write_text(RECIPE.replace("DATA", data))
    return run


@pytest.fixture
def streamed(make_run: Callable[..., Run], server: Server) -> Run:
    """A run from the bucket, about to be launched."""
    return make(make_run, f"gs://{BUCKET}/data", environment(server.address))


@pytest.fixture(scope="module")
def from_files(make_run: Callable[..., Run], data: Path) -> Run:
    """The same run from local files, with local checkpoints, from beginning to end in one attempt."""
    run = make(make_run, str(data))
    launched = run.launch()
    assert launched.wait() == 0, launched.text
    return run


def saved_steps(server: Server) -> list[int]:
    names = [re.fullmatch(r"checkpoints/(\d+)/commit_success.txt", name) for name in server.contents()]
    return sorted(int(name[1]) for name in names if name)


def download(server: Server, prefix: str, folder: Path) -> Path:
    for name, content in server.contents(prefix).items():
        file = folder / name.removeprefix(prefix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def losses(events: Path) -> dict[int, float]:
    scalars = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    return {e.step: e.value for e in scalars}


def in_both(
    server: Server, run: Run, other: Run, without: range = range(0)
) -> tuple[list[float], list[float]]:
    """Training losses of the steps of which both runs wrote one; after a save and a start, two steps have none."""
    mine, others = (
        losses(download(server, "events/", run.folder / "events")),
        losses(other.path / "tensorboard"),
    )
    steps = sorted(mine.keys() & others.keys() - set(without))
    return [mine[k] for k in steps], [others[k] for k in steps]


def test_killed_in_mid_save_it_resumes_from_the_bucket_to_the_bits_of_the_run_from_files(
    streamed: Run, server: Server, from_files: Run
) -> None:
    run, unfinished = streamed, f"checkpoints/{2 * SAVE_EVERY}/"
    # The second save never ends; the third waits for it, so training stands still before the kill.
    server.faults = [Fault("slow", f"{unfinished}state/*", operation="upload", seconds=600)]
    launched = run.launch(*IN_BUCKET)
    run.wait_for_step(2 * SAVE_EVERY + 2)
    assert saved_steps(server) == [SAVE_EVERY]
    assert server.contents(unfinished), "the save has begun"
    run.kill_with_launcher(launched)
    launched.wait()

    server.faults = []
    status = run.command("status")
    assert status.wait() == 0
    assert f"checkpoints {SAVE_EVERY}\n" in status.text
    again = run.launch(*IN_BUCKET)
    assert again.wait() == 0, again.text
    assert f"resuming from step {SAVE_EVERY}" in again.text
    assert f"checkpoints gs://{BUCKET}/checkpoints (newest: step {STEPS})" in again.text
    assert [a["kept_step"] for a in run.attempts()] == [SAVE_EVERY, STEPS]

    download(server, "checkpoints/", run.path / "checkpoints")
    run.assert_same_bits(from_files)
    metrics = from_files.result()["metrics"]
    assert metrics["eval/count"] == NUM_EVAL
    assert {k: run.result()["metrics"][k] for k in metrics if k.startswith("eval/")} == {
        k: v for k, v in metrics.items() if k.startswith("eval/")
    }
    measured, expected = in_both(server, run, from_files)
    assert len(measured) > (STEPS - SAVE_EVERY) / 2
    assert measured == expected


def test_saved_on_four_processes_it_goes_on_with_two_and_every_sample_comes_once_an_epoch(
    streamed: Run, server: Server, from_files: Run
) -> None:
    run = streamed
    launched = run.launch(*IN_BUCKET, cluster="local-4")
    run.wait_for_step(3)
    assert run.command("stop").wait() == 0
    assert launched.wait() == 130, launched.text
    (step,) = saved_steps(server)[-1:]
    assert 3 <= step < STEPS
    again = run.launch(*IN_BUCKET, cluster="local-2")
    assert again.wait() == 0, again.text
    assert f"resuming from step {step}" in again.text

    # From the stop to the next save, what is written are means over other steps than those of `from_files`.
    next_save = -(-step // SAVE_EVERY) * SAVE_EVERY
    measured, expected = in_both(server, run, from_files, range(step, next_save + 1))
    assert len(measured) > STEPS / 2
    np.testing.assert_allclose(measured, expected, rtol=1e-5)  # sums in another order, not other samples

    before = [ordered(run, step * BATCH // 4, hosts=4, host=host, start=0) for host in range(4)]
    after = [
        ordered(run, (STEPS - step) * BATCH // 2, hosts=2, host=host, start=step * BATCH) for host in range(2)
    ]
    seen = Counter(key for keys in before + after for key in keys)
    assert len(seen) == STEPS * BATCH
    assert set(seen.values()) == {1}
    samples = Counter((position // NUM_TRAIN, *rest) for position, *rest in seen)
    assert len(samples) == STEPS * BATCH, "each once in each epoch"


def ordered(run: Run, count: int, *, hosts: int, host: int, start: int) -> list[tuple[int, str, str]]:
    """(position, shard, record) of the samples of one host, by `launch data order`."""
    order = run.plain(
        "data", "order", str(run.recipe), "--hosts", str(hosts), "--host", str(host), "--start", str(start),
        "--count", str(count),
    )  # fmt: skip
    assert order.wait() == 0, order.text
    lines = (line.split() for line in order.text.splitlines())
    return [(int(position), shard, record) for position, shard, record, _ in lines]
