"""The run directory: names, the lock, reports of hosts, and files that a crash may truncate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from launcher.rundir import RunDirectory, RunHeldError, check_name, lease, list_runs, storage


@pytest.fixture
def run(planned, tmp_path):
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    run.write_plan(planned())
    return run


@pytest.mark.parametrize("name", ["a", "R50", "r50-lr0.1_b", "2026-01-01", "a" * 63])
def test_valid_run_names_are_accepted(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "../a",
        ".",
        "..",
        ".a",
        "a b",
        " a",
        "a'b",
        'a"b',
        "a$b",
        "-a",
        "_a",
        "a\n",
        "a\nb",
        "ä",
        "a" * 64,
    ],
)
def test_other_names_are_refused_as_given(name):
    with pytest.raises(UserError) as refused:
        check_name(name)
    assert f"--name {name!r}: a run name has 1 to 63 letters" in str(refused.value)


# Plan


def test_plan_is_kept(run, planned):
    assert run.plan() == planned()
    assert run.name == "quickstart"


def test_folder_without_a_plan_has_none(tmp_path):
    assert RunDirectory(tmp_path / "absent").plan() is None
    assert RunDirectory(tmp_path).plan() is None


def test_path_through_a_file_has_no_plan_and_cannot_be_made(planned, tmp_path):
    (tmp_path / "file").touch()
    run = RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(
        UserError, match=r"cannot be written: Not a directory; choose another place with --root"
    ):
        run.write_plan(planned())
    assert run.plan() is None


@pytest.mark.parametrize("text", ['{"resource": []}', "[]", '{"name": "r5'], ids=["foreign", "list", "cut"])
def test_foreign_plan_json_is_a_user_error(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json"):
        RunDirectory(tmp_path).plan()


# Lock


def test_one_launcher_at_a_time(run):
    assert not run.is_running()
    with run.locked():
        assert run.is_running()
        with (
            pytest.raises(UserError, match=r"run quickstart is running already.*launch stop quickstart"),
            RunDirectory(run.path).locked(),
        ):
            pass
    assert not run.is_running()
    with run.locked():
        assert run.is_running()


def test_lock_goes_with_a_killed_launcher(run):
    hold = (
        "import sys, pathlib; from launcher.rundir import RunDirectory\n"
        "with RunDirectory(pathlib.Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", hold, run.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    with launcher:
        assert launcher.stdout.readline() == b"held\n"
        assert run.is_running()
        launcher.kill()
    assert not run.is_running()


def test_absent_run_is_not_running(tmp_path):
    assert not RunDirectory(tmp_path / "absent").is_running()
    assert not (tmp_path / "absent").exists()


# Attempts and reports of hosts


def test_ledger_ignores_a_line_that_a_crash_has_cut(run):
    run.attempts.append({"attempt": 1, "verdict": "failed", "mesh": {"batch": 4}})
    with (run.path / "attempts.jsonl").open("a") as f:
        f.write('{"attempt": 2, "ver')
    assert [a["attempt"] for a in run.attempts.all()] == [1]


def test_ledger_survives_a_cut_behind_an_inner_brace(run):
    (run.path / "attempts.jsonl").write_text('{"attempt": 1}\n{"attempt": 2, "mesh": {"batch": 4}')
    assert [a["attempt"] for a in run.attempts.all()] == [1]


def test_ledger_goes_on_behind_a_cut_line(run):
    (run.path / "attempts.jsonl").write_text('{"attempt": 1}\n{"attempt": 2, "ver')
    run.attempts.append({"attempt": 3})
    assert [a["attempt"] for a in run.attempts.all()] == [1, 3]


def test_ledger_keeps_unicode_line_separators(run):
    attempt = {"attempt": 1, "error": "a\u2028b\x85c\nd"}
    run.attempts.append(attempt)
    assert run.attempts.all() == [attempt]


def test_attempt_begins_with_a_clean_slate(run):
    assert run.attempts.last() == 0
    assert run.attempts.begin({}) == 1
    run.hosts.write_report(0, {"step": 5})
    run.write_result({"status": "failed"})
    assert (run.hosts.report(0), run.result()) == ({"step": 5}, {"status": "failed"})
    assert run.attempts.begin({}) == 2
    assert (run.hosts.report(0), run.result()) == ({}, None)
    assert run.hosts.log_file(2, 1) == run.path / "logs" / "attempt-2" / "host-1.log"
    assert run.hosts.log_file(2, 1).parent.is_dir()


def test_attempts_are_numbered_beyond_nine(run):
    for number in range(1, 12):
        assert run.attempts.begin({}) == number


def test_each_process_has_its_own_newest_report(run):
    run.attempts.begin({})
    for step in (1, 2):
        run.hosts.write_report(0, {"step": step})
    run.hosts.write_report(1, {"step": 7})
    assert (run.hosts.report(0), run.hosts.report(1), run.hosts.report(2)) == ({"step": 2}, {"step": 7}, {})


def test_stop_request_stays_until_it_is_cleared(run):
    assert not run.stop_requested()
    run.request_stop()
    run.request_stop()
    assert run.stop_requested()
    run.clear_stop()
    run.clear_stop()
    assert not run.stop_requested()


def test_result_is_readable_text(run):
    run.write_result({"status": "failed", "failure": {"error": "größer"}})
    assert run.result() == {"status": "failed", "failure": {"error": "größer"}}
    assert "größer" in (run.path / "result.json").read_text(encoding="utf-8")


# Checkpoints and runs


def test_only_whole_checkpoints_count(run):
    assert run.checkpoint_steps() == []
    for name in ("100", "9", "20.orbax-checkpoint-tmp", "best"):
        (run.path / "checkpoints" / name).mkdir(parents=True)
    assert run.checkpoint_steps() == [9, 100]


def test_checkpoints_in_the_run_directory_are_claimed_by_nothing_else(run):
    before = sorted(run.path.rglob("*"))
    run.claim_checkpoints(run.plan())
    assert sorted(run.path.rglob("*")) == before


def test_runs_are_those_with_a_plan_the_last_used_first(planned, tmp_path):
    root = tmp_path / "runs"
    assert list_runs(root) == []
    for age, name in enumerate(["new", "middle", "old"]):
        run = RunDirectory(root / name)
        run.write_plan(planned(name=name))
        os.utime(run.path / "plan.json", (1_000_000 - age, 1_000_000 - age))
    (root / "no-run").mkdir()
    (root / "a-file").write_text(json.dumps({}))
    assert [run.name for run in list_runs(root)] == ["new", "middle", "old"]


# Under gs://


@pytest.fixture
def remote(planned, gcs):
    remote = RunDirectory("gs://bucket/runs/quickstart")
    remote.write_plan(planned(cluster="tpu-v4-32", root="gs://bucket/runs"))
    return remote


def test_run_in_a_bucket_is_the_same_from_anywhere(remote, planned):
    remote.begin_launch(None)
    number = remote.attempts.begin({"cluster": "tpu-v4-32"})
    remote.hosts.write_report(3, {"step": 5})
    remote.write_code(b"packed")
    elsewhere = RunDirectory("gs://bucket/runs/quickstart/")
    assert (elsewhere.location, elsewhere.name) == ("gs://bucket/runs/quickstart", "quickstart")
    assert elsewhere.plan() == planned(cluster="tpu-v4-32", root="gs://bucket/runs")
    assert elsewhere.attempts.last() == number == 1
    assert elsewhere.attempts.info(1)["cluster"] == "tpu-v4-32"
    assert (elsewhere.hosts.report(3), elsewhere.hosts.report(0)) == ({"step": 5}, {})
    assert elsewhere.code() == b"packed"


def test_attempt_in_a_bucket_begins_with_a_clean_slate(remote):
    for number in range(1, 12):
        assert remote.attempts.begin({}) == number
        assert (remote.hosts.report(0), remote.result()) == ({}, None)
        remote.hosts.write_report(0, {"step": number})
        remote.write_result({"status": "failed"})
    assert RunDirectory(remote.location).hosts.report(0) == {"step": 11}


def test_ledger_in_a_bucket_is_appended_to_by_several_launchers(remote, gcs):
    remote.attempts.append({"attempt": 1, "error": "größer\n"})
    RunDirectory(remote.location).attempts.append({"attempt": 2})
    assert RunDirectory(remote.location).attempts.all() == [
        {"attempt": 1, "error": "größer\n"},
        {"attempt": 2},
    ]
    assert gcs.contents("runs/quickstart/attempts")["runs/quickstart/attempts.jsonl"].count(b"\n") == 2


def test_log_in_a_bucket_is_followed_as_it_grows(remote):
    reader, read = RunDirectory(remote.location), b""
    for text in ("one\n", "one\ngrößer\n", "one\ngrößer\nthree\n"):
        remote.hosts.write_log(1, 0, text)
        read += reader.hosts.read_log(1, 0, len(read))
        assert read == text.encode()
    assert reader.hosts.read_log(1, 0, len(read)) == b""
    assert reader.hosts.read_log(1, 1) == b""


def test_run_in_a_bucket_has_one_launcher_which_the_refusal_names(remote, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.02)
    assert not remote.is_running()
    with remote.locked():
        assert remote.is_running()
        refusal = rf"^run quickstart is running already, supervised by process {os.getpid()} on \S+; see `launch status"
        with pytest.raises(RunHeldError, match=refusal), RunDirectory(remote.location).locked():
            pass
        assert not remote.is_lost()
    assert not remote.is_running()


def test_stop_request_reaches_a_bucket_s_launcher(remote, monkeypatch):
    monkeypatch.setattr(storage, "CACHE_SECONDS", 0.0)
    assert not remote.stop_requested()
    RunDirectory(remote.location).request_stop()
    assert remote.stop_requested()
    remote.begin_launch(None)
    assert not remote.stop_requested()


def test_directory_with_only_a_lease_has_no_foreign_files(gcs):
    remote = RunDirectory("gs://bucket/runs/new")
    with remote.locked():
        assert not remote.has_foreign_files()
        gcs.put("runs/new/thesis.tex", b"x")
        remote.refresh()
        assert remote.has_foreign_files()


def test_runs_of_a_bucket_the_last_launched_first(planned, gcs):
    assert list_runs("gs://bucket/runs") == []
    for minute, name in enumerate(["old", "middle", "new"]):
        RunDirectory(f"gs://bucket/runs/{name}").write_plan(planned(name=name))
        meta = gcs.objects["bucket", f"runs/{name}/plan.json"].meta
        meta["updated"] = f"2026-01-01T00:0{minute}:00.000Z"
    gcs.put("runs/no-run/word", b"x")
    gcs.put("elsewhere/plan.json", b"x")
    assert [run.name for run in list_runs("gs://bucket/runs")] == ["new", "middle", "old"]


def test_foreign_plan_json_in_a_bucket_is_a_user_error(gcs):
    gcs.put("runs/quickstart/plan.json", b'{"resource": []}')
    with pytest.raises(UserError, match=r"^gs://bucket/runs/quickstart/plan\.json is not a plan"):
        RunDirectory("gs://bucket/runs/quickstart").plan()


def test_directory_is_as_it_was_where_a_launch_is_refused(run, planned):
    run.write_result({"status": "stopped"})
    files = {path: path.read_bytes() for path in run.path.iterdir()}

    def refused(run: RunDirectory) -> None:
        with run.locked_or_rolled_back():
            run.write_plan(planned("train.epochs=1"))
            run.begin_launch(None)
            (run.path / "logs").mkdir()
            raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        refused(run)
    assert {path: path.read_bytes() for path in run.path.iterdir() if path.name != ".lock"} == files
    absent = RunDirectory(run.path.parent / "new" / "run")
    with pytest.raises(UserError, match="refused"):
        refused(absent)
    assert not absent.path.parent.exists()


def test_another_launcher_s_run_is_not_rolled_back(run):
    with run.locked():
        other = RunDirectory(run.path)
        with pytest.raises(RunHeldError), other.locked_or_rolled_back():
            pytest.fail("it is held")
    assert run.plan() is not None


def test_ctrl_c_rolls_nothing_back_since_a_job_may_have_been_submitted(run):
    def interrupted() -> None:
        with run.locked_or_rolled_back():
            run.write_result({"status": "stopped"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert run.result() == {"status": "stopped"}
