"""A cluster name resolves to processes and devices, or to an error with the nearest name."""

import pytest
from click.testing import CliRunner

from configs.clusters import SlurmCluster, TpuCluster
from configs.errors import UserError
from launcher import clusters
from launcher.accelerators import GENERATIONS
from launcher.clusters import default_cluster, from_settings, from_slurm_task, resolve, slurm_spec
from launcher.commands.main import main
from launcher.machine.slurm import SlurmTask
from launcher.plan import ClusterSpec


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("name", "processes", "devices"),
    [("local", 1, 1), ("local-1", 1, 1), ("local-4", 4, 1), ("local-2x3", 2, 3), ("local-16x16", 16, 16)],
)
def test_local_clusters(name, processes, devices):
    assert resolve(name) == ClusterSpec(name, "local", "cpu", 1, processes, devices)


def test_default_without_accelerator_is_two_processes_of_two_devices():
    assert default_cluster() == resolve("local-2x2")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("locl", 'did you mean "local"?'),
        ("lcoal-4", 'did you mean "local-4"?'),
        ("local-2X2", 'did you mean "local-2x2"?'),
        ("local-", "did you mean"),
        ("local-2x", "did you mean"),
        ("local--2", "did you mean"),
        ("tpu-", 'did you mean "tpu-v4-32"?'),
        ("tpuv4-32", 'did you mean "tpu-v4-32"?'),
        ("local-" + "9" * 5000, "(there are: local, local-P, local-PxD, slurm-NxG, tpu-GEN-SIZE, NAME"),
        ("", "(there are: local, local-P, local-PxD, slurm-NxG, tpu-GEN-SIZE, NAME"),
    ],
)
def test_unknown_cluster_names_the_nearest_or_all(name, hint):
    with pytest.raises(UserError) as refused:
        resolve(name)
    assert str(refused.value).startswith(f"cluster = {name}: unknown")
    assert hint in str(refused.value)


@pytest.mark.parametrize("name", ["local-0", "local-2x0", "local-0x2", "local-257", "local-16x17"])
def test_no_processes_and_too_many_are_refused_with_what_is_allowed(name):
    with pytest.raises(UserError, match="allowed: 1 to 256"):
        resolve(name)


# SLURM

ALLOCATION = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "4"}


def test_slurm_by_nodes_and_gpus():
    spec = resolve("slurm-4x8")
    assert (spec.backend, spec.platform, spec.hosts, spec.processes, spec.devices_per_process) == (
        "slurm", "gpu", 4, 4, 8,
    )  # fmt: skip
    assert spec.submission == SlurmCluster(nodes=4, gpus_per_node=8)


def test_slurm_without_gpus_has_a_cpu_device_a_node():
    spec = resolve("slurm-3x0")
    assert (spec.platform, spec.processes, spec.devices_per_process) == ("cpu", 3, 1)


def test_a_process_a_gpu():
    spec = slurm_spec("x", SlurmCluster(nodes=2, gpus_per_node=4, process_per="gpu"))
    assert (spec.hosts, spec.processes, spec.devices_per_process) == (2, 8, 1)


def test_options_of_sbatch_come_over_what_the_cluster_has():
    spec = resolve("slurm-2x1", ("partition=debug", "exclusive", "time=2:00:00"))
    assert spec.submission.sbatch == {"partition": "debug", "exclusive": True}
    assert spec.submission.time == "2:00:00"


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("slurm-2x1", "nodes=3", "--sbatch nodes=3: nodes is set by podlaunch"),
        ("slurm-2x1", "p=debug=1 x", None),
        ("slurm-2x1", "Partition=x", "'Partition' is not an option"),
        ("slurm-2x1", "time=soon", "must be minutes"),
        ("local-2", "time=3", "cluster local-2 is not a SLURM cluster"),
        ("slurm-0x1", "time=3", "0 nodes; allowed: at least 1"),
    ],
)
def test_invalid_sbatch_options_are_refused(name, option, message):
    if message is None:  # sbatch decides on what only it knows
        assert resolve(name, (option,)).submission.sbatch == {"p": "debug=1 x"}
        return
    with pytest.raises(UserError, match=message):
        resolve(name, (option,))


@pytest.mark.parametrize(
    ("variables", "name", "processes", "devices"),
    [
        ({}, "slurm-4x0", 4, 1),
        ({"SLURM_GPUS_ON_NODE": "8"}, "slurm-4x8", 4, 8),
        ({"SLURM_GPUS_PER_NODE": "a100:8"}, "slurm-4x8", 4, 8),
        ({"SLURM_GPUS_PER_NODE": "a100"}, "slurm-4x1", 4, 1),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"}, "slurm-4x8", 32, 1),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}, "slurm-4x8", 4, 8),
    ],
)
def test_in_an_allocation_the_default_is_all_of_it(monkeypatch, variables, name, processes, devices):
    for key, value in (ALLOCATION | variables).items():
        monkeypatch.setenv(key, value)
    spec = default_cluster()
    assert (spec.name, spec.processes, spec.devices_per_process) == (name, processes, devices)
    assert spec.submission is None


