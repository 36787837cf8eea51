"""What the stub of tests/stub does not have: arrays, steps that cost, saves that take time, and losses.

Killed, stopped, damaged or moved, a run ends with the bits of `trained`, which nobody disturbed. At the end the stub
is held to the same contract.
"""

import os
import re
import resource
import shutil
import signal
import socket

import pytest

from tests.clusters.runs import BATCH, SAVE_EVERY, STEPS

pytestmark = pytest.mark.cluster
FILE_BYTES = 32 << 10


def test_what_was_killed_ends_with_the_bits_of_an_uninterrupted_run(training, trained):
    launched = training.launch()
    training.wait_until(training.checkpoint_steps, "a checkpoint")
    training.kill_workers(0)
    assert launched.wait() == 0, launched.text
    killed, last = training.attempts()
    assert (killed["verdict"], last["verdict"]) == ("failed", "completed")
    assert SAVE_EVERY <= killed["kept_step"] == last["from_step"] < STEPS
    training.assert_same_bits(trained)


@pytest.fixture(scope="module")
def failed(make_run):
    """A run that trained, was killed once and not tried again, with two whole checkpoints."""
    run = make_run(stub=False)
    launched = run.launch("--max-restarts", "0")
    checksums = run.path / f"checkpoints/{2 * SAVE_EVERY}/crc32c.json"
    run.wait_until(checksums.exists, "two checkpoints")
    run.kill_workers(0)
    return run, launched.wait(), launched.text


def test_without_restarts_the_failure_is_the_end(failed):
    run, code, text = failed
    assert code == 1
    assert len(run.attempts()) == 1
    result = run.result()
    assert (result["status"], result["failure"]["cause"]) == ("failed", "SIGKILL")
    assert re.search(
        rf"^cause +process 0 on {socket.gethostname()} failed at step \d+ \(SIGKILL\)", text, re.M
    )
    assert re.search(rf"^logs +{run.path}/logs/attempt-1$", text, re.MULTILINE)
    assert re.search(rf"^resume +launch {run.recipe} ", text, re.MULTILINE)


