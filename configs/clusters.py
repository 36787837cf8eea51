"""clusters.yaml: the SLURM clusters and TPU slices that `--cluster` knows by name, and the settings of each.

Each setting's docstring is its row in docs/slurm.md or docs/tpu.md. Checks that need SLURM or Google belong to
the backends.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from configs.errors import UserError
from configs.load import load_entries
from configs.schema import NonNegative, Positive, PositiveFloat, Section, from_list

Names = TypeVar("Names", dict[str, str], tuple[str, ...])
# Options that podlaunch sets itself, or that would divert the output and signals that it relies on.
OURS = {
    "array", "chdir", "clusters", "error", "gpus", "gpus-per-node", "gpus-per-task", "input", "job-name",
    "kill-on-bad-exit", "label", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "pty",
    "signal", "test-only", "wait", "wrap",
}  # fmt: skip
# "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes" and
# "days-hours:minutes:seconds" (https://slurm.schedmd.com/sbatch.html#OPT_time).
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def seconds(time: str) -> float:
    """Seconds of a time limit in SLURM's notation, infinite for UNLIMITED. Raises ValueError for any other text."""
    if time.lower() in ("unlimited", "infinite"):
        return float("inf")
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"{time!r} is not a time limit")
    days, *rest = match.groups()
    # SLURM reads numbers from the left: hours first after a day or where there are three, otherwise minutes.
    numbers = [int(n) for n in rest if n is not None]
    units = [3600, 60, 1] if days is not None or len(numbers) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))


def _time(value: str) -> str:
    try:
        seconds(value)
    except ValueError:
        raise ValueError("must be minutes, hours:minutes:seconds, days-hours or days-hours:minutes") from None
    return value


def _one_line(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("must be one line of text, not empty")
    return value


def _options(options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    # The options become lines of a batch script, which a line break in a value could extend.
    for key, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", key):
            raise ValueError(
                f"{key!r} is not an option; write its long name without leading dashes, such as reservation"
            )
        if key in OURS:
            raise ValueError(f"{key} is set by podlaunch; remove it")
        if isinstance(value, str):
            _one_line(value)
    return options


def _variables(variables: Names) -> Names:
    # The names are written into shell scripts unquoted, so nothing but a shell's own names may pass.
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is not a valid name of a variable")
    return variables


def _secrets(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in _variables(names):
        if name == "PYTHONPATH" or name.startswith("LAUNCH_"):
            raise ValueError(f"{name} is set by podlaunch; leave it out")
    return names


def _labels(labels: dict[str, str]) -> dict[str, str]:
    # Google's rules for labels: https://cloud.google.com/compute/docs/labeling-resources#requirements
    for key, value in labels.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) or not re.fullmatch(r"[a-z0-9_-]{0,63}", value):
            raise ValueError(
                f"{key}: {value} is not a valid label; key and value have at most 63 lowercase letters, digits, - and _, "
                "and the key begins with a letter"
            )
        # `launch gc` finds what podlaunch created, and its run, by labels with this prefix.
        if key.startswith("podlaunch"):
            raise ValueError(f"{key} is set by podlaunch; choose another key")
    return labels


def _address(value: str) -> str:
    if not re.fullmatch(r"(gs|https)://[^/\s]+(/\S*)?", value):
        raise ValueError("must be gs://bucket/prefix or https://host/folder")
    return value.rstrip("/")


Text = Annotated[str, AfterValidator(_one_line)]
# YAML reads `time: 30` as a number, and strict mode would refuse it.
Time = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v), AfterValidator(_time)]
Options = Annotated[dict[str, str | int | bool], AfterValidator(_options)]
Variables = Annotated[dict[str, str], AfterValidator(_variables)]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
Texts = Annotated[tuple[Text, ...], from_list]


# Plans of earlier launches may have null, which meant to wait without end.
Hours = Annotated[float, Field(gt=0, le=8760), BeforeValidator(lambda v: 24.0 if v is None else v)]


class ContainerConfig(Section):
    """A container for the workers, started by pyxis (https://github.com/NVIDIA/pyxis)."""

    image: Text
    """Image, as `srun --container-image` takes it."""
    mounts: Texts = ()
    """Mounts, each as `srun --container-mounts` takes it. The run directory is mounted automatically."""


