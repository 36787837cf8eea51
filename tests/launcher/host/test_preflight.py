"""The checks of a host before training: chips, data, bucket, ports, and the fingerprint of its code."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launcher.host import preflight
from launcher.host.preflight import (
    KNOWN_PORTS,
    PreflightRequest,
    _chip_problems,
    _path_problems,
    _reaches,
    listen,
    run_checks,
)
from launcher.host.process import host_program
from launcher.machine.devices import processes_using
from launcher.machine.network import reserve_port
from launcher.machine.provenance import fingerprint
from launcher.rundir import storage
from tests.gcs import Fault

COMMAND = host_program("preflight")


@pytest.fixture
def plan(planned):
    return planned(cluster="tpu-v4-32", root="gs://bucket/runs")


@pytest.fixture
def rehearsal(plan):
    """The plan on CPU devices in the place of chips."""
    return dataclasses.replace(plan, platform="cpu")


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """A /dev with the chips of one VM, and libtpu's lock file."""
    dev = tmp_path / "dev"
    (dev / "vfio").mkdir(parents=True)
    for name in ("accel0", "accel1", "vfio/2", "vfio/3", "vfio/vfio"):
        (dev / name).touch()
    monkeypatch.setattr(preflight, "LOCK_FILE", tmp_path / "libtpu_lockfile")
    preflight.LOCK_FILE.touch()
    return dev


@contextlib.contextmanager
def holding(*files):
    """A process that has files open."""
    code = "import sys; files = [open(name) for name in sys.argv[1:]]; print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        holder.stdout.readline()
        yield holder.pid


def request_for(folder, plan, process, address="127.0.0.1", ports=()):
    return PreflightRequest(dataclasses.asdict(plan), process, address, list(ports))


# Chips


def test_free_chips_are_no_problem_and_a_stale_lock_is_removed(plan, dev):
    assert _chip_problems(plan, dev) == []
    assert not preflight.LOCK_FILE.exists()


def test_missing_chips_are_counted(plan, dev):
    (dev / "accel1").unlink()
    (problem,) = _chip_problems(plan, dev)
    assert problem.startswith("3 TPU chips are visible, the plan has 4: delete this TPU")


def test_process_that_uses_the_chips_is_named_and_its_lock_kept(plan, dev):
    with holding(dev / "accel0") as pid:
        (problem,) = _chip_problems(plan, dev)
        assert f"in use by process {pid} ({sys.executable}" in problem
    assert preflight.LOCK_FILE.exists()
    assert _chip_problems(plan, dev) == []


def test_lock_that_another_user_has_left_is_told(plan, dev, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root may make a file of another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o1777)  # as /tmp itself
        monkeypatch.setattr(preflight, "LOCK_FILE", Path(folder) / "libtpu_lockfile")
        preflight.LOCK_FILE.touch(mode=0o644)
        os.seteuid(65534)
        try:
            (problem,) = preflight._lock_problems()
        finally:
            os.seteuid(0)
        assert (
            f"is left from a process of user root, and TPUs cannot be used beside it: `sudo rm {folder}/"
            in problem
        )


def test_rehearsal_needs_no_chips(rehearsal, tmp_path):
    assert _chip_problems(rehearsal, tmp_path) == []


