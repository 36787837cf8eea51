"""Stopped and resumed: with the same bits where the machines are the same, from the same position elsewhere.

`run` is the stub's, `training` trains.
"""

import re
import shutil
import signal
import subprocess

import pytest

from tests.clusters.runs import BATCH, LAUNCH, LONG_SECONDS, STEPS, TRAINED

pytestmark = pytest.mark.cluster


def assert_saved_and_says_how_to_resume(run, text, verdict):
    attempt, result = run.attempts()[-1], run.result()
    assert (attempt["verdict"], attempt["failure"], attempt["steps_lost"]) == (verdict, None, 0)
    assert result["status"] == verdict
    assert 0 < result["step"] == attempt["kept_step"] == run.checkpoint_steps()[-1] < STEPS
    assert re.search(rf"^resume +launch {run.recipe} --root {run.root} ", text, re.MULTILINE)
    assert run.workers() == {}


def test_stopped_from_another_terminal_it_ends_with_the_bits_of_an_uninterrupted_run(run, uninterrupted):
    run.hold_at(3)
    launched = run.launch()
    run.wait_for_step(3)
    stop = run.command("stop")
    assert stop.wait() == 0
    assert "is stopped" in stop.text
    assert launched.wait() == 130
    assert_saved_and_says_how_to_resume(run, launched.text, "stopped")
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
    assert launched.wait() == 130
    assert "\r\x1b[2K" in launched.text  # one line, redrawn
    assert_saved_and_says_how_to_resume(run, launched.text.replace("\r\n", "\n"), "stopped")
    run.let_go()
    assert run.launch().wait() == 0
    run.assert_same_bits(uninterrupted)


def test_ctrl_c_twice_does_not_wait_for_the_save(run):
    run.hold_at(3)
    launched = run.launch_in_terminal()
    run.wait_for_step(3)
    launched.press(b"\x03")
    launched.press(b"\x03")
    assert launched.wait() == 130
    assert run.workers() == {}
    assert run.attempts()[-1]["verdict"] == "stopped"


def test_ctrl_c_before_the_first_step_ends_at_once(training):
    run = training
    launched = run.launch_in_terminal()
    run.wait_until(lambda: run.report().get("phase"), "the first word of process 0")
    launched.press(b"\x03")
    assert launched.wait() == 130
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


@pytest.fixture(scope="module")
def preempted(make_run):
    run = make_run(stub=False)
    launched = run.launch(cluster="local-2x2")
    run.wait_for_step(3)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait() == 75
    return run, launched.text


@TRAINED
def test_sigterm_saves_and_asks_with_75_to_be_run_again(preempted):
    run, text = preempted
    assert_saved_and_says_how_to_resume(run, text, "preempted")


@TRAINED
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
