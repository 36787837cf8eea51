"""Storage of run directories: the same operations on a folder and a bucket, and the lease for one launcher."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from launcher.rundir import lease, storage
from launcher.rundir.lease import LEASE, HeldError
from launcher.rundir.storage import Bucket, open_files
from tests.gcs import Fault

REPOSITORY = Path(__file__).parents[3]
PLACE = "gs://bucket/runs/r50"


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, gcs):
    return str(tmp_path / "r50") if request.param == "folder" else PLACE


@pytest.fixture
def short(monkeypatch):
    """Leases that are renewed every 0.1 s and expire after 1 s."""
    for name, seconds in {"RENEW": 0.1, "LEASE": 1.0, "POLL": 0.02, "CLOCK": 60.0}.items():
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(storage, "CACHE_SECONDS", 0.0)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "WRITE_RETRY_SECONDS", 0.5)
    monkeypatch.setattr(storage.google, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(storage, "CACHE_SECONDS", 0.0)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def out_of_order():
    return Fault("status", operation="*")


# Files


def test_written_file_is_read_by_another_process(place):
    open_files(place).write("plan.json", "größer")
    assert open_files(place).read("plan.json") == "größer"
    assert open_files(place).location == place


def test_absent_file_reads_as_none_and_may_be_deleted(place):
    there = open_files(place)
    assert there.read("plan.json") is None
    assert there.read_from("logs/a", 0) == b""
    assert there.names() == []
    assert there.names("logs") == []
    there.delete("plan.json")
    assert not there.is_held()


def test_growing_file_is_read_on_from_where_one_was(place):
    there = open_files(place)
    there.write("log", b"one\n")
    assert there.read_from("log", 0) == b"one\n"
    assert there.read_from("log", 4) == b""
    there.write("log", b"one\ntwo\n")
    assert there.read_from("log", 4) == b"two\n"
    assert there.read_from("log", 99) == b""
    there.write("log", b"")
    assert there.read_from("log", 0) == b""


def test_names_are_those_of_one_folder(place):
    there = open_files(place)
    for name in ("plan.json", "logs/attempt-2/a", "logs/attempt-10/a", "logs/word", "hosts/0.json"):
        there.write(name, "x")
    assert there.names() == ["hosts", "logs", "plan.json"]
    assert there.names("logs") == ["attempt-10", "attempt-2", "word"]
    assert there.names("log") == []


def test_delete_removes_a_file_or_folder_but_not_longer_names(place):
    there = open_files(place)
    for name in ("hosts/0.json", "hosts/1.json", "hosts-2", "result.json", "result.json.old"):
        there.write(name, "x")
    there.delete("hosts")
    there.delete("result.json")
    assert there.names() == ["hosts-2", "result.json.old"]
    assert there.read("hosts/0.json") is None
    assert there.read("result.json") is None


def test_own_writes_and_deletions_are_visible_at_once(place):
    there = open_files(place)
    for text in ("1", "2"):
        there.write("word", text)
        assert there.read("word") == text
    there.delete("word")
    assert there.read("word") is None
    there.write("word", "3")
    assert there.read("word") == "3"


def test_runs_are_named_last_launched_first(place):
    for name in ("old", "new", "deep/er"):
        open_files(f"{place}/{name}").write("plan.json", "x")
    open_files(f"{place}/new").write("checkpoints/1/plan.json", "x")
    open_files(f"{place}/no-run").write("word", "x")
    if not place.startswith("gs://"):
        os.utime(f"{place}/old/plan.json", (1, 1))
    else:
        time.sleep(0.002)  # the service tells milliseconds
        open_files(f"{place}/new").write("plan.json", "x")
    assert storage.list_plans(place) == [f"{place}/new", f"{place}/old"]


def test_bucket_itself_is_a_root(gcs):
    open_files("gs://bucket/r50").write("plan.json", "x")
    assert storage.list_plans("gs://bucket") == ["gs://bucket/r50"]
    assert storage.list_plans("gs://bucket/") == ["gs://bucket/r50"]


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    there = open_files(str(tmp_path / "file" / "run"))
    for write in (lambda: there.write("a", "x"), lambda: there.locked(0).__enter__()):
        with pytest.raises(UserError, match=r"^run directory .* cannot be written: .*; choose another place"):
            write()
    assert there.read("a") is None
    assert there.names() == []
    assert not there.is_held()


# A bucket


def test_reads_are_cached_until_refresh(gcs):
    there = open_files(PLACE)
    gcs.put("runs/r50/word", b"1")
    assert there.read("word") == "1"
    gcs.put("runs/r50/word", b"2")
    gcs.forget()
    assert there.read("word") == "1"
    assert not gcs.reads()
    there.refresh()
    assert there.read("word") == "2"


def test_last_content_is_returned_while_the_bucket_is_unreachable(gcs, impatient):
    there = open_files(PLACE)
    there.write("word", "last")
    assert there.read("absent") is None
    gcs.faults = [out_of_order()]
    assert there.read("word") == "last"
    assert there.read("absent") is None
    with pytest.raises(UserError, match=rf"^run directory {PLACE} cannot be reached: .*; try again$"):
        there.read("never-read")
    gcs.faults = []
    gcs.put("runs/r50/word", b"newer")
    assert there.read("word") == "newer"


def test_every_operation_on_an_unreachable_bucket_fails_with_one_line(gcs, impatient):
    there = open_files(PLACE)
    gcs.faults = [out_of_order()]
    for ask in (
        there.names, there.is_held, lambda: there.delete("word"), lambda: there.read_from("log", 0),
        lambda: there.write("word", "x"), lambda: there.locked(0).__enter__(), lambda: storage.list_plans("gs://bucket"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"^run directory \S+ cannot be reached: [^\n]*; try again$"):
            ask()


def test_write_outlasts_an_outage(gcs, monkeypatch):
    monkeypatch.setattr(storage.google, "RETRY_SECONDS", 0.1)
    gcs.faults = [Fault("status", operation="upload", count=3)]
    open_files(PLACE).write("result.json", "done")
    assert gcs.contents()["runs/r50/result.json"] == b"done"


def test_absent_bucket_is_one_line_even_where_an_absent_object_would_be_none(gcs):
    for ask in (
        lambda there: there.read("plan.json"), lambda there: there.write("a", "x"), lambda there: there.names(),
        lambda there: there.delete("a"), lambda there: there.locked(0).__enter__(),
    ):  # fmt: skip
        with pytest.raises(
            UserError, match=r"^run directory gs://other/r: there is no bucket other; [^\n]*$"
        ):
            ask(open_files("gs://other/r"))


def test_missing_permissions_are_one_line_with_the_role(gcs):
    gcs.faults = [Fault("status", operation="*", status=403)]
    for ask in (
        lambda there: there.read("plan.json"), lambda there: there.write("a", "x"), lambda there: there.names(),
        lambda there: there.delete("a"), lambda there: there.locked(0).__enter__(), lambda there: there.is_held(),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"no permission \(HTTP 403\).*Storage Object User[^\n]*$"):
            ask(open_files(PLACE))


def test_prefix_without_a_bucket_is_refused():
    with pytest.raises(UserError, match=r"^gs:///r50: names no bucket"):
        open_files("gs:///r50")


def test_threads_read_write_and_delete_at_once(gcs):
    there = open_files(PLACE)
    errors = []

    def work(number):
        try:
            for k in range(15):
                there.write(f"hosts/{number}-{k}.json", "x")
                there.read(f"hosts/{number}-{k}.json")
                there.refresh()
                there.delete(f"hosts/{number}-{k}.json")
        except RuntimeError as e:  # of a dictionary that changes under the other
            errors.append(e)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert there.names("hosts") == []


# The lease


def test_held_lease_is_refused_and_its_holder_named(gcs, short, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
    with open_files(PLACE).locked(0):
        begun = time.monotonic()
        with pytest.raises(HeldError, match=rf"^process {os.getpid()} on \S+$"), open_files(PLACE).locked(0):
            pass
        assert time.monotonic() - begun < lease.LEASE_SECONDS
        assert open_files(PLACE).is_held()


def test_lease_given_back_is_free_at_once(gcs, short, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
    there = open_files(PLACE)
    for _ in range(2):
        with there.locked(0):
            assert there.is_held()
        assert not there.is_held()
        assert gcs.contents() == {}


def test_lease_given_back_while_another_waits_for_it_is_taken(gcs, short, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 60.0)
    with contextlib.ExitStack() as first:
        first.enter_context(open_files(PLACE).locked(0))
        gets = len(gcs.log)
        taken = threading.Event()

        def take():
            with open_files(PLACE).locked(0):
                taken.set()

        second = threading.Thread(target=take)
        second.start()
        until(lambda: sum(a.operation == "get" for a in gcs.log[gets:]) > 2)
        assert not taken.is_set()
    second.join(10)
    assert taken.is_set()


HOLDER = f"""
import time
from launcher.rundir import lease, storage
lease.RENEW_SECONDS = 0.1
there = storage.open_files("{PLACE}")
with there.locked(0):
    print("held", flush=True)
    while not there.is_lost():
        time.sleep(0.01)