def test_a_login_to_a_node_of_a_job_is_no_allocation(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert default_cluster() == resolve("local-2x2")


def test_one_of_several_tasks_does_not_launch_them_all(monkeypatch):
    for key, value in (ALLOCATION | {"SLURM_STEP_NUM_TASKS": "4"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"each task would start a run.*`srun … launch worker CONFIG`"):
        default_cluster()


def test_a_step_is_taken_as_it_is(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    spec = from_slurm_task(SlurmTask(0, 4, 0, "n1", ("n1", "n2"), "12.0", 0))
    assert (spec.name, spec.hosts, spec.processes, spec.devices_per_process) == ("slurm-2x8", 2, 4, 4)


# Settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("provisioning=spot", "os_login=true"), {"provisioning": "spot", "os_login": True}),
        (("tags=[a, b]", "valid_until_hours=12"), {"tags": ("a", "b"), "valid_until_hours": 12.0}),
        (("labels={team: x}", "zone=x", "zone=null"), {"labels": {"team": "x"}, "zone": None}),
        (("accelerator=v4-8",), {"accelerator": "v4-8"}),
    ],
)
def test_settings_come_over_what_the_cluster_has(settings, expected):
    assert resolve("tpu-v4-32", (), settings).submission == TpuCluster(**{"accelerator": "v4-32", **expected})


def test_settings_of_slurm_are_read_as_in_the_file():
    spec = resolve("slurm-2x1", ("time=5",), ("nodes=3", "time=2:00:00", "partition=debug"))
    assert spec.hosts == 3
    assert spec.submission == SlurmCluster(nodes=3, gpus_per_node=1, time="5", partition="debug")


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("tpu-v4-32", "provisionin=spot", "--set provisionin=spot: tpu-v4-32.provisionin: unknown key; did you "),
        ("tpu-v4-32", "provisioning=spt", "--set provisioning=spt: tpu-v4-32.provisioning = spt: allowed: on-"),
        ("tpu-v4-32", "reservation=r", "--set reservation=r: tpu-v4-32.reservation needs provisioning = "),
        ("tpu-v4-32", "tags=a", "--set tags=a: tpu-v4-32.tags = a: must be a list"),
        ("tpu-v4-32", "zone", "--set zone: a setting is key=value; keys: accelerator, project, "),
        ("slurm-2x1", "time=soon", "--set time=soon: slurm-2x1.time = soon: must be minutes, "),
        ("slurm-2x1", "zone=x", "--set zone=x: slurm-2x1.zone: unknown key"),
        ("local-2", "zone=x", "--set zone=x: cluster local-2 has no settings; see `launch clusters`"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(name, setting, message):
    with pytest.raises(UserError) as refused:
        resolve(name, (), (setting,))
    assert str(refused.value).startswith(message)


# Cloud TPU


@pytest.mark.parametrize(
    ("name", "hosts", "devices", "slices"),
    [("tpu-v4-32", 4, 4, 1), ("tpu-v3-8", 1, 8, 1), ("tpu-v5e-8", 1, 8, 1), ("tpu-v4-2x2x4x2", 8, 4, 2)],
)
def test_a_slice_has_a_process_a_vm(name, hosts, devices, slices):
    cluster = TpuCluster(accelerator=name.removeprefix("tpu-"))
    assert resolve(name) == ClusterSpec(name, "tpu", "tpu", hosts, hosts, devices, slices, cluster)


def test_a_rehearsal_on_cpus_has_the_same_devices():
    spec = resolve("tpu-v3-32", (), ("platform=cpu",))
    assert (spec.platform, spec.processes, spec.devices_per_process) == ("cpu", 4, 8)


def test_a_name_of_the_file_goes_before_what_it_would_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "clusters.yaml").write_text("tpu-dev: {accelerator: v5e-4}\nb: {nodes: 1}\n")
    assert resolve("tpu-dev") == from_settings("tpu-dev", TpuCluster(accelerator="v5e-4"))
    assert resolve("b") == from_settings("b", SlurmCluster(nodes=1))


def test_sbatch_is_for_slurm_alone():
    with pytest.raises(UserError, match="--sbatch time=3: cluster tpu-v4-8 is not a SLURM cluster"):
        resolve("tpu-v4-8", ("time=3",))


def test_invalid_tpu_sizes_are_refused():
    with pytest.raises(UserError, match="cluster = tpu-v4-40: no such size; nearest: tpu-v4-32, tpu-v4-64"):
        resolve("tpu-v4-40")


# launch clusters


def test_launch_clusters_tpu_lists_every_slice_in_110_columns():
    listed = CliRunner().invoke(main, ["clusters", "tpu"])
    lines = listed.stdout.splitlines()
    assert listed.exit_code == 0
    assert max(map(len, lines)) <= 110
    names = [line.split()[0] for line in lines if line.startswith("tpu-")]
    assert len(names) == sum(len(g.sizes) for g in GENERATIONS.values())
    assert [resolve(name).name for name in names] == names
    words = ["tpu-v4-32", "2x2x4", "16", "4", "32", "16", "tpu-ubuntu2204-base"]
    assert words in [line.split() for line in lines]


def test_launch_clusters_names_the_slices_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "clusters.yaml").write_text("mine: {accelerator: v4-32}\n")
    assert "mine         4 × 4 tpu on 4 VMs\n" in CliRunner().invoke(main, ["clusters"]).stdout


def test_launch_clusters_of_another_kind_is_refused():
    refused = CliRunner().invoke(main, ["clusters", "nonsense"])
    assert refused.exit_code == 2
    assert refused.stderr == "error: clusters nonsense: allowed: tpu, or nothing\n"


@pytest.mark.parametrize("has_cuda", [True, False])
def test_local_is_all_gpus_of_this_machine_where_jax_has_cuda(monkeypatch, has_cuda):
    monkeypatch.setattr(clusters, "num_nvidia_gpus", lambda: 8)
    monkeypatch.setattr(clusters, "has_cuda_plugin", lambda: has_cuda)
    if has_cuda:
        assert resolve("local") == default_cluster() == ClusterSpec("local", "local", "gpu", 1, 1, 8)
    else:
        with pytest.raises(
            UserError,
            match=r"this machine has 8 NVIDIA GPUs, but jax is installed without CUDA: pip install 'podlaunch\[cuda1[23]]'",
        ):
            resolve("local")
