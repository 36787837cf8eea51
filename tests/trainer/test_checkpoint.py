"""A checkpoint is the state at its step, comes back on any mesh, and is trusted only while it is whole."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from configs import checkpoints as checkpoint_files
from configs.errors import UserError
from configs.schema import CheckpointConfig
from tests.gcs import BUCKET, Fault, Server
from tests.trainer.small import Trainable, equal_states, shared
from trainer.checkpoint import CHECKSUMS, Checkpointer, DataPosition

POSITION = DataPosition(position=96, seed=0, digest="d")


@pytest.fixture(params=["folder", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> epath.Path:
    """Where checkpoints go."""
    if request.param == "folder":
        return epath.Path(tmp_path)
    request.getfixturevalue("gcs")
    return epath.Path(f"gs://{BUCKET}/runs/tiny")


def opened(place: epath.Path, **settings: object) -> Checkpointer:
    config = CheckpointConfig.model_validate({"directory": str(place), **settings})
    return Checkpointer(Path("not-used"), config)


def folders(place: epath.Path) -> list[str]:
    return sorted(p.name for p in place.iterdir() if p.is_dir())


@pytest.fixture(scope="module")
def trainable() -> Trainable:
    return shared("train.ema_decay=0.9")


def saved(place: epath.Path, trainable: Trainable, steps: list[int], **settings: object) -> Checkpointer:
    """A checkpointer that has saved a fresh state under each of `steps`."""
    checkpoints = opened(place, **settings)
    for step in steps:
        checkpoints.save(step, trainable.fresh(), POSITION)
    checkpoints.wait()
    return checkpoints


def test_a_save_is_the_state_at_its_step_though_training_goes_on(
    tmp_path: Path, trainable: Trainable
) -> None:
    t, step = trainable, trainable.step
    checkpoints = Checkpointer(tmp_path, CheckpointConfig())
    leaves = jax.tree.leaves(t.fresh())
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
    saved(epath.Path(tmp_path), trainable, [1]).close()
    other = shared("train.ema_decay=0.9", f"mesh.batch={batch}", f"mesh.model={model}")
    restored, _ = Checkpointer(tmp_path, CheckpointConfig()).restore(1, other.abstract)
    assert equal_states(restored, trainable.fresh())
    wanted = [leaf.sharding for leaf in jax.tree.leaves(other.abstract)]
    assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == wanted


def test_the_last_and_the_best_are_kept(place: epath.Path, trainable: Trainable) -> None:
    checkpoints = saved(place, trainable, [1], keep_last=2, keep_best=1)
    checkpoints.record_score(1, 0.9)
    for step in (2, 3, 4, 5):
        checkpoints.save(step, trainable.fresh(), POSITION)
        checkpoints.record_score(step, 0.1 * step)
    checkpoints.close()
    assert folders(place) == ["1", "4", "5"]
    assert checkpoint_files.steps(str(place)) == [1, 4, 5]


def test_scores_outlive_the_process_and_a_low_loss_is_a_good_score(
    place: epath.Path, trainable: Trainable
) -> None:
    checkpoints = saved(place, trainable, [1], keep_last=1, keep_best=1, metric="eval/loss")
    checkpoints.record_score(1, 0.2)
    checkpoints.close()
    again = opened(place, keep_last=1, keep_best=1, metric="eval/loss")
    for step in (2, 3):
        again.save(step, trainable.fresh(), POSITION)
        again.record_score(step, 0.3)
    again.close()
    assert folders(place) == ["1", "3"]


def files(folder: epath.Path) -> list[epath.Path]:
    return [file for p in folder.iterdir() for file in (files(p) if p.is_dir() else [p])]


def largest_file(step: epath.Path) -> epath.Path:
    return max(files(step), key=lambda p: p.stat().length)


def flip_a_byte(step: epath.Path) -> None:
    file = largest_file(step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def cut_off(step: epath.Path) -> None:
    file = largest_file(step)
    file.write_bytes(file.read_bytes()[:100])


def lose_a_file(step: epath.Path) -> None:
    largest_file(step).unlink()


def spoil_checksums(step: epath.Path) -> None:
    (step / CHECKSUMS).write_text("{")


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        ("folder", flip_a_byte),
        ("folder", cut_off),
        ("folder", lose_a_file),
        ("folder", spoil_checksums),
        ("gs", flip_a_byte),
        ("gs", lose_a_file),
    ],
    indirect=["place"],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    place: epath.Path,
    trainable: Trainable,
    damage: Callable[[epath.Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(place, trainable, [1, 2]).close()
    damage(place / "2")
    checkpoints = opened(place)
    assert checkpoints.latest_step == 1
    assert "checkpoint 2 is damaged" in caplog.text
    assert folders(place) == ["1", "2.damaged"]
    checkpoints.restore(1, trainable.abstract)
    checkpoints.save(2, trainable.fresh(), POSITION)  # its place is free again
    checkpoints.close()
    assert opened(place).latest_step == 2
    assert folders(place) == ["1", "2", "2.damaged"]


def test_a_save_cut_short_is_no_checkpoint_and_is_cleared_with_nothing_else(
    place: epath.Path, trainable: Trainable
) -> None:
    saved(place, trainable, [1]).close()
    unfinished = "2" if str(place).startswith("gs://") else "2.orbax-checkpoint-tmp"
    for folder in (unfinished, "imagenet", "0.damaged"):
        (place / folder / "state").mkdir(parents=True)
        (place / folder / "state" / "part").write_text("bytes")
    assert checkpoint_files.steps(str(place)) == [1]
    checkpoints = opened(place)
    assert checkpoints.latest_step == 1
    assert folders(place) == ["0.damaged", "1", "imagenet"]
    checkpoints.save(2, trainable.fresh(), POSITION)
    checkpoints.close()
    assert checkpoint_files.steps(str(place)) == [1, 2]


def test_training_goes_on_while_a_bucket_takes_its_time(gcs: Server, trainable: Trainable) -> None:
    place = f"gs://{BUCKET}/slow"
    checkpoints = saved(epath.Path(place), trainable, [1])
    state = trainable.fresh()
    gcs.faults = [Fault("slow", "slow/2/state/*", operation="upload", seconds=60)]
    begun = time.monotonic()
    checkpoints.save(2, state, POSITION)
    checkpoints.poll()
    assert time.monotonic() - begun < 30, "the save waited for its upload"
    assert checkpoint_files.steps(place) == [1]
    gcs.release()
    checkpoints.close()
    assert checkpoint_files.steps(place) == [1, 2]


# A place that cannot be used


def test_a_place_belongs_to_one_run(place: epath.Path) -> None:
    checkpoint_files.claim(str(place), {"id": "a", "run": "r50"})
    checkpoint_files.claim(str(place), {"id": "a", "run": "r50"})
    with pytest.raises(UserError, match=r'belongs to another run \(.*"run": "r50".* delete .*run\.json'):
        checkpoint_files.claim(str(place), {"id": "b", "run": "r18"})


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        ("gs://absent-bucket/x", None, "there is no bucket absent-bucket; make it with"),
        (f"gs://{BUCKET}/x", 403, r"have no permission \(HTTP 403\)"),
        (f"gs://{BUCKET}/x", 401, "there are no Google credentials; log in with"),  # it comes anonymously
    ],
)
def test_what_is_wrong_with_a_bucket_is_one_line(
    gcs: Server, url: str, status: int | None, words: str
) -> None:
    if status:
        gcs.faults = [Fault("status", operation="*", status=status)]
    for ask in (lambda: checkpoint_files.steps(url), lambda: checkpoint_files.claim(url, {"id": "a"})):
        with pytest.raises(UserError, match=words) as refused:
            ask()
        assert str(refused.value).startswith(f"checkpoint.directory = {url}")
        assert "\n" not in str(refused.value)


def test_permission_that_only_a_later_save_needs_is_asked_for_at_once(gcs: Server) -> None:
    gcs.denied = {"storage.buckets.get", "storage.objects.delete"}
    with pytest.raises(
        UserError, match=r"lack storage.buckets.get, storage.objects.delete; give them the roles"
    ):
        opened(epath.Path(f"gs://{BUCKET}/x"))
    assert gcs.contents() == {}


def test_without_credentials_the_user_is_told_how_to_get_some(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "GCE_METADATA_ROOT": "127.0.0.1:9",
        "NO_GCE_CHECK": "true",
        "HOME": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    with pytest.raises(UserError, match="no Google credentials; log in with `gcloud auth"):
        checkpoint_files.steps("gs://some-bucket/x")
