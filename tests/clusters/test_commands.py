"""The other commands, typed while a run trains; and a second `launch` that must not disturb it."""

import os
import re
import signal

import pytest

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def running(make_run):
    run = make_run()
    launched = run.launch("train.steps=100000")
    run.wait_for_step(10)
    yield run, launched
    run.end()


def text_of(command, code=0):
    assert command.wait() == code, command.text
    return command.text


def test_status_says_where_it_stands(running):
    text = text_of(running[0].command("status"))
    assert "tiny (running)" in text
    assert re.search(r"^progress +step \d+/100000 .*images/s", text, re.MULTILINE)
    assert re.search(r"^checkpoints +(\d+, )*\d+$", text, re.MULTILINE)


def test_list_shows_it_running(running):
    assert re.search(r"^tiny +running +step \d+/100000 +local-2$", text_of(running[0].command("list")), re.M)


def test_logs_name_the_host_of_each_line_or_show_one_host(running):
    run, _ = running
    both = text_of(run.command("logs")).splitlines()
    assert {line.split("]")[0] for line in both} == {"[host 0", "[host 1"}
    only = text_of(run.command("logs", "--host", "1")).splitlines()
    assert only == [line.removeprefix("[host 1] ") for line in both if line.startswith("[host 1]")]
    assert "the run has hosts 0 to 1" in text_of(run.command("logs", "--host", "2"), code=2)


@pytest.mark.parametrize("cluster", ["local-2", "local-4"])
def test_a_second_launch_is_refused_and_disturbs_nothing(running, cluster):
    run, launched = running
    plan, workers, step = (run.path / "plan.json").read_bytes(), run.workers(), run.report()["step"]
    text = text_of(run.launch("train.steps=100000", cluster=cluster), code=2)
    assert "error: run tiny is running already" in text
    assert (run.path / "plan.json").read_bytes() == plan
    run.wait_until(lambda: run.report()["step"] > step + 3, "it trains on", watching=launched)
    assert run.workers() == workers


def test_following_logs_ends_with_the_run(running):
    run, launched = running
    follow = run.command("logs", "-f")
    run.wait_until(lambda: "[host 1]" in follow.text, "the first lines")
    os.kill(launched.process.pid, signal.SIGINT)
    assert launched.wait() == 130
    assert follow.wait() == 0


def test_stopping_what_has_ended_says_so(running):
    assert text_of(running[0].command("stop")) == "run tiny is not running (stopped)\n"


def test_a_directory_of_another_config_is_refused_with_what_differs(running):
    run, _ = running
    text = text_of(run.launch("train.steps=100000", "optimizer.learning_rate=0.5"), code=2)
    assert "optimizer.learning_rate: 0.02, now 0.5" in text
    assert "--name" in text


def test_a_directory_that_holds_no_run_is_refused(run):
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").touch()
    assert "is not empty and contains no run" in text_of(run.launch(), code=2)
    assert [p.name for p in run.path.iterdir()] == ["thesis.tex"]
