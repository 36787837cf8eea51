"""A checkpoint is the state at its step, comes back on any mesh, and is trusted only while it is whole."""

from pathlib import Path

import jax
import numpy as np
import pytest

from configs.schema import CheckpointConfig
from tests.trainer.small import Trainable, config_of, equal_states
from trainer.checkpoint import CHECKSUMS, Checkpointer, DataPosition

POSITION = DataPosition(position=96, seed=0, digest="d")


@pytest.fixture(scope="module")
def trainable() -> Trainable:
    return Trainable(config_of("train.ema_decay=0.9"))


def saved(directory: Path, trainable: Trainable, steps: list[int], **settings: object) -> Checkpointer:
    """A checkpointer that has saved a fresh state under each of `steps`."""
    checkpoints = Checkpointer(directory, CheckpointConfig.model_validate(settings))
    for step in steps:
        checkpoints.save(step, trainable.init(), POSITION)
    checkpoints.wait()
    return checkpoints


def test_a_save_is_the_state_at_its_step_though_training_goes_on(
    tmp_path: Path, trainable: Trainable
) -> None:
    t, step = trainable, trainable.step()
    checkpoints = Checkpointer(tmp_path, CheckpointConfig())
    leaves = jax.tree.leaves(t.init())
    structure = jax.tree.structure(t.abstract)
    for i in range(3):
        leaves, _ = step(leaves, t.batch(i), t.requests())
    at_save = jax.tree.map(np.array, jax.tree.unflatten(structure, leaves))
    checkpoints.save(3, jax.tree.unflatten(structure, leaves), POSITION)
    for i in range(5):  # the buffers that were saved are donated and written over
        leaves, _ = step(leaves, t.batch(i), t.requests())
    checkpoints.close()
    restored, position = Checkpointer(tmp_path, CheckpointConfig()).restore(3, t.abstract)
    assert equal_states(restored, at_save)
    assert position == POSITION


@pytest.mark.parametrize(("batch", "model"), [(2, 2), (1, 4)])
def test_it_comes_back_on_another_mesh(tmp_path: Path, trainable: Trainable, batch: int, model: int) -> None:
    saved(tmp_path, trainable, [1]).close()
    other = Trainable(config_of("train.ema_decay=0.9", f"mesh.batch={batch}", f"mesh.model={model}"))
    restored, _ = Checkpointer(tmp_path, CheckpointConfig()).restore(1, other.abstract)
    assert equal_states(restored, trainable.init())
    wanted = [leaf.sharding for leaf in jax.tree.leaves(other.abstract)]
    assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == wanted


def test_the_last_and_the_best_are_kept(tmp_path: Path, trainable: Trainable) -> None:
    checkpoints = saved(tmp_path, trainable, [1], keep_last=2, keep_best=1)
    checkpoints.score(1, 0.9)
    for step in (2, 3, 4, 5):
        checkpoints.save(step, trainable.init(), POSITION)
        checkpoints.score(step, 0.1 * step)
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["1", "4", "5"]


def test_scores_outlive_the_process_and_a_low_loss_is_a_good_score(
    tmp_path: Path, trainable: Trainable
) -> None:
    checkpoints = saved(tmp_path, trainable, [1], keep_last=1, keep_best=1, metric="eval/loss")
    checkpoints.score(1, 0.2)
    checkpoints.close()
    again = Checkpointer(tmp_path, CheckpointConfig(keep_last=1, keep_best=1, metric="eval/loss"))
    for step in (2, 3):
        again.save(step, trainable.init(), POSITION)
        again.score(step, 0.3)
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["1", "3"]


def largest_file(step: Path) -> Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_byte(step: Path) -> None:
    file = largest_file(step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(step: Path) -> None:
    file = largest_file(step)
    file.write_bytes(file.read_bytes()[:100])


def lose_a_file(step: Path) -> None:
    largest_file(step).unlink()


def spoil_checksums(step: Path) -> None:
    (step / CHECKSUMS).write_text("{")


@pytest.mark.parametrize("damage", [flip_a_byte, cut_off, lose_a_file, spoil_checksums])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, trainable: Trainable, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, trainable, [1, 2]).close()
    damage(tmp_path / "2")  # type: ignore[operator]
    checkpoints = Checkpointer(tmp_path, CheckpointConfig())
    assert checkpoints.latest_step == 1
    assert "checkpoint 2 is damaged" in caplog.text
    assert (tmp_path / "2.damaged").is_dir()
    checkpoints.restore(1, trainable.abstract)
    checkpoints.save(2, trainable.init(), POSITION)  # its place is free again
    checkpoints.close()
    assert Checkpointer(tmp_path, CheckpointConfig()).latest_step == 2


def test_a_save_cut_short_is_no_checkpoint(tmp_path: Path, trainable: Trainable) -> None:
    saved(tmp_path, trainable, [1]).close()
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    checkpoints = Checkpointer(tmp_path, CheckpointConfig())
    assert checkpoints.latest_step == 1
