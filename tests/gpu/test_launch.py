"""`launch --cluster local` on a GPU: a gang of one process, which completes, and which resumes after it was killed."""

import os
from collections.abc import Iterator

import pytest

from tests.clusters.runs import TINY, Run

pytestmark = pytest.mark.gpu


@pytest.fixture
def training(tmp_path) -> Iterator[Run]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    run = Run(tmp_path, recipe, dict(os.environ), stub=False)
    yield run
    run.end()


def test_a_gang_of_one_is_killed_resumes_on_the_same_device_and_completes(training, device):
    # Long enough to be killed between its first save and its end, however fast the device.
    steps = 200 if device.platform == "cpu" else 4000
    settings = (f"train.steps={steps}", f"checkpoint.every_steps={steps // 10}")
    launched = training.launch(*settings, cluster="local")
    training.wait_until(training.checkpoint_steps, "the first save")
    training.kill_workers(0)
    assert launched.wait() == 0, launched.text
    assert f"1 process × 1 {device.platform}" in launched.text
    first, second = training.attempts()
    assert first["failure"]["host"] is not None
    # The worker has compared its platform and its devices with this plan before it trained.
    assert second["from_step"] == first["kept_step"] >= steps // 10
    result = training.result()
    assert (result["status"], result["step"]) == ("completed", steps)
    # What was learned survived. Not bit for bit: sums of a GPU that go through atomics have no fixed order.
    assert result["metrics"]["eval/accuracy"] > 0.3
