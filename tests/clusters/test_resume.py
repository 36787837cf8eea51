"""Stopped, in all ways in which one stops, and resumed."""

import signal
import subprocess

import pytest

from tests.clusters.runs import LAUNCH, LONG_SECONDS

pytestmark = pytest.mark.cluster


def test_stopped_from_another_terminal_it_ends_with_the_bits_of_an_uninterrupted_run(run, uninterrupted):
    run.hold_at(3)
    launched = run.launch()
    run.wait_for_step(3)
    stop = run.command("stop")
    assert stop.wait() == 0
    assert "is stopped" in stop.text
    assert launched.wait() == 130
    run.assert_saved(launched.text, "stopped")
    run.let_go()
    again = run.launch()
    assert again.wait() == 0, again.text
    assert f"resuming from step {run.attempts()[0]['kept_step']}" in again.text
    run.assert_same_bits(uninterrupted)


def test_ctrl_c_in_a_terminal_saves_and_the_resumed_run_has_the_same_bits(run, uninterrupted):
    run.hold_at(3)
    launched = run.launch_in_terminal()
    run.wait_for_step(3)
    launched.press(b"\x03")
    assert launched.wait() == 130, launched.text
    assert "\r\x1b[2K" in launched.text  # one line, redrawn
    run.assert_saved(launched.text.replace("\r\n", "\n"), "stopped")
    run.let_go()
    assert run.launch().wait() == 0
    run.assert_same_bits(uninterrupted)


def test_ctrl_c_twice_does_not_wait_for_the_save(run):
    run.hold_at(3)
    launched = run.launch_in_terminal()
    run.wait_for_step(3)
    launched.press(b"\x03")
    launched.press(b"\x03")
    assert launched.wait() == 130, launched.text
    assert run.workers() == {}
    assert run.attempts()[-1]["verdict"] == "stopped"


def test_ctrl_c_before_the_first_step_ends_at_once(training):
    run = training
    launched = run.launch_in_terminal()
    run.wait_until(lambda: run.report().get("phase"), "the first word of process 0")
    launched.press(b"\x03")
    assert launched.wait() == 130, launched.text
    assert run.workers() == {}
    assert run.checkpoint_steps() == []
    assert run.attempts()[-1]["verdict"] == "stopped"


def test_ctrl_c_that_also_ends_the_reader_of_a_pipe_still_saves(run):
    """`launch … | tee log`: the terminal's Ctrl-C reaches tee too, and then nobody reads what launch prints."""
    launched = subprocess.Popen(
        [*LAUNCH, *run.arguments("train.steps=100000")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=run.environment,
    )  # fmt: skip
    try:
        while b"step " not in launched.stdout.readline():
            assert launched.poll() is None
        launched.stdout.close()
        launched.send_signal(signal.SIGINT)
        assert launched.wait(LONG_SECONDS) == 130
        assert run.attempts()[-1]["steps_lost"] == 0
    finally:
        launched.kill()
        launched.wait()
