"""clusters.yaml is checked as a whole, and every problem is reported with its line."""

import math
from pathlib import Path

import pytest

from configs.clusters import SlurmCluster, TpuCluster, files, named_clusters, seconds
from configs.errors import UserError


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the clusters.yaml of an otherwise empty folder, and a user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))

    def write(text: str, own: str | None = None) -> None:
        for file, content in zip(files(), (text, own), strict=True):
            if content is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(content)

    return write


def test_without_files_there_are_no_names(write):
    assert named_clusters() == {}


def test_the_file_of_the_folder_goes_before_the_users_own(write):
    write("a: {nodes: 1}", "a: {nodes: 2}\nb: {nodes: 3}")
    assert {name: cluster.nodes for name, cluster in named_clusters().items()} == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{nodes: 0}", "a.nodes = 0: must be at least 1"),
        ("{}", "a.nodes is missing"),
        ("3", "a must be a mapping of settings, got a number"),
        ("{nodes: 1, partion: x}", 'a.partion: unknown key; did you mean "partition"? (a has: nodes, '),
        ("{nodes: 1, time: soon}", "a.time = soon: must be minutes, hours:minutes:seconds, days-hours"),
        ('{nodes: 1, partition: "x\\ny"}', 'a.partition = "x\\ny": must be one line of text'),
        ("{nodes: 1, sbatch: {nodes: 2}}", "a.sbatch = {nodes: 2}: nodes is set by podlaunch"),
        ("{nodes: 1, sbatch: {--exclusive: true}}", "'--exclusive' is not an option; write its long name"),
        ('{nodes: 1, sbatch: {comment: "x\\ny"}}', "must be one line of text"),
        ("{nodes: 1, environment: {A B: x}}", "'A B' is not a valid name of a variable"),
        ("{nodes: 1, environment: {A: 1}}", "a.environment.A = 1: must be text"),
        ("{nodes: 1, container: {imag: x}}", 'a.container.imag: unknown key; did you mean "image"?'),
        ("{nodes: 1, process_per: gpus}", 'a.process_per = gpus: allowed: node, gpu; did you mean "gpu"?'),
        ("{nodes: 1, process_per: gpu}", "a.process_per = gpu needs gpus_per_node above 0"),
        ("{nodes: 1, save_minutes: 0}", "a.save_minutes = 0: must be at least 0.5"),
        ("{nodes: 1, sbatch: {time: 5}}", "a.sbatch has a time; write it as a setting of the cluster"),
        ("{nodes: 1, nodes: 2}", "a.nodes is written twice"),
        ("{nodes: 1, setup: module load cuda}", "a.setup = module load cuda: must be a list"),
        ("{accelerator: v4-8, nodes: 1}", "a.nodes: unknown key"),
        ("{accelerator: v4-8, zon: x}", 'a.zon: unknown key; did you mean "zone"? (a has: accelerator, '),
        ("{accelerator: 4}", "a.accelerator = 4: must be text"),
        ("{accelerator: v4-8, provisioning: spt}", "allowed: on-demand, spot, reserved; did you mean"),
        ("{accelerator: v4-8, reservation: r}", "a.reservation needs provisioning = reserved"),
        ("{accelerator: v4-8, iap_group: g}", "a.iap_group needs reach = iap"),
        ("{accelerator: v4-8, external_ips: false}", "a.external_ips = false needs reach = internal or iap"),
        (
            "{accelerator: v4-8, labels: {Team: x}}",
            "Team: x is not a valid label; key and value have at most 63 lowercase letters",
        ),
        ("{accelerator: v4-8, labels: {team: a b}}", "team: a b is not a valid label"),
        ("{accelerator: v4-8, labels: {team: 1}}", "a.labels.team = 1: must be text"),
        ("{accelerator: v4-8, labels: {podlaunch-run: x}}", "podlaunch-run is set by podlaunch"),
        ("{accelerator: v4-8, secrets: [A=1]}", "'A=1' is not a valid name of a variable"),
        ("{accelerator: v4-8, valid_until_hours: 0}", "a.valid_until_hours = 0: must be above 0"),
        ("{accelerator: v4-8, zone: []}", "must be a zone, or a list of different zones"),
        ("{accelerator: v4-8, zone: [a-b, a-b]}", "must be a zone, or a list of different zones"),
        ("{accelerator: v4-8, zone: [a-b, 3]}", "must be a zone, or a list of different zones"),
        ("{accelerator: v4-8, zone: [a-b, a/b]}", "must be a name of lowercase letters, digits and dashes"),
        ("{accelerator: v4-8, zone: [a-b, b-b], tpu: mine}", "a.tpu needs a single zone"),
        (
            "{accelerator: v4-8, on_demand_after_hours: 1}",
            "a.on_demand_after_hours needs provisioning = spot",
        ),
        (
            "{accelerator: v4-8, provisioning: spot, on_demand_after_hours: 24}",
            "a.on_demand_after_hours must be below valid_until_hours",
        ),
        ("{accelerator: v4-8, secrets: [PYTHONPATH]}", "PYTHONPATH is set by podlaunch"),
        ("{accelerator: v4-8, idle_minutes: 1}", "a.idle_minutes = 1: must be at least 20"),
    ],
)
def test_mistakes_are_told_at_their_line(write, entry, message):
    write(f"\na: {entry}\n")
    with pytest.raises(UserError) as refused:
        named_clusters()
    assert message in str(refused.value)
    assert str(refused.value).startswith("configs/clusters.yaml:2: ")


