"""The submitted batch script, executed by a real shell; tests/clusters runs whole jobs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.clusters import SlurmCluster
from configs.load import load
from launcher import clusters
from launcher.backends import slurm, slurm_commands, srun
from launcher.plan import Plan, make_plan

RECORDED = Path(__file__).with_name("slurm")
SPECS = {
    "bare": {"nodes": 4, "gpus_per_node": 8},
    "cpus": {"nodes": 2, "cpus_per_task": 8, "time": "30", "save_minutes": 2.0},
    "full": {
        "nodes": 16, "gpus_per_node": 4, "process_per": "gpu", "partition": "a100,h100", "account": "vision",
        "qos": "high", "time": "1-12:00:00", "constraint": "nvlink&ib", "cpus_per_task": 16,
        "memory_gib_per_task": 62.5, "gres": "nvme:1", "interface": "ib0", "python": "/opt/podlaunch/bin/python",
        "sbatch": {"exclusive": True, "comment": "it's $HOME", "reservation": "may", "requeue": False},
        "srun": {"cpu-freq": "high"}, "setup": ["module purge", "module load cuda/12.4 nccl"],
        "environment": {"NCCL_DEBUG": "WARN", "GREETING": "it's $HOME; `id`"},
    },
    "container": {
        "nodes": 2, "gpus_per_node": 8, "gres": "gpu:a100:8", "save_minutes": 7.5,
        "container": {"image": "registry.example/podlaunch:1", "mounts": ["/data:/data:ro"]},
    },
}  # fmt: skip


@pytest.fixture
def submitted(quickstart: Path) -> Callable[..., Plan]:
    """The plan of the quickstart for a SLURM cluster."""

    def submitted(root: str = "/home/me/runs", **settings: object) -> Plan:
        cluster = SlurmCluster.model_validate(settings)
        batch = cluster.nodes * max(cluster.gpus_per_node, 1)
        return make_plan(
            load(quickstart, [f"train.batch_size={16 * batch}"]),
            clusters.slurm_spec("some", cluster),
            name="quickstart",
            root=root,
            config_file=quickstart,
            provenance={},
        )

    return submitted


@pytest.mark.parametrize("name", SPECS)
def test_script_is_the_recorded_one(submitted, name):
    rendered = slurm.render(submitted(**SPECS[name])).replace(sys.executable, "PYTHON")
    recorded = RECORDED / f"{name}.sbatch"
    assert rendered == recorded.read_text(), (
        "a difference that is meant: python -m tests.launcher.backends.test_slurm"
    )


ODD = [
    "with space",
    "it's",
    'a"b',
    "$HOME",
    "a;b&c|d",
    "`touch canary`",
    "$(touch canary)",
    "new\nline",
    "-rf",
    "#x",
    "grün",
]


@pytest.mark.parametrize("odd", ODD)
def test_run_directory_and_variables_survive_a_real_shell(submitted, tmp_path, odd):
    arguments_file = tmp_path / "arguments"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$ODD" "$@" > {arguments_file}\n')
    python.chmod(0o755)
    plan = submitted(root=f"/runs/{odd}", nodes=1, python=str(python), environment={"ODD": odd})
    subprocess.run(["bash", "-c", slurm.script(plan)], check=True, cwd=tmp_path)
    variable, *arguments = arguments_file.read_text().split("\0")
    assert variable == odd
    assert arguments[-2] == f"/runs/{odd}/quickstart"
    assert not (tmp_path / "canary").exists()


def test_srun_starts_a_process_a_gpu_or_a_node(submitted, monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)

    def counts(**settings):
        command = srun.srun_command(submitted(**settings), attempt=1)
        return [word for word in command if word.startswith(("--nodes", "--ntasks"))]

    assert counts(nodes=2, gpus_per_node=8) == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    per_gpu = counts(nodes=2, gpus_per_node=8, process_per="gpu")
    assert per_gpu == ["--nodes=2", "--ntasks=16", "--ntasks-per-node=8"]


def test_srun_repeats_options_that_it_does_not_inherit_from_sbatch(submitted, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert "--cpus-per-task=8" in srun.srun_command(submitted(nodes=2), attempt=1)


def test_workers_in_a_container_run_on_its_python_and_see_the_run_directory(submitted):
    command = srun.srun_command(submitted(**SPECS["container"]), attempt=3)
    assert "--container-image=registry.example/podlaunch:1" in command
    assert "--container-mounts=/home/me/runs/quickstart:/home/me/runs/quickstart,/data:/data:ro" in command
    assert command[-7:] == ["python3", "-P", "-m", "podlaunch.host", "task", "/home/me/runs/quickstart", "3"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("Killed", -9),
        ("Exited with exit code 3", 3),
        ("Exited with exit code 137", -9),
        ("Aborted (core dumped)", -6),
        ("Terminated", -15),
        ("?", 1),
    ],
)
def test_messages_of_srun_are_read_as_exit_codes(words, code):
    assert srun._code(words) == code


CANCELLED = {"JobState": "COMPLETING", "Restarts": "0", "PreemptTime": "None", "RunTime": "00:01:00",
             "TimeLimit": "1:00:00", "Reason": "None"}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "restarts", "by"),
    [
        ({}, 0, "stopped"),
        ({"JobState": "RUNNING"}, 0, "preempted"),  # signalled before the time limit
        ({"PreemptTime": "2026-11-24T13:26:51"}, 0, "preempted"),
        ({"Restarts": "1"}, 0, "preempted"),  # requeued by SLURM
        ({"Restarts": "1"}, 1, "stopped"),
        ({"RunTime": "01:00:02"}, 0, "preempted"),
        ({"Reason": "NodeDown"}, 0, "preempted"),
    ],
)
def test_only_a_job_that_is_cancelled_is_stopped_by_the_user(fields, restarts, by):
    assert slurm_commands.stopped_by(CANCELLED | fields, {"SLURM_RESTART_COUNT": str(restarts)}) == by


def test_job_of_unknown_state_counts_as_preempted():
    assert slurm_commands.stopped_by({}, {}) == "preempted"


def test_options_that_are_zero_are_passed_on(submitted):
    assert "--mem=0" in slurm.sbatch_command(submitted(nodes=2, sbatch={"mem": 0}))


def test_without_squeue_the_state_of_a_job_is_unknown_not_interrupted(submitted, tmp_path, monkeypatch):
    from launcher.rundir import RunDirectory

    monkeypatch.setenv("PATH", "/nowhere")
    plan = submitted(root=str(tmp_path), nodes=2)
    run = RunDirectory(Path(plan.run_directory))
    run.write_plan(plan)
    run.begin_launch("12")
    assert str(slurm.state(run)) == "unknown: job 12; there is no squeue on this machine"
    run.write_result({"status": "stopped"})
    assert slurm.state(run).status == "stopped"


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("12\n", "12"),
        ("12;alpha\n", "12"),
        ("Welcome! 3 jobs are yours\n2026\n12\nThis will cost 7 credits\n", "12"),
        ("Submitted.\n", None),
        ("", None),
    ],
)
def test_id_of_a_job_is_found_in_what_a_wrapped_sbatch_prints(printed, job):
    assert slurm_commands.submitted_id(printed) == job


def test_nodes_to_exclude_are_added_to_those_of_the_user(submitted):
    plan = submitted(nodes=2, sbatch={"exclude": "n1"})
    assert "--exclude=n7,n8,n1" in slurm.sbatch_command(plan, ["n7", "n8"])


if __name__ == "__main__":
    import configs

    recipe = Path(configs.__file__).with_name("quickstart.yaml")
    make = submitted.__wrapped__(recipe)  # type: ignore[attr-defined]
    for name, spec in SPECS.items():
        script = slurm.render(make(**spec)).replace(sys.executable, "PYTHON")
        (RECORDED / f"{name}.sbatch").write_text(script)
