"""The first thing that a newcomer types: the recipe as shipped, from the plan to the events it leaves."""

import json
import os
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.cluster
RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def quickstart(make_run):
    ours = ("JAX_", "XLA_")  # what tests/conftest.py sets to make the other tests fast
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    run = make_run(RECIPE, environment, stub=False)
    launched = run.launch(cluster=None)
    assert launched.wait(600) == 0, launched.text
    return run, launched.text


@pytest.fixture(scope="module")
def steps(quickstart):
    return json.loads((quickstart[0].path / "plan.json").read_text())["steps"]


@pytest.fixture(scope="module")
def events(quickstart):
    run, _ = quickstart
    return EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_it_learns_real_digits_and_counts_each_held_out_one_once(quickstart):
    metrics = quickstart[0].result()["metrics"]
    assert metrics["eval/accuracy"] >= 0.97
    assert metrics["eval/count"] == 360


def test_result_json_is_what_the_design_promises_to_scripts(quickstart, steps):
    result = quickstart[0].result()
    assert set(result) == {
        "status", "step", "epoch", "metrics", "images_per_second", "attempts", "wall_seconds", "goodput", "failure",
    }  # fmt: skip
    assert (result["status"], result["step"], result["attempts"], result["failure"]) == (
        "completed",
        90,
        1,
        None,
    )
    assert {"eval/accuracy", "eval/count", "train/loss"} <= set(result["metrics"])
    assert sum(result["goodput"].values()) == pytest.approx(1, abs=0.01)


def test_the_output_reads_from_plan_to_last_block_without_control_characters(quickstart, steps):
    run, text = quickstart
    assert "\x1b" not in text
    assert "\r" not in text
    plan, progress, last_block = text.split("starting …")[0], *text.split("starting …")[1].split("\n\n")
    assert "701,466 parameters" in plan
    assert str(run.path) in plan
    line = r"step \d+/90  epoch [\d.]+/[\d.]+  loss [\d.]+  accuracy [\d.]+%  [\d,]+ images/s  data wait \d+%(?: \((?:input|compute)-bound, \d ready\))?  ETA \d+:\d\d"
    assert len(re.findall(line, progress)) >= 5
    assert re.search(rf"^checkpoints +{run.path}/checkpoints \(newest: step 90\)$", last_block, re.MULTILINE)
    assert re.search(rf"^look +tensorboard --logdir {run.path}/tensorboard$", last_block, re.MULTILINE)


def test_typed_again_it_says_complete_and_starts_nothing(quickstart):
    run, _ = quickstart
    again = run.launch(cluster=None)
    assert again.wait() == 0
    assert "complete" in again.text
    assert "held-out images" in again.text
    assert len(run.attempts()) == 1


def test_tensorboard_shows_learning_and_where_the_time_goes(events, steps):
    wanted = {
        "train/loss", "train/accuracy", "train/learning_rate", "eval/loss", "eval/accuracy", "eval/count",
        "speed/images_per_second", "step_seconds/data_wait", "step_seconds/compute",
        "step_seconds/checkpoint_stall",
    }  # fmt: skip
    assert wanted <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == list(range(10, steps + 1, 10))
    assert {e.value for e in events.Scalars("eval/count")} == {360}
    assert b"learning_rate: 0.1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_shows_first_inputs_and_mistakes_as_pictures(events):
    inputs, mistakes = events.Images("train/inputs"), events.Images("eval/mistakes")
    assert [e.step for e in inputs] == [0]
    assert {e.step for e in mistakes} <= {23, 45, 68, 90}
    for picture in (*inputs, *mistakes):
        assert picture.encoded_image_string.startswith(b"\x89PNG")
        assert min(picture.width, picture.height) >= 64
