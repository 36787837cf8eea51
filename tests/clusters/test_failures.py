"""What clusters do to a run, whatever it trains: workers and launchers that are killed or fail, a disk to read only."""

import re
import socket
import time
from datetime import UTC, datetime

import pytest

from tests.clusters.runs import SAVE_EVERY, wait_until

pytestmark = pytest.mark.cluster


def test_a_killed_worker_takes_the_rest_along_and_the_run_goes_on_from_its_checkpoint(run, uninterrupted):
    run.hold_at(SAVE_EVERY + 1)
    launched = run.launch()
    for attempt, victim in ((1, 1), (2, 0)):
        run.wait_for_step(attempt * SAVE_EVERY + 1, attempt=attempt)
        gang = run.workers()
        run.freeze(1 - victim)
        run.kill_workers(victim)
        run.hold_at((attempt + 1) * SAVE_EVERY + 1)  # of this gang nobody goes on any more
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


def test_a_read_only_disk_is_the_users_to_mend(training, mount):
    run = training
    mount("ro")
    launched = run.launch()
    assert launched.wait() == 2
    error = launched.text.splitlines()[-1]
    assert error.startswith(f"error: run directory {run.path} cannot be written: Read-only file system")


def test_a_frozen_worker_is_the_cause_not_the_one_that_jax_aborts_because_of_it(training):
    run = training
    launched = run.launch("train.steps=100000", "--max-restarts", "0")
    run.wait_for_step(1)
    run.freeze(1)
    assert launched.wait() == 1
    failure = run.result()["failure"]
    assert (failure["process"], failure["cause"]) == (1, "hung")
    assert "jax lost contact with it and ended the others" in launched.text
    assert run.workers() == {}