print("lost")
"""


def test_lease_that_is_not_renewed_is_taken_over_and_its_holder_notices(gcs, short):
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, cwd=REPOSITORY) as holder:
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)  # a laptop that sleeps
        begun = time.monotonic()
        there = open_files(PLACE)
        with there.locked(0):
            assert time.monotonic() - begun > lease.LEASE_SECONDS * 0.9
            holder.send_signal(signal.SIGCONT)
            assert holder.stdout.readline() == b"lost\n"
            assert holder.wait(10) == 0
            assert there.is_held()  # what the other left is not its own
            assert not there.is_lost()
    assert gcs.contents() == {}


def test_long_expired_lease_is_taken_without_waiting(gcs, short, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 30.0)
    gcs.put(f"runs/r50/{LEASE}", b'{"host": "h", "pid": 1, "id": "a"}')
    gcs.objects["bucket", f"runs/r50/{LEASE}"].meta["updated"] = "2026-01-01T00:00:00.000Z"
    there = open_files(PLACE)
    assert not there.is_held()
    begun = time.monotonic()
    with there.locked(0):
        assert time.monotonic() - begun < lease.LEASE_SECONDS


def test_expired_lease_deleted_during_the_takeover_is_still_taken(gcs, short, monkeypatch):
    gcs.put(f"runs/r50/{LEASE}", b'{"host": "h", "pid": 1, "id": "a"}')
    mine = lease.Lease(open_files(PLACE)._bucket, f"runs/r50/{LEASE}")
    mine._generation = 17  # of one that was void, and that its holder has deleted since
    del gcs.objects["bucket", f"runs/r50/{LEASE}"]
    mine.take()
    assert mine._generation == gcs.objects["bucket", f"runs/r50/{LEASE}"].generation
    mine.release()


def test_of_two_that_want_a_void_lease_one_gets_it(gcs, short):
    gcs.put(f"runs/r50/{LEASE}", b'{"host": "h", "pid": 1, "id": "a"}')
    outcomes, both = [], threading.Barrier(2)
    done = threading.Event()

    def take():
        both.wait()
        try:
            with open_files(PLACE).locked(0):
                outcomes.append("taken")
                done.wait(10)
        except HeldError:
            outcomes.append("held")
            done.set()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(outcomes) == ["held", "taken"]


def test_lease_is_ours_although_the_response_to_its_write_was_lost(gcs, short):
    there = open_files(PLACE)
    # The first is carried out; its answer breaks off, and it is sent again.
    gcs.faults = [Fault("reset", operation="upload", count=1)]
    begun = time.monotonic()
    with there.locked(0):
        assert time.monotonic() - begun < lease.LEASE_SECONDS
        renewed = Fault("reset", operation="upload", count=1)
        gcs.faults = [renewed]
        until(lambda: renewed._seen[None] > 2)
        assert not there.is_lost()
    assert gcs.contents() == {}


def test_outage_shorter_than_the_lease_loses_nothing(gcs, short, monkeypatch):
    monkeypatch.setattr(storage.google, "RETRY_SECONDS", 0.1)
    there = open_files(PLACE)
    with there.locked(0):
        outage = out_of_order()
        gcs.faults = [outage]
        until(lambda: outage._seen[None] > 2)
        gcs.faults = []
        uploads = len(gcs.log)
        until(lambda: any(a.operation == "upload" and a.status == 200 for a in gcs.log[uploads:]))
        assert not there.is_lost()
        assert there.is_held()
    assert gcs.contents() == {}


def test_lease_that_was_never_held_is_not_lost(gcs):
    assert not Bucket(PLACE).is_lost()
