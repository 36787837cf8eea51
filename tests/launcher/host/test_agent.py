"""An agent uploads the report and log of its worker, outlives its starter, and does not leak secrets."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from launcher.host import agent
from launcher.host.agent import Agent, Mirror, WorkerSpec, agent_pid, end_previous
from launcher.host.process import host_program
from launcher.machine import metadata
from launcher.machine.network import reserve_port
from launcher.rundir import RunDirectory, storage
from tests.gcs import Fault

COMMAND = host_program("agent")
STUB = Path(__file__).parents[2] / "stub"
PLACE = "gs://bucket/runs/quickstart"
SECRET = "of-nobody-else's-business"


@pytest.fixture
def order(planned, gcs, monkeypatch):
    """WorkerSpec of process 0 of 2. The worker, a stub, waits for the other process; with `refused`, it ends at once."""
    monkeypatch.setenv("PYTHONPATH", str(STUB))

    def order(attempt=1, *, refused=False, place=PLACE, **changes):
        provenance = {"code": "0" * 64} if refused else {}
        plan = dataclasses.replace(planned(), run_directory=place, provenance=provenance)
        with reserve_port("127.0.0.1") as held:
            address = f"127.0.0.1:{held.getsockname()[1]}"
        return WorkerSpec(
            dataclasses.asdict(plan), attempt, 0, changes.pop("coordinator", address), **changes
        )

    return order


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "podlaunch" / "a b"
    folder.mkdir(parents=True)
    yield folder
    end_previous(folder)


def start(folder, order):
    order = json.dumps(dataclasses.asdict(order)).encode()
    return subprocess.run([*COMMAND, "start", folder], input=order, capture_output=True, timeout=30)


@contextlib.contextmanager
def watched(folder, attempt=1):
    """The agent's messages, and a pipe for commands to it."""
    watch = subprocess.Popen(
        [*COMMAND, "watch", folder, str(attempt)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with watch:
        yield map(json.loads, watch.stdout), watch.stdin
        assert watch.poll() in (None, 0)


def exit_of(words):
    return next(w for w in words if "exit" in w)


def worker_of(pid):
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def is_alive(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The worker's report and log


def test_report_and_log_are_complete_in_the_bucket_after_the_worker_ends(order, tmp_path):
    worker = Agent(tmp_path, order(refused=True))
    worker.start()
    assert worker.wait() == 2
    remote = RunDirectory(PLACE)
    assert "differs from the machine that planned this run" in remote.hosts.report(0)["failure"]["error"]
    log = remote.hosts.read_log(1, 0)
    assert log.startswith(b"error: ")
    assert log == RunDirectory(tmp_path / "run").hosts.read_log(1, 0)


def test_log_and_report_of_an_earlier_attempt_are_discarded(order, tmp_path):
    local = RunDirectory(tmp_path / "run")
    local.write_plan(agent.Plan.from_json(json.dumps(order().plan)))
    local.hosts.write_report(0, {"phase": "failed", "failure": {"error": "of long ago"}})
    local.hosts.write_log(1, 0, "of long ago")
    worker = Agent(tmp_path, order())
    worker.start()
    try:
        assert local.hosts.report(0).get("phase") != "failed"
        assert b"of long ago" not in local.hosts.read_log(1, 0)
    finally:
        worker.kill()
        assert worker.wait() == -signal.SIGKILL
    assert b"of long ago" not in RunDirectory(PLACE).hosts.read_log(1, 0)


def test_worker_is_asked_to_save_when_its_vm_is_to_be_taken_away(order, tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "NOTICE_SECONDS", 0.02)
    notices = iter([None, None, "this VM is being preempted"])
    monkeypatch.setattr(metadata, "eviction_notice", lambda: next(notices))
    worker = Agent(tmp_path, order())
    worker.start()
    assert worker.wait() == -signal.SIGTERM  # it had nothing to save yet
    assert worker.notice == "this VM is being preempted"


def test_bucket_without_credentials_is_a_user_error(order, tmp_path, monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    with pytest.raises(UserError, match=rf"^run directory {PLACE}: there are no Google credentials"):
        Agent(tmp_path, order())


# The mirror's pace


@pytest.fixture
def mirrored(planned, tmp_path, gcs):
    """A mirror of process 1 or another, its local run directory, and a round of it that gives what was sent."""

    def mirrored(process=1):
        local = RunDirectory(tmp_path / "run")
        local.write_plan(planned())
        mirror = Mirror(local, RunDirectory(PLACE), 1, process)

        def sent(*, final=False):
            gcs.forget()
            mirror._send(final=final)
            return [
                a.object.removeprefix("runs/quickstart/")
                for a in gcs.log
                if (a.operation, a.status) == ("upload", 200)
            ]

        return local, sent

    return mirrored


def test_nothing_is_uploaded_for_a_silent_worker(mirrored):
    _, sent = mirrored()
    assert sent() == []
    assert sent(final=True) == []


def test_every_report_of_process_0_is_uploaded_but_of_others_only_new_phases(mirrored):
    for process, expected in ((0, ["hosts/0.json"]), (1, [])):
        local, sent = mirrored(process)
        local.hosts.write_report(process, {"phase": "training", "step": 1})
        assert sent() == [f"hosts/{process}.json"]
        assert sent() == []
        local.hosts.write_report(process, {"phase": "training", "step": 2})
        assert sent() == expected
        local.hosts.write_report(process, {"phase": "saving", "step": 2})
        assert sent() == [f"hosts/{process}.json"]


def test_reports_of_other_processes_are_uploaded_at_intervals_and_at_the_end(mirrored, monkeypatch):
    local, sent = mirrored()
    local.hosts.write_report(1, {"phase": "training", "step": 1})
    assert sent() == ["hosts/1.json"]
    local.hosts.write_report(1, {"phase": "training", "step": 2})
    assert sent(final=True) == ["hosts/1.json"]
    local.hosts.write_report(1, {"phase": "training", "step": 3})
    monkeypatch.setattr(agent, "REPORT_SECONDS", 0.0)
    assert sent() == ["hosts/1.json"]


def test_log_is_sent_when_it_has_grown_and_a_long_one_less_often(mirrored, monkeypatch):
    local, sent = mirrored()
    local.hosts.write_log(1, 1, "one\n")
    assert sent() == ["logs/attempt-1/host-1.log"]
    time.sleep(0.001)
    assert sent() == []  # nothing new
    local.hosts.write_log(1, 1, "one\ntwö\n")
    assert sent() == ["logs/attempt-1/host-1.log"]
    assert RunDirectory(PLACE).hosts.read_log(1, 1) == "one\ntwö\n".encode()
    monkeypatch.setattr(agent, "LOG_BYTES_PER_SECOND", 0.001)
    local.hosts.write_log(1, 1, "one\ntwö\nthree\n")
    assert sent() == []
    assert sent(final=True) == ["logs/attempt-1/host-1.log"]
    assert RunDirectory(PLACE).hosts.read_log(1, 1).endswith(b"three\n")


def test_failed_upload_is_repeated_in_the_next_round(mirrored, gcs, monkeypatch):
    monkeypatch.setattr(storage, "WRITE_RETRY_SECONDS", 0.2)
    local, sent = mirrored()
    local.hosts.write_report(1, {"phase": "training"})
    local.hosts.write_log(1, 1, "one\n")
    for status in (503, 403):
        gcs.faults = [Fault("status", operation="upload", status=status)]
        assert sent() == []
    gcs.faults = []
    assert sent() == ["hosts/1.json", "logs/attempt-1/host-1.log"]


# An agent on its own


def test_exit_code_is_available_after_the_agent_has_ended(order, folder):
    assert start(folder, order(refused=True)).returncode == 0
    until(lambda: agent_pid(folder) is None)
    with watched(folder) as (words, _):
        ended = exit_of(words)
    assert (ended["process"], ended["host"], ended["exit"]) == (0, socket.gethostname(), 2)
    assert b"planned this run" in RunDirectory(PLACE).hosts.read_log(1, 0)


def test_agent_and_worker_outlive_their_starter_and_watcher_and_obey_stop(order, folder):
    assert start(folder, order()).returncode == 0  # its standard input is closed
    pid = agent_pid(folder)
    with watched(folder) as (words, _):
        assert next(words)["pid"] == pid
        assert next(words) == {}  # it lives
    assert os.getsid(pid) == pid
    worker = worker_of(pid)
    assert is_alive(worker)
    with watched(folder) as (words, tell):
        tell.write(b"stop\n")
        tell.flush()
        assert exit_of(words)["exit"] == -signal.SIGTERM
    until(lambda: not is_alive(pid))
    assert not is_alive(worker)


def test_secrets_reach_only_the_environment_of_the_worker(order, folder, gcs):
    assert SECRET not in repr(order(secrets={"TOKEN": SECRET}))
    assert start(folder, order(secrets={"TOKEN": SECRET}, environment={"PLAIN": "seen"})).returncode == 0
    pid = agent_pid(folder)
    worker = worker_of(pid)
    environment = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    assert f"TOKEN={SECRET}".encode() in environment
    assert b"PLAIN=seen" in environment
    with watched(folder) as (words, tell):
        tell.write(b"kill\n")
        tell.flush()
        command_lines = [Path(f"/proc/{p}/cmdline").read_bytes() for p in (pid, worker)]
        assert exit_of(words)["exit"] == -signal.SIGKILL
    kept = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert len(kept) > 3  # plan, journal, logs
    for text in (*kept, *command_lines, *gcs.contents().values()):
        assert SECRET.encode() not in text


def test_killed_agent_is_lost_and_takes_its_worker_along(order, folder):
    assert start(folder, order()).returncode == 0
    pid = agent_pid(folder)
    worker = worker_of(pid)
    with watched(folder) as (words, _):
        next(words)
        os.kill(pid, signal.SIGKILL)
        lost = exit_of(words)
    assert (lost["exit"], lost["cause"], lost["error"]) == (1, "lost", "its agent was killed")
    until(lambda: not is_alive(worker))


def test_next_attempt_ends_the_agent_before_it(order, folder):
    assert start(folder, order()).returncode == 0
    before = agent_pid(folder)
    worker = worker_of(before)
    assert start(folder, order(2, refused=True)).returncode == 0
    assert not is_alive(before)
    assert not is_alive(worker)
    with watched(folder, 2) as (words, _):
        assert exit_of(words)["exit"] == 2
    last = (folder / "attempt-1.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["exit"] == -signal.SIGKILL


def test_agent_that_hangs_is_ended_all_the_same(order, folder, monkeypatch):
    monkeypatch.setattr(agent, "END_SECONDS", 0.2)
    assert start(folder, order()).returncode == 0
    pid = agent_pid(folder)
    worker = worker_of(pid)
    os.kill(pid, signal.SIGSTOP)
    end_previous(folder)
    until(lambda: not is_alive(pid) and not is_alive(worker))


def test_reused_process_id_is_not_taken_for_the_agent(folder):
    (folder / "agent.pid").write_text(str(os.getpid()))
    assert agent_pid(folder) is None
    end_previous(folder)


def test_unknown_attempt_is_reported_lost(folder):
    with watched(folder, 7) as (words, _):
        (lost,) = words  # to the end of its output
    assert (lost["cause"], lost["error"]) == ("lost", "it has no record of attempt 7")


def test_port_in_use_is_reported_as_not_started(order, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert start(folder, order(coordinator=address)).returncode == 0
    with watched(folder) as (words, _):
        ended = exit_of(words)
    assert (ended["exit"], ended["cause"]) == (1, "not started")
    assert "in use" in ended["error"]


def test_agent_that_cannot_start_says_why_in_one_line(folder):
    done = start(folder, WorkerSpec({"name": "of another podlaunch"}, 1, 0, "127.0.0.1:1"))
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("its agent did not start: TypeError: ")
