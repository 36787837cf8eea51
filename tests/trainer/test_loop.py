"""The loop as a whole: exact resume, what is saved and when, and what it says of itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.errors import UserError
from configs.schema import CheckpointConfig
from tests.trainer.small import Recorder, equal_states, run, shared
from trainer.checkpoint import Checkpointer
from trainer.loop import NonFiniteLossError
from trainer.state import TrainState


def state_of(directory: Path, step: int, *overrides: str) -> TrainState:
    """What the checkpoint of `step` holds."""
    checkpoints = Checkpointer(directory / "checkpoints", CheckpointConfig())
    return checkpoints.restore(step, shared(*overrides).abstract)[0]


def saved_steps(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


def test_stopped_at_10_and_resumed_to_20_equals_20_steps_bit_for_bit(tmp_path: Path) -> None:
    settings = ("train.ema_decay=0.9", "augment.flip=true")
    whole = run(tmp_path / "whole", *settings)
    recorder = Recorder(stop_at=8)  # asked while step 8 is begun; agreed two steps later
    first = run(tmp_path / "parts", *settings, recorder=recorder)
    assert (first.status, first.step) == ("stopped", 10)
    assert saved_steps(tmp_path / "parts") == [10]
    second = run(tmp_path / "parts", *settings)
    assert (whole.status, second.status, second.step) == ("completed", "completed", 20)
    assert equal_states(
        state_of(tmp_path / "whole", 20, *settings), state_of(tmp_path / "parts", 20, *settings)
    )
    for key in ("eval/accuracy", "eval/loss", "eval/count", "train/loss"):
        assert second.metrics[key] == whole.metrics[key]


def test_a_run_goes_on_with_the_same_samples_on_another_mesh(tmp_path: Path) -> None:
    run(tmp_path / "a", "model.batch_norm=global", steps=10)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    there = run(tmp_path / "a", "model.batch_norm=global")
    other = run(tmp_path / "b", "model.batch_norm=global", "mesh.batch=2", "mesh.model=2")
    assert other.metrics["eval/count"] == there.metrics["eval/count"] == 360
    assert other.metrics["train/loss"] == pytest.approx(there.metrics["train/loss"], abs=1e-3)


def test_checkpoints_come_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, "checkpoint.every_steps=8", "checkpoint.every_minutes=null", "checkpoint.keep_last=9")
    assert saved_steps(tmp_path) == [8, 16, 20]


def test_checkpoints_come_every_n_minutes_by_agreement(tmp_path: Path) -> None:
    run(tmp_path, "checkpoint.every_minutes=1e-9", "checkpoint.keep_last=99", steps=9)
    # Asked for at each step, read two steps later, and asked for anew only after the save.
    assert saved_steps(tmp_path) == [1, 4, 7, 9]


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    explode = ("schedule.name=linear", "optimizer.learning_rate=1e30", "schedule.warmup_epochs=1")
    with pytest.raises(NonFiniteLossError, match=r"nan.* at step 3; the last good .* step 2\.") as e:
        run(tmp_path, *explode, "checkpoint.every_steps=1", "checkpoint.keep_last=99")
    assert saved_steps(tmp_path) == [1, 2]
    assert not e.value.retryable
    finite = state_of(tmp_path, 2, *explode)
    assert all(np.isfinite(np.asarray(w)).all() for w in finite.params.values())


def test_other_data_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    synthetic = ("data.source=synthetic", "data.train.num_examples=1437", "data.eval.num_examples=360")
    with pytest.raises(UserError, match="trained on other data"):
        run(tmp_path, *synthetic, steps=5)


def test_an_evaluation_cut_off_between_save_and_score_is_made_up_for(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    scores = tmp_path / "checkpoints" / "scores.json"
    scores.unlink()
    outcome = run(tmp_path, steps=2)
    assert outcome.metrics["eval/count"] == 360
    assert scores.exists()


def test_evaluations_come_each_epoch_and_at_the_end(tmp_path: Path) -> None:
    recorder = Recorder()
    run(tmp_path, "train.eval_every_epochs=0.2", recorder=recorder)  # 45 steps an epoch: each 9
    evaluated = [w["step"] for w in recorder.reports if w.get("phase") == "evaluating"]
    assert evaluated == [9, 18, 20]


def test_tensorboard_has_all_that_the_docs_promise(tmp_path: Path) -> None:
    run(tmp_path, "train.eval_every_epochs=0.2")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate", "train/epoch",
        "speed/images_per_second", "speed/data_wait_share", "step_seconds/total", "step_seconds/data_wait",
        "step_seconds/compute", "step_seconds/checkpoint_stall",
        "eval/accuracy", "eval/loss", "eval/count", "data/ready_batches",
    } == set(tags["scalars"])  # fmt: skip
    assert {"train/inputs", "eval/mistakes"} == set(tags["images"])
    assert {"config/text_summary", "speed/bound/text_summary"} == set(tags["tensors"])
    assert [e.step for e in events.Scalars("train/loss")] == [5, 9, 10, 15, 18, 20] or [
        e.step for e in events.Scalars("train/loss")
    ] == [5, 10, 15, 20]
    picture = events.Images("train/inputs")[0]
    assert (picture.width, picture.height) == (5 * 64, 5 * 76)


def test_the_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    metrics = run(tmp_path).metrics
    parts = sum(metrics[f"step_seconds/{p}"] for p in ("data_wait", "compute", "checkpoint_stall"))
    assert parts == pytest.approx(metrics["step_seconds/total"])
    assert metrics["speed/images_per_second"] == pytest.approx(32 / metrics["step_seconds/total"])


def test_a_stop_in_the_last_evaluation_is_no_completion(tmp_path: Path) -> None:
    first = run(tmp_path, steps=4, recorder=Recorder(stop_at=6))  # asked in the second batch of evaluation
    assert (first.status, first.step) == ("stopped", 4)
    second = run(tmp_path, steps=4)
    assert (second.status, second.metrics["eval/count"]) == ("completed", 360)
