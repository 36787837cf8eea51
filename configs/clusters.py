"""clusters.yaml: the SLURM clusters and TPU slices that `--cluster` knows by name, and the settings of each."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from configs.errors import UserError
from configs.load import load_entries
from configs.schema import NonNegative, Positive, PositiveFloat, Section, from_list

Names = TypeVar("Names", dict[str, str], tuple[str, ...])
# What the run itself decides, or what would take its output and signals away.
OURS = {
    "array", "chdir", "clusters", "error", "gpus", "gpus-per-node", "gpus-per-task", "input", "job-name",
    "kill-on-bad-exit", "label", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "pty",
    "signal", "test-only", "wait", "wrap",
}  # fmt: skip
# "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes" and
# "days-hours:minutes:seconds" (https://slurm.schedmd.com/sbatch.html#OPT_time).
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def seconds(time: str) -> float:
    """Seconds of a time limit as SLURM writes it, infinite for UNLIMITED. Raises ValueError."""
    if time.lower() in ("unlimited", "infinite"):
        return float("inf")
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"{time!r} is no time")
    days, *rest = match.groups()
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
    for key, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", key):
            raise ValueError(f"{key!r} is no option; write its long name without dashes, such as reservation")
        if key in OURS:
            raise ValueError(f"{key} is decided by podlaunch; remove it")
        if isinstance(value, str):
            _one_line(value)
    return options


def _variables(variables: Names) -> Names:
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is no name of a variable")
    return variables


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) or not re.fullmatch(r"[a-z0-9_-]{0,63}", value):
            raise ValueError(
                f"{key}: {value} is no label; both have lowercase letters, digits, - and _, at most 63, "
                "and the first begins with a letter"
            )
        if key.startswith("podlaunch"):
            raise ValueError(f"{key} is set by podlaunch; choose another key")
    return labels


Text = Annotated[str, AfterValidator(_one_line)]
# YAML reads `time: 30` as a number.
Time = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v), AfterValidator(_time)]
Options = Annotated[dict[str, str | int | bool], AfterValidator(_options)]
Variables = Annotated[dict[str, str], AfterValidator(_variables)]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
Texts = Annotated[tuple[Text, ...], from_list]


class ContainerConfig(Section):
    """A container for the workers, started by pyxis (https://github.com/NVIDIA/pyxis)."""

    image: Text
    """What `srun --container-image` takes."""
    mounts: Texts = ()
    """What `srun --container-mounts` takes, each one. The run directory is mounted by itself."""


class SlurmCluster(Section):
    """One SLURM cluster, or a way of using it."""

    nodes: Positive
    """Nodes of a run."""
    gpus_per_node: NonNegative = 0
    """GPUs of each node; 0 trains on CPUs."""
    process_per: Literal["node", "gpu"] = "node"
    """`node`: one process owns all GPUs of its node; `gpu`: each process owns one."""
    partition: Text | None = None
    """Partition, or several with commas; null: the site's default, as for what follows."""
    account: Text | None = None
    """Account that is charged."""
    qos: Text | None = None
    """Quality of service."""
    time: Time | None = None
    """Time limit of one job; the run goes on in the next."""
    constraint: Text | None = None
    """Features that the nodes must have."""
    gres: Text | None = None
    """Generic resources of each node. One that names GPUs, such as `gpu:a100:8`, replaces `--gpus-per-node`."""
    cpus_per_task: Positive | None = None
    """CPUs of each process."""
    memory_gib_per_task: PositiveFloat | None = None
    """Memory of each process, in GiB."""
    sbatch: Options = Field(default_factory=dict)
    """Any other option of sbatch, by its long name; true for one without a value."""
    srun: Options = Field(default_factory=dict)
    """Any other option of srun."""
    setup: Annotated[tuple[str, ...], from_list] = ()
    """Shell lines that the job runs first, such as `module load cuda`."""
    environment: Variables = Field(default_factory=dict)
    """Variables that the job exports. They stand in its script: secrets do not belong here, export them before
    `launch`."""
    python: Text | None = None
    """Python with podlaunch on the nodes; null: the one that `launch` runs on. With a `container`, the one in it."""
    container: ContainerConfig | None = None
    """`image`, and a list of `mounts`, for the workers. What watches them stays outside."""
    interface: Text | None = None
    """Network interface on which processes and NCCL meet, such as `ib0`; null: the one that leads to the other
    nodes."""
    save_minutes: Annotated[float, Field(ge=0.5, le=600)] = 5.0
    """Minutes before the time limit at which the run begins to save. SLURM may be up to one minute early."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.process_per == "gpu" and not self.gpus_per_node:
            raise ValueError("process_per = gpu needs gpus_per_node above 0")
        if "time" in self.sbatch:
            raise ValueError("sbatch has a time; write it as a setting of the cluster")
        return self

    @property
    def tasks_per_node(self) -> int:
        return self.gpus_per_node if self.process_per == "gpu" else 1


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.:-]{0,61}[a-z0-9])?", value):
        raise ValueError("must be a name of small letters, digits and dashes")
    return value


Name = Annotated[str, AfterValidator(_name)]


class TpuCluster(Section):
    """A slice of Cloud TPUs, or several, or a way of using them."""

    accelerator: Text
    """What follows `tpu-` in the name of a cluster, such as `v4-32`; `launch clusters tpu` lists all."""
    project: Name | None = None
    """Google Cloud project; null: the one of the credentials, or of gcloud."""
    zone: Name | None = None
    """Zone, such as `us-central2-b`; null: the one of gcloud."""
    tpu: Name | None = None
    """Name of a TPU that exists; nothing is created or deleted then."""
    provisioning: Literal["on-demand", "spot", "reserved"] = "on-demand"
    """How the chips are paid for; `spot` is cheaper, and may be taken away at any time."""
    reservation: Text | None = None
    """Name of the reservation to take from; null: any, where `provisioning` is `reserved`."""
    runtime: Text | None = None
    """Software version of the VMs; null: the one for this generation."""
    network: Text | None = None
    """VPC network; null: the project's default."""
    subnetwork: Text | None = None
    """Subnetwork; null: the network's own in this region."""
    external_ips: bool = True
    """Give each VM an external address. Without one the subnetwork needs Private Google Access."""
    tags: Texts = ()
    """Network tags of the VMs, to which firewall rules apply."""
    service_account: Text | None = None
    """Account as which the VMs act; null: the default one of Compute Engine."""
    labels: Labels = Field(default_factory=dict)
    """Labels of what is created, for bills. podlaunch adds its own."""
    valid_until_hours: PositiveFloat | None = None
    """Hours to wait in the queue for chips; null: without end."""
    reach: Literal["external", "internal", "iap"] = "external"
    """How SSH gets to the VMs: by their external addresses, by their internal ones, or through the tunnel of
    Identity-Aware Proxy."""
    iap_group: Text | None = None
    """Destination group of the tunnel, which `reach: iap` needs."""
    ssh_user: Text | None = None
    """User on the VMs; null: the one here. With `os_login`, the one of your profile."""
    ssh_key: Text | None = None
    """File of the private key; null: `~/.ssh/google_compute_engine`, made if absent."""
    os_login: bool = False
    """The project manages keys by OS Login; false: the key is put into the VMs' metadata."""
    ssh_options: Texts = ()
    """Options of SSH, each as `ssh -o` takes it."""
    python: Text | None = None
    """Python with podlaunch's packages on the VMs; null: one is made there from the lock file."""
    environment: Variables = Field(default_factory=dict)
    """Variables of the workers. They are written down with the plan: secrets do not belong here."""
    secrets: Annotated[tuple[str, ...], AfterValidator(_variables), from_list] = ()
    """Names of variables that the workers get from the environment of `launch`. Their values are never written
    down."""
    keep: bool = False
    """Do not delete what was created when the run has ended."""
    contact_seconds: PositiveFloat = 120.0
    """Seconds after which a VM that does not answer is given up; one that has just been created takes its time."""
    platform: Literal["tpu", "cpu"] = "tpu"
    """`cpu`: rehearse on CPU devices in the place of chips."""
    min_disk_gib: PositiveFloat = 5.0
    """Free disk in GiB without which a VM is not used."""
    max_code_mib: PositiveFloat = 100.0
    """Size in MiB above which the code is not shipped."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.reservation and self.provisioning != "reserved":
            raise ValueError("reservation needs provisioning = reserved")
        if self.iap_group and self.reach != "iap":
            raise ValueError("iap_group needs reach = iap")
        if self.reach == "iap" and not self.iap_group:
            raise ValueError("reach = iap needs iap_group")
        if self.reach == "external" and not self.external_ips:
            raise ValueError("external_ips = false needs reach = internal or iap")
        return self


def files() -> list[Path]:
    """Where named clusters are looked up, the first first."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path("configs/clusters.yaml"), home / "podlaunch" / "clusters.yaml"]


def named_clusters() -> dict[str, SlurmCluster | TpuCluster]:
    """All named clusters. Raises UserError with every problem of their files."""
    found: dict[str, SlurmCluster | TpuCluster] = {}
    for file in files():
        if not file.is_file():
            continue
        for name, cluster in load_entries(file, _kind).items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise UserError(f"{file}: {name!r}: a cluster's name has letters, digits, dots and dashes")
            found.setdefault(name, cluster)
    return found


def _kind(settings: dict[str, Any]) -> type[SlurmCluster | TpuCluster]:
    """What has an accelerator is a slice of TPUs."""
    return TpuCluster if "accelerator" in settings else SlurmCluster