def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(failed, trained):
    run, _, _ = failed
    older, newest = run.checkpoint_steps()[-2:]
    files = [p for p in (run.path / f"checkpoints/{newest}").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    with largest.open("r+b") as f:
        f.seek(largest.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    launched = run.launch()
    assert launched.wait() == 0, launched.text
    said = rf"checkpoint {newest} is damaged \(.*{largest.name} does not match its checksum\)"
    assert re.search(said, run.log(2))
    assert f"resuming from step {older}" in launched.text
    assert (run.path / f"checkpoints/{newest}.damaged").is_dir()
    assert run.attempts()[-1]["from_step"] == older
    run.assert_same_bits(trained)


def test_killed_in_the_middle_of_a_save_it_restarts_from_the_committed_one(training, trained):
    run = training
    launched = run.launch()
    run.wait_until(run.checkpoint_steps, "the first save is over")

    def unfinished():
        return list((run.path / "checkpoints").glob("*.orbax-checkpoint-tmp"))

    while True:
        run.wait_until(unfinished, "another has begun")
        run.freeze(0, 1)
        if unfinished():
            break
        run.thaw(0, 1)  # it was over before the workers stood still
    kept = run.checkpoint_steps()[-1]
    run.kill_workers(0, 1)
    assert launched.wait() == 0, launched.text
    first, second = run.attempts()
    assert first["kept_step"] == second["from_step"] == kept
    assert not unfinished()
    run.assert_same_bits(trained)


def test_a_save_that_fails_on_one_process_is_found_at_once_and_tried_again(training, trained):
    run = training
    launched = run.launch()
    run.wait_for_step(1)
    # Its part of the arrays is larger; what it says and logs is smaller.
    resource.prlimit(run.workers()[1], resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    run.wait_until(lambda: (run.path / "logs/attempt-2").is_dir(), "the second attempt")
    assert launched.wait() == 0, launched.text
    failure = run.attempts()[0]["failure"]
    assert failure["process"] == 1
    assert "File too large" in failure["error"]
    run.assert_same_bits(trained)


def test_a_loss_that_is_not_finite_names_its_step_and_is_not_tried_again(training):
    run = training
    explosive = ("optimizer.learning_rate=1e30", "schedule.warmup_epochs=1", "checkpoint.every_steps=1")
    launched = run.launch(*explosive)
    assert launched.wait() == 1
    (attempt,) = run.attempts()
    told = re.search(r"at step (\d+); the last good checkpoint is step (\d+)", launched.text)
    bad, good = int(told[1]), int(told[2])
    assert good == attempt["kept_step"] == run.checkpoint_steps()[-1] < bad
    assert run.result()["status"] == "failed"


def test_a_disk_that_fills_up_ends_the_run_in_one_sentence_and_the_same_command_resumes_it(training, mount):
    run = training
    mount("size=100m")
    launched = run.launch()
    run.wait_until(run.checkpoint_steps, "a checkpoint")
    with (run.root / "filler").open("wb", buffering=0) as f:
        while shutil.disk_usage(run.root).free:
            f.write(bytes(1 << 16))
    assert launched.wait() in (1, 2)
    assert "No space left on device" in launched.text
    assert "\nTraceback" not in launched.text
    assert run.workers() == {}
    (run.root / "filler").unlink()
    kept = run.checkpoint_steps()[-1]
    again = run.launch()
    assert again.wait() == 0, again.text
    assert f"resuming from step {kept}" in again.text


@pytest.fixture(scope="module")
def preempted(make_run):
    run = make_run(stub=False)
    launched = run.launch(cluster="local-2x2")
    run.wait_for_step(3)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait() == 75
    return run, launched.text


def test_sigterm_saves_and_asks_with_75_to_be_run_again(preempted):
    run, text = preempted
    run.assert_saved(text, "preempted")


@pytest.mark.parametrize(
    ("cluster", "mesh"),
    [("local-4", {"batch": 2, "model": 2}), ("local-1", {"batch": 1, "model": 1})],
    ids=["four-processes-model-2", "one-process"],
)
def test_it_goes_on_elsewhere_from_the_saved_position(training, preempted, trained, cluster, mesh):
    run = training
    shutil.copytree(preempted[0].path, run.path)
    saved = run.checkpoint_steps()[-1]
    assert run.data_position(saved) == saved * BATCH
    launched = run.launch(f"mesh.model={mesh['model']}", cluster=cluster)
    assert launched.wait() == 0, launched.text
    assert f"changed     cluster: local-2x2, now {cluster}\n" in launched.text
    attempt = run.attempts()[-1]
    assert (attempt["from_step"], attempt["cluster"], attempt["mesh"]) == (saved, cluster, mesh)
    assert run.data_position(STEPS) == STEPS * BATCH
    metrics, same = run.result()["metrics"], trained.result()["metrics"]
    assert metrics["eval/count"] == 360
    # Sums in another order, not samples in another order.
    assert metrics["train/loss"] == pytest.approx(same["train/loss"], rel=0.02)


# The stub


def keys(words):
    """Those of objects in it, too."""
    return {name: keys(value) if isinstance(value, dict) else type(value) for name, value in words.items()}


def test_it_says_what_a_training_says(uninterrupted, trained):
    for process in (0, 1):
        assert keys(uninterrupted.report(process)) == keys(trained.report(process))
    assert keys(uninterrupted.result()) == keys(trained.result())
    (mine,), (others,) = uninterrupted.attempts(), trained.attempts()
    assert keys(mine) == keys(others)


def test_it_leaves_what_a_training_leaves(uninterrupted, trained):
    assert uninterrupted.checkpoint_steps() == trained.checkpoint_steps()
    saved = uninterrupted.checkpoint_steps()[-2:]
    assert saved == [STEPS - SAVE_EVERY, STEPS]
    assert [uninterrupted.data_position(s) for s in saved] == [trained.data_position(s) for s in saved]
    for run in (uninterrupted, trained):
        assert any(
            path.name.startswith("events.out.tfevents") for path in (run.path / "tensorboard").iterdir()
        )
        assert run.arrays(saved[0]).keys() == run.arrays(saved[1]).keys()
