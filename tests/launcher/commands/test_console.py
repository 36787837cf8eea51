"""What is printed of a run that has ended, and of figures on the way."""

import sys
from typing import Any

import pytest

from launcher.commands import console
from launcher.rundir import RunDirectory


@pytest.fixture
def ended(planned, tmp_path, monkeypatch, capsys):
    """What is printed of a run whose result has these fields."""
    plan = planned()
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    run.write_plan(plan)
    monkeypatch.setattr(sys, "argv", ["/bin/launch", "a recipe.yaml", "--root", "runs"])

    def ended(*, again: bool = True, **fields: Any) -> str:
        result = {
            "status": "stopped", "step": 9, "epoch": 0.4, "metrics": {}, "attempts": 1, "wall_seconds": 61, "failure": None,
        }  # fmt: skip
        console.print_result(plan, run, result | fields, again=again)
        return capsys.readouterr().out

    return ended


FAILURE = {
    "process": 1,
    "host": "n2",
    "cause": "SIGKILL",
    "error": "gone",
    "step": 9,
    "lines": ["one", "two"],
}


def test_stopped_run_is_resumed_by_the_command_that_was_typed(ended):
    text = ended()
    assert "\nstopped     step 9 (epoch 0.4), 1 attempt, 1:01\n" in text
    assert text.endswith("\nresume      launch 'a recipe.yaml' --root runs\n")


def test_completed_run_and_one_of_another_command_are_not_resumed(ended):
    assert "resume" not in ended(status="completed", attempts=2)
    assert "resume" not in ended(again=False)


@pytest.mark.parametrize(("retryable", "words"), [(True, "launch "), (False, "fix the cause, then launch ")])
def test_failed_run_shows_its_cause_and_last_lines(ended, retryable, words):
    text = ended(status="failed", attempts=2, failure=FAILURE | {"retryable": retryable})
    assert "2 attempts" in text
    assert "\ncause       process 1 on n2 failed at step 9 (SIGKILL): gone\n" in text
    assert "\n            | one\n            | two\n" in text
    assert f"\nresume      {words}" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_durations_have_hours_only_where_there_are_some(seconds, text):
    assert console.duration(seconds) == text