def test_processes_using_finds_the_holders_of_the_given_files_only(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    with holding(tmp_path / "a") as first, holding(tmp_path / "b", tmp_path / "a") as second:
        found = processes_using([tmp_path / "a"])
        assert sorted(int(words.split()[1]) for words in found) == sorted([first, second])
        (found,) = processes_using([tmp_path / "b"])
        assert found.startswith(f"process {second} ({sys.executable} -c import sys")
        assert "\n" not in found
        assert processes_using([tmp_path / "c"]) == []


# Data and bucket


def test_data_on_a_disk_must_be_on_each_hosts(plan, tmp_path):
    def reading(path):
        data = {**plan.config["data"], "source": "records", "train": {"path": path}, "eval": None}
        return dataclasses.replace(plan, config={**plan.config, "data": data})

    (problem,) = _path_problems(reading("/nowhere/train"))
    assert problem.startswith("data.train.path = /nowhere/train does not exist: put the data under gs://")
    assert _path_problems(reading(str(tmp_path))) == []
    assert _path_problems(reading("gs://bucket/data")) == []
    noise = reading("nowhere/train")
    assert (
        _path_problems(
            dataclasses.replace(
                noise, config={**noise.config, "data": {**noise.config["data"], "source": "synthetic"}}
            )
        )
        == []
    )


def test_bucket_is_written_by_each_host(rehearsal, tmp_path, gcs):
    assert run_checks(tmp_path, request_for(tmp_path, rehearsal, 2)).problems == []
    assert json.loads(gcs.contents()["runs/quickstart/hosts/2.json"])["phase"] == "checked"


def test_host_that_may_not_write_to_the_bucket_says_so(rehearsal, tmp_path, gcs):
    gcs.faults = [Fault("status", operation="upload", status=403)]
    (problem,) = run_checks(tmp_path, request_for(tmp_path, rehearsal, 2)).problems
    assert "no permission (HTTP 403)" in problem
    assert "\n" not in problem


def test_unreachable_bucket_is_reported_before_a_write_would_time_out(rehearsal, tmp_path, gcs, monkeypatch):
    monkeypatch.setattr(storage.google, "RETRY_SECONDS", 0.2)
    gcs.faults = [Fault("status", operation="*")]
    begun = time.monotonic()
    (problem,) = run_checks(tmp_path, request_for(tmp_path, rehearsal, 2)).problems
    assert time.monotonic() - begun < 10 < storage.WRITE_RETRY_SECONDS
    assert "cannot be reached" in problem


# Ports


def test_host_0_listens_at_its_address_alone_and_can_be_reached_there():
    listening = listen("127.0.0.1")
    with contextlib.ExitStack() as stack:
        for s in listening:
            stack.enter_context(s)
            assert s.getsockname()[0] == "127.0.0.1"
        ports = [s.getsockname()[1] for s in listening]
        assert set(ports[1:]) <= set(KNOWN_PORTS)
        for port in ports:
            assert _reaches("127.0.0.1", port)
            assert not _reaches("127.0.0.2", port)
    for port in ports:  # they are free again at once
        assert not _reaches("127.0.0.1", port)
        reserve_port("127.0.0.1", port).close()


def test_known_port_that_is_taken_is_not_offered(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(preflight, "KNOWN_PORTS", (taken.getsockname()[1],))
        (only,) = listen("127.0.0.1")
        only.close()


def test_address_of_another_host_cannot_be_listened_at():
    assert listen("192.0.2.1") == []


def test_port_behind_a_firewall_is_not_reached(monkeypatch):
    monkeypatch.setattr(preflight, "CONNECT_SECONDS", 0.1)
    with socket.socket() as full:  # what connects waits in vain
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            assert not _reaches(*full.getsockname())


def test_host_0_answers_and_listens_until_its_standard_input_ends(rehearsal, tmp_path, gcs):
    host_0 = subprocess.Popen([*COMMAND, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with host_0:
        host_0.stdin.write(
            (json.dumps(dataclasses.asdict(request_for(tmp_path, rehearsal, 0))) + "\n").encode()
        )
        host_0.stdin.flush()
        first = json.loads(host_0.stdout.readline())
        assert first["problems"] == []
        assert first["fingerprint"] == fingerprint()
        with reserve_port("127.0.0.1") as held:
            closed = held.getsockname()[1]
        other = run_checks(tmp_path, request_for(tmp_path, rehearsal, 1, ports=[*first["ports"], closed]))
        assert other.ports == first["ports"]
        assert host_0.poll() is None
    assert host_0.returncode == 0


def test_host_0_reports_an_address_that_it_does_not_have(rehearsal, tmp_path, gcs):
    request = request_for(tmp_path, rehearsal, 0, address="192.0.2.1")
    done = subprocess.run(
        [*COMMAND, tmp_path], input=json.dumps(dataclasses.asdict(request)).encode(), capture_output=True
    )
    found = json.loads(done.stdout)
    assert found["ports"] == []
    assert found["problems"] == ["it cannot listen at 192.0.2.1: no network interface here has it"]