def test_all_mistakes_of_all_entries_are_told_at_once(write):
    write("a: {nodes: 0}\nb: {nodes: 1, tim: 3}\n")
    with pytest.raises(UserError) as refused:
        named_clusters()
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("30", 1800), ("30:15", 1815), ("2:00:00", 7200), ("1-12", 129600), ("1-12:30", 131400),
        ("1-00:00:01", 86401), ("UNLIMITED", math.inf), ("infinite", math.inf),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(time, expected):
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["", "soon", "1:2:3:4", "-5", "1-", "n/a"])
def test_invalid_time_limits_are_refused(time):
    with pytest.raises(ValueError, match="not a time limit"):
        seconds(time)


def test_an_accelerator_makes_a_slice_of_tpus(write):
    write("a: {accelerator: v4-32, provisioning: reserved, tags: [x, y], secrets: [TOKEN]}\nb: {nodes: 1}")
    found = named_clusters()
    assert found["a"] == TpuCluster(
        accelerator="v4-32", provisioning="reserved", tags=("x", "y"), secrets=("TOKEN",)
    )
    assert found["b"] == SlurmCluster(nodes=1)


@pytest.mark.parametrize(("text", "zones"), [("a-b", ("a-b",)), ("[a-b, b-c]", ("a-b", "b-c")), ("null", ())])
def test_one_zone_or_several(write, text, zones):
    write(f"a: {{accelerator: v4-32, zone: {text}}}")
    found = named_clusters()["a"]
    assert isinstance(found, TpuCluster)
    assert found.zones == zones
    assert TpuCluster.model_validate(found.model_dump(mode="json")) == found


def test_a_wait_without_end_is_one_of_a_day():
    assert (
        TpuCluster.model_validate({"accelerator": "v4-8", "valid_until_hours": None}).valid_until_hours == 24
    )


@pytest.mark.parametrize("address", ["http://mirror/python", "python", "gs://", "https://a b"])
def test_interpreter_comes_from_an_address_that_is_safe_to_ask(write, address):
    write(f'a: {{accelerator: v4-8, interpreter: "{address}"}}')
    with pytest.raises(
        UserError, match=r"a.interpreter = .*: must be gs://bucket/prefix or https://host/folder"
    ):
        named_clusters()


@pytest.mark.parametrize("model", [SlurmCluster, TpuCluster])
def test_every_setting_explains_itself(model):
    assert [name for name, field in model.model_fields.items() if not field.description] == []
