"""What clusters do to a run: workers, launchers, saves, disks and losses that fail, each for real.

`run` is the stub's, `training` trains.
"""

import os
import re
import resource
import shutil
import socket
import time
from datetime import UTC, datetime

import pytest

from tests.clusters.runs import SAVE_EVERY, STEPS, TRAINED, wait_until

pytestmark = pytest.mark.cluster
FILE_BYTES = 16 << 10


def test_a_killed_worker_takes_the_rest_along_and_the_run_goes_on_from_its_checkpoint(run, uninterrupted):
    run.hold_at(SAVE_EVERY + 1)
    launched = run.launch()
    for attempt, victim in ((1, 1), (2, 0)):
        run.wait_for_step(attempt * SAVE_EVERY + 1, attempt=attempt)
        run.hold_at((attempt + 1) * SAVE_EVERY + 1)
        gang = run.workers()
        run.freeze(1 - victim)
        run.kill_workers(victim)
        run.wait_until(lambda gang=gang: run.are_gone(gang), "the gang is gone")
    run.let_go()
    assert launched.wait() == 0, launched.text
    first, second, third = run.attempts()
    for number, (attempt, victim) in enumerate(((first, 1), (second, 0)), start=1):
        failure = attempt["failure"]
        assert (attempt["verdict"], failure["process"], failure["cause"]) == ("failed", victim, "SIGKILL")
        assert failure["host"] == socket.gethostname()
        assert attempt["steps_lost"] == attempt["reached_step"] - attempt["kept_step"]
        named = f"process {victim} on {failure['host']} failed at step {failure['step']} (SIGKILL)"
        assert named in launched.text
        restart = f"attempt {number + 1} from step {attempt['kept_step']} (restart {number} of 3)"
        assert restart in launched.text
    assert (third["verdict"], third["failure"]) == ("completed", None)
    assert first["kept_step"] == second["from_step"] == SAVE_EVERY
    assert second["kept_step"] == third["from_step"] == 2 * SAVE_EVERY
    run.assert_same_bits(uninterrupted)


@TRAINED
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


@TRAINED
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


@TRAINED
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


def test_a_killed_launcher_leaves_no_worker_and_the_next_one_accounts_for_it(run, uninterrupted):
    run.hold_at(SAVE_EVERY + 2)
    launched = run.launch()
    run.wait_for_step(SAVE_EVERY + 2)
    launched.process.kill()
    launched.wait()
    wait_until(lambda: not run.workers(), "the workers end with their launcher")
    last_word = run.report()["time"]
    wait_until(lambda: time.time() > last_word + 2, "some time that belongs to no attempt")
    run.let_go()
    again = run.launch()
    assert again.wait() == 0, again.text
    lost, completed = run.attempts()
    assert (lost["verdict"], lost["kept_step"], lost["steps_lost"]) == ("launcher lost", SAVE_EVERY, 2)
    assert datetime.fromisoformat(lost["ended"]) == datetime.fromtimestamp(int(last_word), UTC)
    assert lost.keys() == completed.keys()
    assert (completed["attempt"], completed["from_step"]) == (2, SAVE_EVERY)
    run.assert_same_bits(uninterrupted)


@TRAINED
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


@TRAINED
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


def test_an_exception_in_one_worker_is_shown_with_its_last_lines_and_ends_all(run):
    a_file = run.folder / "a-file"
    a_file.touch()
    launched = run.launch(f"log.tensorboard={a_file}", "--max-restarts", "1")  # process 0 alone writes there
    assert launched.wait() == 1
    assert run.workers() == {}
    assert [(a["failure"]["process"], a["failure"]["cause"]) for a in run.attempts()] == [
        (0, "exit code 1")
    ] * 2
    assert re.search(r"^cause +process 0 .*FileExistsError.*a-file", launched.text, re.MULTILINE)
    assert re.search(r"^ +\|   File .*loop.py", launched.text, re.MULTILINE)
    assert "\nTraceback" not in launched.text


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


def test_a_read_only_disk_is_the_users_to_mend(training, mount):
    run = training
    mount("ro")
    launched = run.launch()
    assert launched.wait() == 2
    error = launched.text.splitlines()[-1]
    assert error.startswith(f"error: run directory {run.path} cannot be written: Read-only file system")
