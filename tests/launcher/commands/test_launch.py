"""The `launch` command: its output, its exit codes, and that a user error leaves no files."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import configs
from configs.clusters import named_clusters
from configs.errors import UserError
from configs.schema import json_schema
from launcher.commands.main import main
from launcher.commands.runs import check_can_resume
from launcher.plan import Plan
from launcher.rundir import RunDirectory

RECIPES = Path(configs.__file__).parent
QUICKSTART = str(RECIPES / "quickstart.yaml")
COMMANDS = [
    "attach", "clusters", "configure", "data", "gc", "list", "logs", "plan", "run", "schema", "ssh", "status", "stop",
    "supervise", "tensorboard", "worker",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    """In an empty folder, on a machine without accelerators."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where `launch` keeps runs by default."""
    return tmp_path / "runs"


def launch(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def launch_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podlaunch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10)


def assert_refused(result: Result, *fragments: str) -> None:
    """Exit code 2, and nothing on standard error but `error: …` lines."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert all(line.startswith("error: ") for line in result.stderr.splitlines()), result.stderr
    assert [f for f in fragments if f not in result.stderr] == [], result.stderr


# The command as users start it


def test_help_lists_the_commands():
    done = launch_process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE) == COMMANDS


def test_launch_without_run_is_launch_run(root):
    implied, named = launch_process(QUICKSTART, "--dry-run"), launch_process("run", "--dry-run", QUICKSTART)
    assert (implied.returncode, implied.stderr) == (0, "")
    assert implied.stdout == named.stdout
    assert not root.exists()


def test_mistake_is_told_without_a_traceback(root):
    done = launch_process("--cluster", "local-4", QUICKSTART, "train.batch_sise=3", "model.name=resnet51")
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(":")[:3] for line in done.stderr.splitlines()] == [
        ["error", " command line", " model.name = resnet51"],
        ["error", " command line", " train.batch_sise"],
    ]
    assert not root.exists()


# Plans


def test_plan_json_has_what_scripts_need(root):
    result = launch("plan", QUICKSTART, "--json", "--cluster", "local-2x2", "train.epochs=4")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    expected = {
        "cluster": "local-2x2", "backend": "local", "processes": 2, "devices": 4, "mesh": {"batch": 4, "model": 1},
        "global_batch": 64, "per_device_batch": 16, "steps": 90, "epochs": 90 * 64 / 1437, "parameters": 701_466,
        "run_directory": str(root / "quickstart"),
    }  # fmt: skip
    assert expected.items() <= plan.items()
    assert plan["provenance"]["packages"]["jax"]
    assert {"commit", "dirty", "python"} <= plan["provenance"].keys()
    assert not root.exists()


def test_dry_run_shows_the_plan_and_its_commands():
    arguments = (QUICKSTART, "--cluster", "local-2x3", "--name", "dry", "train.batch_size=96")
    shown = launch("plan", *arguments).stdout
    plan = Plan.from_json(launch("plan", *arguments, "--json").stdout)
    dry = launch("run", *arguments, "--dry-run").stdout
    assert dry.startswith(shown)
    assert len(dry.removeprefix(shown).splitlines()) == plan.processes
    for text in (
        "dry  (",
        "local-2x3: 2 processes × 3 cpu = 6 devices",
        "batch 6 × model 1",
        "96 global, 16 per device",
        f"{plan.steps} (",
        f"resnet18, {plan.parameters:,} parameters, float32",
        plan.run_directory,
    ):
        assert text in shown


@pytest.mark.parametrize("path", sorted(RECIPES.glob("[qr]*.yaml")), ids=lambda path: path.stem)
def test_command_in_the_head_of_each_recipe_can_be_planned(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    command = re.search(r"^#   launch (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    result = launch("plan", *command[1].split())
    assert result.exit_code == 0, result.output
    assert f"run         {path.stem}  (configs/{path.name})" in result.stdout


@pytest.mark.parametrize("command", [[], ["run"], ["plan"]], ids=" ".join)
def test_recipe_may_be_given_by_its_name(tmp_path, command):
    (tmp_path / "mine.yaml").write_text((RECIPES / "quickstart.yaml").read_text())
    more = [] if command == ["plan"] else ["--dry-run"]
    for name, file in (("mine", "mine.yaml"), ("r50", RECIPES / "r50.yaml")):
        result = launch(*command, name, *more)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"run         {name}  ({file})\n")


# Mistakes


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "data.train.path: nowhere: there is no such folder"),
        ("gs://", "names no bucket"),
        (".", "is empty"),
    ],
)
def test_data_that_is_not_there_is_told_before_anything_is_made(root, path, message):
    assert_refused(launch(str(RECIPES / "r50.yaml"), f"data.train.path={path}"), message)
    assert not root.exists()


@pytest.mark.parametrize(
    ("word", "fragments"),
    [
        ("nope.yaml", ["nope.yaml: no such file"]),
        (".", [".: neither a command nor a recipe"]),
        ("quick", ["quick: neither a command nor a recipe", "launch --help"]),
        ("plna", ["plna: neither a command nor a recipe", 'did you mean "plan"?']),
        ("statu", ['did you mean "status"?']),
        ("x" * 300, ["neither a command nor a recipe"]),
    ],
)
def test_word_that_is_neither_command_nor_recipe_is_refused(tmp_path, word, fragments):
    assert_refused(launch(word, QUICKSTART), *fragments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["log", "-f"], 'did you mean "logs"?'),
        (["stpo", "--timeout", "3"], 'did you mean "stop"?'),
        (["--root", "x", "list"], "launch list"),
    ],
)
def test_mistyped_command_is_hinted_whatever_its_options(arguments, hint):
    assert_refused(launch(*arguments), hint)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train.batch_size=0"], ["command line: train.batch_size = 0", "at least 1"]),
        (["epochs"], ["'epochs'", "section.key=value"]),
        (["train.batch_size=63"], ["train.batch_size = 63", "nearest: 60 or 64"]),
        (["mesh.model=3"], ["mesh.model = 3", "Allowed: 1, 2, 4"]),
        (["--cluster", "locl"], ["cluster = locl: unknown", 'did you mean "local"?']),
        (["--cluster", "local-0"], ["cluster = local-0"]),
        (["--name", "a/b"], ["--name 'a/b'", "1 to 63"]),
        (["--name", "a b"], ["--name 'a b'"]),
        (["--name", "it's"], ['--name "it\'s"']),
        (["--name", "-a"], ["--name '-a'"]),
        (["--name", ""], ["--name ''"]),
        (["--root", "gs://bucket/runs"], ["--root gs://bucket/runs", "log.tensorboard=gs://"]),
    ],
)
@pytest.mark.parametrize("command", [[], ["run", "--dry-run"], ["plan"]], ids=["run", "dry-run", "plan"])
def test_mistake_exits_2_and_creates_nothing(tmp_path, command, arguments, fragments):
    assert_refused(launch(*command, QUICKSTART, *arguments), *fragments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'CONFIG'"),
        (["--cluster", "local-4"], "Missing argument 'CONFIG'"),
        ([QUICKSTART, "--nmae", "x"], "--name"),
        ([QUICKSTART, "--max-restarts", "-1"], "--max-restarts"),
        (["logs", "--host", "-1"], "--host"),
    ],
)
def test_misused_options_are_explained_by_the_command_line_library(tmp_path, arguments, message):
    result = launch(*arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_default_name_that_cannot_be_one_says_where_it_comes_from(tmp_path):
    (tmp_path / "my recipe.yaml").write_text("data: {source: digits}\n")
    assert_refused(launch("my recipe.yaml"), "'my recipe'", "--name")


@pytest.mark.parametrize("root", ["file", "file/below", "file/far/below"])
def test_root_that_cannot_be_written_is_refused(tmp_path, root):
    (tmp_path / "file").touch()
    assert_refused(launch(QUICKSTART, "--root", root), f"{root}/quickstart cannot be written", "--root")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_file_in_the_place_of_the_run_is_refused(tmp_path):
    (tmp_path / "quickstart").touch()
    assert_refused(launch(QUICKSTART, "--root", "."), "quickstart cannot be written")


# Runs that are there already


@pytest.fixture
def made(root, planned) -> Callable[..., RunDirectory]:
    """A run that was launched with those overrides."""

    def made(*overrides: str, name: str = "quickstart") -> RunDirectory:
        run = RunDirectory(root / name)
        run.write_plan(planned(*overrides, name=name))
        return run

    return made


def test_run_of_another_config_is_refused_and_left_alone(made):
    run = made("train.seed=1", "optimizer.momentum=0.5")
    (run.path / "checkpoints" / "20").mkdir(parents=True)
    before = (run.path / "plan.json").read_text()
    assert_refused(
        launch(QUICKSTART),
        "run quickstart was started with other settings",
        "train.seed: 1, now 0",
        "optimizer.momentum: 0.5, now 0.9",
        "--name",
    )
    assert (run.path / "plan.json").read_text() == before
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "plan.json"]


def test_before_the_first_checkpoint_settings_may_be_mended(made, planned):
    run = made("train.seed=1")
    assert check_can_resume(planned("train.seed=2"), run) == ["train.seed: 1, now 2"]


def test_data_may_move(made, planned):
    recipe = [
        "data.source=synthetic",
        "data.train={path: A, num_examples: 99}",
        "data.eval={path: B, num_examples: 9}",
    ]
    run = made(*recipe)
    (run.path / "checkpoints" / "5").mkdir(parents=True)
    assert check_can_resume(planned(*recipe, "data.train.path=gs://c/d"), run) == []
    with pytest.raises(UserError, match=r"data.train: .*98"):
        check_can_resume(planned(*recipe, "data.train.num_examples=98"), run)


@pytest.mark.parametrize("new", ["gs://bucket/new", "new"])
def test_checkpoints_that_stay_behind_stop_a_run_from_beginning_anew(made, planned, gcs, tmp_path, new):
    run = made("checkpoint.directory=gs://bucket/old")
    moved = planned(f"checkpoint.directory={new}")
    assert check_can_resume(moved, run) == []  # there are none yet
    for name in ("old/20/commit_success.txt", "old/30/state/part"):
        gcs.put(name, b"")
    with pytest.raises(
        UserError, match=r"up to step 20 in gs://bucket/old, and none in .*new: copy the checkpoints"
    ):
        check_can_resume(moved, run)
    gcs.put("new/20/commit_success.txt", b"")
    (tmp_path / "new" / "20").mkdir(parents=True)
    assert check_can_resume(moved, run) == []


def test_status_knows_checkpoints_in_a_bucket(made, gcs):
    made("checkpoint.directory=gs://bucket/r")
    gcs.put("r/40/commit_success.txt", b"")
    assert "checkpoints 40\n" in launch("status").stdout


def test_bucket_for_checkpoints_is_tried_before_anything_is_started(root, gcs):
    assert_refused(
        launch(QUICKSTART, "checkpoint.directory=gs://absent-bucket/r"),
        "checkpoint.directory = gs://absent-bucket/r: there is no bucket absent-bucket",
    )
    assert_refused(
        launch(QUICKSTART, "checkpoint.directory=s3://bucket/r"), "must be a folder or gs://bucket/prefix"
    )
    assert not root.exists()


def test_two_runs_do_not_share_a_place_for_checkpoints(root, made, planned, gcs):
    place = "checkpoint.directory=gs://bucket/r"
    one = made(place)
    one.claim_checkpoints(one.plan())
    one.claim_checkpoints(one.plan())
    assert_refused(
        launch(QUICKSTART, place, "--name", "two"), "belongs to another run", '"run": "quickstart"'
    )
    assert not (root / "two" / "plan.json").exists()


def test_folder_that_is_no_run_is_refused_and_left_alone(root):
    (root / "quickstart").mkdir(parents=True)
    (root / "quickstart" / "thesis.txt").touch()
    assert_refused(launch(QUICKSTART), "is not empty and contains no run", "--name")
    assert [path.name for path in (root / "quickstart").iterdir()] == ["thesis.txt"]


def test_run_that_is_past_the_end_is_refused(made):
    (made().path / "checkpoints" / "90").mkdir(parents=True)
    assert_refused(launch(QUICKSTART, "train.epochs=2"), "is at step 90 already", "train.steps = 45")


def test_running_run_is_refused_and_keeps_its_plan(made):
    run = made()
    with run.locked():
        assert_refused(launch(QUICKSTART, "train.epochs=20"), "quickstart is running already", "launch stop")
    assert run.plan().steps == 90


def test_complete_run_is_shown_not_repeated(made):
    run = made()
    run.write_result(
        {
            "status": "completed", "step": 90, "epoch": 4.008, "attempts": 1, "wall_seconds": 61.0, "failure": None,
            "metrics": {"eval/accuracy": 0.975, "eval/count": 360, "eval/loss": 0.09},
        }
    )  # fmt: skip
    result = launch(QUICKSTART)
    assert result.exit_code == 0
    assert "run quickstart is complete; start another run with --name, or train longer" in result.stdout
    assert "completed   step 90 (epoch 4.008), 1 attempt, 1:01" in result.stdout
    assert "97.50% of 360 held-out images" in result.stdout
    assert f"tensorboard --logdir {run.path}/tensorboard" in result.stdout
    assert run.attempts.last() == 0


# Looking at runs


@pytest.mark.parametrize("command", [["status"], ["logs"], ["stop"], ["status", "r50"]])
def test_without_runs_there_is_nothing_to_look_at(root, command):
    assert_refused(launch(*command), "no runs in runs", "--root")
    assert not root.exists()


def test_without_runs_the_list_is_empty(root):
    assert launch("list").stdout == "no runs in runs\n"
    assert not root.exists()


# `launch tensorboard` becomes another program, so never within this process.
@pytest.mark.parametrize("name", [[], ["r50"]], ids=["all", "one"])
def test_without_runs_tensorboard_serves_no_empty_board(name):
    done = launch_process("tensorboard", *name)
    assert (done.returncode, done.stderr.split(";")[0]) == (2, "error: no runs in runs")


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_unknown_run_names_the_nearest(made, command):
    made()
    assert_refused(launch(command, "quikstart"), "no run 'quikstart' in runs", 'did you mean "quickstart"?')


@pytest.fixture
def failed(made) -> RunDirectory:
    """A run whose one attempt failed at step 30, with a checkpoint at 20."""
    run = made()
    assert run.attempts.begin({}) == 1
    run.hosts.log_file(1, 0).write_text("joined\nlost its peer\n")
    run.hosts.log_file(1, 1).write_text("joined\ncut")
    words = {
        "time": time.time(), "phase": "training", "step": 30, "epoch": 1.34, "train/loss": 1.5, "train/accuracy": 0.5,
        "speed/images_per_second": 640.0, "speed/data_wait_share": 0.02, "bound": "compute-bound",
        "data/ready_batches": 2, "data/get_p50_ms": 31.2, "data/get_p95_ms": 44.9, "data/get_p99_ms": 80.0,
        "data/hedges": 3, "data/hedges_won": 1, "data/retries": 7, "data/checksum_failures": 0,
    }  # fmt: skip
    run.hosts.write_report(0, words)
    (run.path / "checkpoints" / "20").mkdir(parents=True)
    failure = {"process": 1, "host": "here", "cause": "SIGKILL", "error": "joined", "step": 30}
    run.attempts.append(
        {
            "attempt": 1,
            "verdict": "failed",
            "from_step": 0,
            "reached_step": 30,
            "wall_seconds": 75.2,
            "failure": failure,
        }
    )
    run.write_result({"status": "failed"})
    return run


def test_status_tells_state_progress_and_attempts(failed):
    lines = launch("status").stdout.splitlines()
    assert lines[0] == "run         quickstart (failed)"
    assert lines[1] == "directory   runs/quickstart"
    assert lines[2] == (
        "progress    step 30/90  epoch 1.34/4.008  loss 1.5000  accuracy 50.00%  "
        "640 images/s  data wait 2% (compute-bound, 2 ready, GET p50/95/99 31/45/80 ms, hedges 3, won 1, "
        "7 retries)  ETA 0:06"
    )
    assert lines[4:] == [
        "checkpoints 20",
        "attempt 1   failed, steps 0 to 30 in 1:15",
        "            process 1 on here failed at step 30 (SIGKILL): joined",
    ]


def test_status_tells_running_from_interrupted(made):
    run = made()
    assert "quickstart (interrupted)" in launch("status").stdout
    with run.locked():
        assert "quickstart (running)" in launch("status").stdout


def test_logs_name_the_host_of_each_whole_line(failed):
    assert launch("logs").stdout == "[host 0] joined\n[host 0] lost its peer\n[host 1] joined\n"
    assert launch("logs", "--host", "1").stdout == "joined\n"
    assert launch("logs", "--follow", "--host", "1").stdout == "joined\n"  # ends, for nothing runs
    assert_refused(launch("logs", "--host", "2"), "--host 2", "hosts 0 to 1")


def test_logs_before_the_first_attempt_are_empty(made):
    made()
    assert launch("logs").exit_code == 0


def test_list_shows_the_last_launched_first(made, failed):
    os.utime(made(name="older").path / "plan.json", (1, 1))
    lines = [line.split() for line in launch("list").stdout.splitlines()]
    assert lines == [
        ["quickstart", "failed", "step", "30/90", "local-2x2"],
        ["older", "interrupted", "step", "0/90", "local-2x2"],
    ]


def test_stop_of_a_run_that_is_not_running_says_so(failed):
    result = launch("stop")
    assert (result.exit_code, result.stdout) == (0, "run quickstart is not running (failed)\n")
    assert not failed.stop_requested()


def test_stop_asks_a_running_run_and_waits_only_so_long(made):
    run = made()
    with run.locked():
        assert_refused(launch("stop", "--timeout", "0"), "has not stopped within 0 s", "launch status")
    assert run.stop_requested()


# The rest


def test_clusters_tells_the_kinds_and_the_default():
    result = launch("clusters")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "local",
        "local-P",
        "local-PxD",
        "slurm-NxG",
        "tpu-GEN-SIZE",
        "NAME",
        *named_clusters(),
        "default",
    ]
    assert "local-2x2: 2 × 2 cpu" in result.stdout


def test_list_of_tpus_says_what_the_size_in_a_name_counts():
    text = launch("clusters", "tpu").stdout
    row = next(line for line in text.splitlines() if line.startswith("tpu-v4-32 "))
    assert row.split()[1:7] == ["2x2x4", "16", "4", "32", "16", "tpu-ubuntu2204-base"]
    assert "the number of cores (two per chip) for v2, v3, v4, v5p,\n" in text


def test_schema_is_printed_or_written(tmp_path):
    assert json.loads(launch("schema").stdout) == json_schema()
    assert launch("schema", "schema.json").exit_code == 0
    assert (tmp_path / "schema.json").read_text() == launch("schema").stdout


def test_schema_that_cannot_be_written_is_told():
    assert_refused(launch("schema", "absent/schema.json"), "absent/schema.json")


def test_version():
    assert re.fullmatch(r"launch, version \d+\.\d+\.\d+\n", launch("--version").stdout)


# SLURM, where there is none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", QUICKSTART, "--requeue"], "--requeue only works in the batch script of a SLURM job"),
        (["run", QUICKSTART, "--detach"], "--detach: cluster local-2x2 has no queue"),
        (
            ["run", QUICKSTART, "--sbatch", "time=3"],
            "--sbatch time=3: needs --cluster",
        ),
        (["worker", QUICKSTART], "launch worker: neither in a SLURM step"),
        (["supervise", "/nowhere/run"], "run directory /nowhere/run is not visible on"),
    ],
)
def test_options_for_slurm_jobs_are_refused_outside_a_job(root, arguments, message):
    assert_refused(launch(*arguments), message)
    assert not root.exists()


def test_script_is_shown_by_a_dry_run_and_nothing_is_made(root):
    result = launch("--cluster", "slurm-4x0", QUICKSTART, "--dry-run", "--sbatch", "partition=debug")
    assert result.exit_code == 0
    assert "\nsbatch --parsable --job-name=quickstart " in result.stdout
    assert "\n#!/bin/bash\n" in result.stdout
    assert " --partition=debug " in result.stdout
    assert not root.exists()


def test_time_limit_below_the_time_to_save_is_refused(root):
    result = launch("--cluster", "slurm-4x0", QUICKSTART, "--sbatch", "time=5")
    assert_refused(result, 'time = 5 of cluster "slurm-4x0" is not above its save_minutes = 5')
    assert not root.exists()


def test_runs_that_cannot_be_read_are_listed_as_such_beside_the_others(made, root):
    for name in ("mine", "another-s", "old"):
        made(name=name)
    (root / "another-s" / "plan.json").chmod(0)
    (root / "old" / "plan.json").write_text("{}")
    # Root, as which the tests may run, is not asked for permission unless it gives that up.
    caps = "-dac_override,-dac_read_search"
    mortal = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}"] if os.geteuid() == 0 else []
    command = [*mortal, sys.executable, "-m", "podlaunch", "list", "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert re.search(
        r"unreadable +run directory .*another-s cannot be read: Permission denied", rows["another-s"]
    )
    assert re.search(r"unreadable +.*old/plan.json is not a plan of this podlaunch", rows["old"])
    assert "interrupted" in rows["mine"]
