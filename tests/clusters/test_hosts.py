"""Over several hosts, as jax tells them apart, a run trains to the losses that it has on one, and moves to them.

XLA makes a slice of each host, and jax.make_mesh refuses several slices. Here the workers share this machine, and
each has a boot id of its own.
"""

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.clusters.network import missing, skip_without

pytestmark = pytest.mark.cluster
HOSTS = Path(__file__).parents[1] / "hosts"
SHORT = ("train.steps=12", "optimizer.learning_rate=0.2", "checkpoint.every_steps=null")


@pytest.fixture(scope="module")
def trained_on(make_run):
    """Trains on hosts that are given process by process; the loss of each step, and the run."""
    skip_without(missing(()), "hosts")

    def train(cluster, hosts, *overrides, run=None):
        run = run or make_run(environment={**os.environ, "PYTHONPATH": str(HOSTS)}, stub=False)
        run.environment["HOSTS"] = hosts
        launched = run.launch(*SHORT, *overrides, cluster=cluster)
        assert launched.wait() == 0, launched.text
        (run.path / "boot-id-0").unlink()  # so each run of them has written its own
        events = EventAccumulator(str(run.path / "tensorboard")).Reload()
        return [event.value for event in events.Scalars("train/loss")], run

    return train


@pytest.fixture(scope="module")
def one_host(trained_on):
    return trained_on("local-2", "a,a")


@pytest.mark.parametrize(
    ("cluster", "hosts", "model"),
    [("local-2x2", "a,b", 2), ("local-4", "a,a,b,b", 2), ("local-4", "a,b,c,d", 1)],
)
def test_two_and_four_hosts_train_to_the_losses_of_one(trained_on, one_host, cluster, hosts, model):
    losses, run = trained_on(cluster, hosts, f"mesh.model={model}")
    assert f" × cpu in {len(set(hosts.split(',')))} slices" in run.report()["devices"]
    reference, _ = one_host
    assert max(reference) - min(reference) > 0.05  # twenty times what follows allows
    assert losses == pytest.approx(reference, rel=1e-3)


def test_process_0_with_the_last_rows_begins_a_run_that_goes_on_over_two_hosts(
    trained_on, make_run, one_host
):
    run = make_run(environment={**os.environ, "PYTHONPATH": str(HOSTS), "REVERSED": "1"}, stub=False)
    trained_on("local-2x2", "a,a", "train.steps=4", run=run)
    del run.environment["REVERSED"]
    losses, _ = trained_on("local-2", "a,b", run=run)
    assert [a["from_step"] for a in run.attempts()] == [0, 4]
    reference, of_one_host = one_host
    assert losses[-1] == pytest.approx(reference[-1], rel=1e-3)
    result, expected = run.result()["metrics"], of_one_host.result()["metrics"]
    assert result["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-3)
    assert result["eval/count"] == expected["eval/count"]
