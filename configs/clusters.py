"""clusters.yaml: the SLURM clusters that `--cluster` knows by name, and what `slurm-NxG` stands for."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from configs.errors import UserError
from configs.load import load_entries
from configs.schema import NonNegative, Positive, PositiveFloat, Section, from_list

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


def _variables(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is no name of a variable")
    return variables


Text = Annotated[str, AfterValidator(_one_line)]
# YAML reads `time: 30` as a number.
Time = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v), AfterValidator(_time)]
Options = Annotated[dict[str, str | int | bool], AfterValidator(_options)]
Variables = Annotated[dict[str, str], AfterValidator(_variables)]


class ContainerConfig(Section):
    """A container for the workers, started by pyxis (https://github.com/NVIDIA/pyxis)."""

    image: Text
    """What `srun --container-image` takes."""
    mounts: Annotated[tuple[Text, ...], from_list] = ()
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


def files() -> list[Path]:
    """Where named clusters are looked up, the first first."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path("configs/clusters.yaml"), home / "podlaunch" / "clusters.yaml"]


def named() -> dict[str, SlurmCluster]:
    """All named clusters. Raises UserError with every problem of their files."""
    found: dict[str, SlurmCluster] = {}
    for file in files():
        if not file.is_file():
            continue
        for name, cluster in load_entries(file, SlurmCluster).items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise UserError(f"{file}: {name!r}: a cluster's name has letters, digits, dots and dashes")
            found.setdefault(name, cluster)
    return found