class SlurmCluster(Section):
    """Settings of runs on a SLURM cluster; one cluster may have several entries."""

    nodes: Positive
    """Number of nodes of a run."""
    gpus_per_node: NonNegative = 0
    """GPUs of each node; 0 trains on CPUs."""
    process_per: Literal["node", "gpu"] = "node"
    """`node`: one process owns all GPUs of its node; `gpu`: each process owns one."""
    partition: Text | None = None
    """Partition, or several with commas; null: the site's default, as for the following settings."""
    account: Text | None = None
    """Account to charge."""
    qos: Text | None = None
    """Quality of service."""
    time: Time | None = None
    """Time limit of one job, in SLURM's notation; the run continues in the next job."""
    constraint: Text | None = None
    """Features that the nodes must have."""
    gres: Text | None = None
    """Generic resources of each node. A value that names GPUs, such as `gpu:a100:8`, replaces `--gpus-per-node`."""
    cpus_per_task: Positive | None = None
    """CPUs of each process."""
    memory_gib_per_task: PositiveFloat | None = None
    """Memory of each process, in GiB."""
    sbatch: Options = Field(default_factory=dict)
    """Other options of sbatch, by long name; true for an option without a value."""
    srun: Options = Field(default_factory=dict)
    """Other options of srun, in the same form."""
    setup: Annotated[tuple[str, ...], from_list] = ()
    """Shell lines that the job runs first, such as `module load cuda`."""
    environment: Variables = Field(default_factory=dict)
    """Variables that the job exports. The job's script contains their values: export secrets before `launch`
    instead."""
    python: Text | None = None
    """Python with podlaunch on the nodes; null: the Python that runs `launch`. With a `container`: the workers'
    Python in its image; null: `python3`."""
    container: ContainerConfig | None = None
    """`image` and a list of `mounts` for the workers. The job's launcher runs outside the container."""
    interface: Text | None = None
    """Network interface for the processes and NCCL, such as `ib0`; null: the interface that leads to the other
    nodes."""
    save_minutes: Annotated[float, Field(ge=0.5, le=600)] = 5.0
    """Minutes before the time limit at which the run begins to save. SLURM may signal up to one minute early."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.process_per == "gpu" and not self.gpus_per_node:
            raise ValueError("process_per = gpu needs gpus_per_node above 0")
        if "time" in self.sbatch:
            raise ValueError("sbatch has a time; write it as a setting of the cluster")
        return self

    @property
    def tasks_per_node(self) -> int:
        """Processes of a run on each node."""
        return self.gpus_per_node if self.process_per == "gpu" else 1


def _name(value: str) -> str:
    # Names become parts of REST paths; `:` and `.` occur in the ids of domain-scoped projects (example.com:name).
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.:-]{0,61}[a-z0-9])?", value):
        raise ValueError("must be a name of lowercase letters, digits and dashes")
    return value


def _zones(value: Any) -> Any:
    zones = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []
    if not zones or len({*map(str, zones)}) < len(zones) or not all(isinstance(zone, str) for zone in zones):
        raise ValueError("must be a zone, or a list of different zones")
    for zone in zones:
        _name(zone)
    return value if isinstance(value, str) else tuple(zones)


Name = Annotated[str, AfterValidator(_name)]


# A machine executes the first, reads the second and sends the values of the third, so they are its user's alone: no
# run directory that others can write to is asked for them.
OWN_SETTINGS = ("ssh_options", "ssh_key", "secrets")


class TpuCluster(Section):
    """Settings of runs on one or more Cloud TPU slices."""

    accelerator: Text
    """Generation and size, such as `v4-32` in the cluster `tpu-v4-32`; `launch clusters tpu` lists all."""
    project: Name | None = None
    """Google Cloud project; null: the project of the credentials or of gcloud."""
    zone: Annotated[str | tuple[str, ...], BeforeValidator(_zones)] | None = None
    """Zone, such as `us-central2-b`, or a list of zones: the first that grants the request wins; null: gcloud's
    zone."""
    tpu: Name | None = None
    """Name of an existing TPU, which podlaunch neither creates nor deletes."""
    provisioning: Literal["on-demand", "spot", "reserved"] = "on-demand"
    """How the chips are paid for; `spot` is cheaper and can be preempted at any time."""
    reservation: Text | None = None
    """Name of the reservation to use; null: any reservation, if `provisioning` is `reserved`."""
    runtime: Text | None = None
    """Software version of the VMs; null: the version for this generation."""
    network: Text | None = None
    """VPC network; null: the project's default."""
    subnetwork: Text | None = None
    """Subnetwork; null: the network's subnetwork in this region."""
    external_ips: bool = True
    """Give each VM an external address. Without external addresses, the subnetwork needs Private Google Access."""
    tags: Texts = ()
    """Network tags of the VMs, to which firewall rules apply."""
    service_account: Text | None = None
    """Service account of the VMs; null: Compute Engine's default account."""
    labels: Labels = Field(default_factory=dict)
    """Labels of the created resources, for billing. podlaunch adds its own."""
    valid_until_hours: Hours = 24.0
    """Hours to wait for the chips, over all requests of one wait."""
    on_demand_after_hours: PositiveFloat | None = None
    """With `provisioning: spot`: hours of waiting after which on-demand chips are requested; null: never."""
    idle_minutes: Annotated[float, Field(ge=20)] | None = 60.0
    """Minutes without a worker or launcher after which the TPUs delete themselves; null: never, as with `keep`."""
    reach: Literal["external", "internal", "iap"] = "external"
    """How ssh reaches the VMs: by their external addresses, by their internal addresses, or through the tunnel
    of Identity-Aware Proxy."""
    iap_group: Text | None = None
    """Destination group of the tunnel; required for `reach: iap`."""
    ssh_user: Text | None = None
    """User name on the VMs; null: your local user name. With `os_login`, set the one of your OS Login profile."""
    ssh_key: Text | None = None
    """File of the private key; null: `~/.ssh/google_compute_engine`, created if it is missing."""
    os_login: bool = False
    """The project manages keys by OS Login; false: podlaunch adds your public key to the VMs' metadata."""
    ssh_options: Texts = ()
    """Options of ssh, each as `ssh -o` takes it."""
    python: Text | None = None
    """Python with podlaunch's packages on the VMs; null: podlaunch builds one there from the lock file."""
    interpreter: Annotated[Text, AfterValidator(_address)] | None = None
    """Folder, under gs:// or https://, from which the VMs get the Python of that environment; null: GitHub."""
    environment: Variables = Field(default_factory=dict)
    """Variables of the workers. The plan contains their values: use `secrets` for secrets."""
    secrets: Annotated[tuple[str, ...], AfterValidator(_secrets), from_list] = ()
    """Names of variables that the workers get from the environment of `launch`. Their values are never
    stored."""
    keep: bool = False
    """After the run, keep the TPUs that podlaunch created."""
    contact_seconds: PositiveFloat = 120.0
    """Seconds to wait for a VM to answer; a new VM needs time to start."""
    platform: Literal["tpu", "cpu"] = "tpu"
    """`cpu`: rehearse on CPU devices instead of TPU chips."""
    min_disk_gib: PositiveFloat = 5.0
    """Free disk that each VM must have, in GiB."""
    max_code_mib: PositiveFloat = 100.0
    """Largest size of the code that podlaunch copies to the VMs, in MiB."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.reservation and self.provisioning != "reserved":
            raise ValueError("reservation needs provisioning = reserved")
        if self.on_demand_after_hours is not None:
            if self.provisioning != "spot":
                raise ValueError("on_demand_after_hours needs provisioning = spot")
            if self.on_demand_after_hours >= self.valid_until_hours:
                raise ValueError("on_demand_after_hours must be below valid_until_hours")
        if self.tpu and len(self.zones) > 1:
            raise ValueError("tpu needs a single zone")
        if self.iap_group and self.reach != "iap":
            raise ValueError("iap_group needs reach = iap")
        if self.reach == "iap" and not self.iap_group:
            raise ValueError("reach = iap needs iap_group")
        if self.reach == "external" and not self.external_ips:
            raise ValueError("external_ips = false needs reach = internal or iap")
        return self

    @property
    def zones(self) -> tuple[str, ...]:
        """The zones, in the user's order; empty where gcloud's zone is meant."""
        return (self.zone,) if isinstance(self.zone, str) else self.zone or ()


def files() -> list[Path]:
    """Files that define named clusters; for a name in both, the first file wins."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path("configs/clusters.yaml"), home / "podlaunch" / "clusters.yaml"]


def named_clusters() -> dict[str, SlurmCluster | TpuCluster]:
    """All named clusters. Raises UserError with every problem in the first file that has one."""
    found: dict[str, SlurmCluster | TpuCluster] = {}
    for file in files():
        if not file.is_file():
            continue
        for name, cluster in load_entries(file, _kind).items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise UserError(
                    f"{file}: {name!r}: a cluster's name has letters, digits, dots, dashes and underscores"
                )
            found.setdefault(name, cluster)
    return found


def _kind(settings: dict[str, Any]) -> type[SlurmCluster | TpuCluster]:
    """The kind of a cluster: one with an `accelerator` is a TPU cluster."""
    return TpuCluster if "accelerator" in settings else SlurmCluster
