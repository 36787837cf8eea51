"""RunConfig + ClusterSpec -> Plan: every figure of the run and every check that needs the machines. Pure.

What `launch plan` prints is what runs: a worker reads the plan and evaluates no config again.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from configs.architectures import num_parameters, parameter_shapes, share_of_device
from configs.clusters import SlurmCluster, TpuCluster, seconds
from configs.errors import UserError
from configs.schema import RunConfig, num_examples


@dataclass(frozen=True)
class ClusterSpec:
    """What a plan needs to know of a cluster: where the processes run, and what devices each has."""

    name: str
    backend: str
    """File of launcher/backends/ that starts the processes."""
    platform: str
    """jax platform of the devices: cpu, gpu or tpu."""
    hosts: int
    processes: int
    devices_per_process: int
    slices: int = 1
    """Groups of devices that a fast interconnect joins: TPU slices, nodes with GPUs, hosts with CPU devices."""
    submission: SlurmCluster | TpuCluster | None = None
    """What to request from the scheduler or the cloud; None where this machine starts the processes itself."""


@dataclass(frozen=True)
class Plan:
    """One run, resolved. plan.json is its serialised form."""

    name: str
    run_directory: str
    cluster: str
    backend: str
    platform: str
    hosts: int
    processes: int
    devices: int
    """Devices of all processes together."""
    devices_per_process: int
    mesh: dict[str, int]
    """Devices along `batch` and `model`."""
    global_batch: int
    per_device_batch: int
    """Images that each device of the batch axis gets at a step."""
    steps: int
    steps_per_epoch: float
    epochs: float
    parameters: int
    config_file: str
    config: dict[str, Any]
    """The RunConfig, with mesh.batch and train.steps resolved."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Commit, dirty flag and digest of the code, versions of the packages."""
    submission: dict[str, Any] | None = None
    """Settings of the SlurmCluster or TpuCluster to request; None where this machine starts the processes itself."""
    max_restarts: int = 3
    parameter_share: float = 1.0
    """Fraction of the parameters that each device holds: all of them unless the model axis splits them."""
    own_settings: list[str] = field(default_factory=list)
    """Names of settings that were used, and that a plan under gs:// leaves out: each machine has its own."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that `text` serialises. Raises ValueError or TypeError where `text` is no plan of this version."""
        return cls(**json.loads(text))

    def run_config(self) -> RunConfig:
        return RunConfig.model_validate(self.config)


def make_plan(
    config: RunConfig,
    cluster: ClusterSpec,
    *,
    name: str,
    root: str,
    config_file: Path,
    provenance: dict[str, Any],
    max_restarts: int = 3,
) -> Plan:
    """Resolve and cross-check. Raises UserError with one line a problem."""
    model = config.model
    shapes = list(
        parameter_shapes(model.name, num_classes=model.num_classes, width=model.width, stem=model.stem)
    )
    mesh = _mesh(config, cluster, shapes)
    num_train = num_examples(config.data)[0]
    batch = config.train.batch_size
    steps = config.train.steps or math.ceil(config.train.epochs * num_train / batch)
    run_directory = f"{root}/{name}" if root.startswith("gs://") else str(Path(root).absolute() / name)
    problems = [
        *_batch_problems(config, mesh),
        *_submission_problems(cluster),
        *_root_problems(root, cluster),
        *_length_problems(config, steps, num_train),
        *_place_problems(config, cluster),
    ]
    if problems:
        raise UserError("\n".join(problems))
    return Plan(
        name=name,
        run_directory=run_directory,
        cluster=cluster.name,
        backend=cluster.backend,
        platform=cluster.platform,
        hosts=cluster.hosts,
        processes=cluster.processes,
        devices=cluster.processes * cluster.devices_per_process,
        devices_per_process=cluster.devices_per_process,
        mesh=mesh,
        global_batch=batch,
        per_device_batch=batch // mesh["batch"],
        steps=steps,
        steps_per_epoch=num_train / batch,
        epochs=steps * batch / num_train,
        parameters=num_parameters(shapes),
        config_file=str(config_file),
        config=_resolved(config, mesh, steps, cluster, run_directory),
        provenance=provenance,
        submission=cluster.submission.model_dump(mode="json") if cluster.submission else None,
        max_restarts=max_restarts,
        parameter_share=share_of_device(shapes, mesh["model"]),
    )


def _resolved(
    config: RunConfig, mesh: dict[str, int], steps: int, cluster: ClusterSpec, run_directory: str
) -> dict[str, Any]:
    """The RunConfig with what was derived, and with places that mean the same on every host."""
    resolved = config.model_dump(mode="json")
    # The worker reads these two from the plan, so that no rounding is done twice.
    resolved["mesh"] = mesh
    resolved["train"]["steps"] = steps
    checkpoint, log = resolved["checkpoint"], resolved["log"]
    if cluster.backend == "tpu":
        # A worker's own run directory is on the disk of its VM, which is deleted with the slice.
        checkpoint["directory"] = checkpoint["directory"] or f"{run_directory}/checkpoints"
        log["tensorboard"] = log["tensorboard"] or f"{run_directory}/tensorboard"
    elif checkpoint["directory"] is not None and "://" not in checkpoint["directory"]:
        checkpoint["directory"] = str(Path(checkpoint["directory"]).absolute())
    return resolved


def _length_problems(config: RunConfig, steps: int, num_train: int) -> list[str]:
    batch, warmup_epochs = config.train.batch_size, config.schedule.warmup_epochs
    problems = []
    if batch > num_train:
        examples = f"the {num_train} training examples"
        problems.append(f"train.batch_size = {batch} is more than {examples}; lower it")
    # The trainer rounds the warm-up to whole steps.
    if round(warmup_epochs * num_train / batch) >= steps:
        problems.append(
            f"schedule.warmup_epochs = {warmup_epochs:g} is not below the run's {steps * batch / num_train:.3g} epochs "
            f"({steps} steps); shorten it or train longer"
        )
    return problems


def _place_problems(config: RunConfig, cluster: ClusterSpec) -> list[str]:
    checkpoints = config.checkpoint.directory
    places = {"checkpoint.directory": checkpoints, "log.tensorboard": config.log.tensorboard}
    problems = [
        f"{key} = {place}: the hosts of cluster {cluster.name} cannot access this machine's folders; choose a place "
        "under gs://, or leave it out"
        for key, place in places.items()
        if cluster.backend == "tpu" and place is not None and "://" not in place
    ]
    for split, path in relative_datasets(config).items():
        if cluster.backend == "tpu":
            problems.append(
                f"data.{split}.path = {path}: the hosts of cluster {cluster.name} cannot access this machine's folders; "
                f"give data.{split}.path=gs://…, or set once where your datasets are: `launch configure data=gs://bucket`"
            )
    if checkpoints is not None and "://" in checkpoints and not checkpoints.startswith("gs://"):
        where = f"checkpoint.directory = {checkpoints}"
        problems.append(f"{where}: must be a folder or gs://bucket/prefix")
    return problems


def relative_datasets(config: RunConfig) -> dict[str, str]:
    """Paths of datasets by split, where they are below the folder of whoever reads them."""
    if config.data.source != "records":
        return {}
    paths = {"train": config.data.train.path or "", "eval": config.data.eval.path or ""}
    return {split: path for split, path in paths.items() if "://" not in path and not path.startswith("/")}


def _root_problems(root: str, cluster: ClusterSpec) -> list[str]:
    if cluster.backend == "tpu" and not root.startswith("gs://"):
        return [
            f"--root {root}: the hosts of cluster {cluster.name} cannot access this machine's folders; give --root "
            "gs://bucket/prefix, or set it once: `launch configure root=gs://bucket/prefix`"
        ]
    if cluster.backend != "tpu" and root.startswith("gs://"):
        return [
            f"--root {root}: on cluster {cluster.name} a run directory is a folder; checkpoints and event files can "
            "go to a bucket, with checkpoint.directory=gs://… and log.tensorboard=gs://…"
        ]
    return []


def _submission_problems(cluster: ClusterSpec) -> list[str]:
    job = cluster.submission
    if not isinstance(job, SlurmCluster) or job.time is None or seconds(job.time) > 60 * job.save_minutes:
        return []
    return [
        f'time = {job.time} of cluster "{cluster.name}" is not above its save_minutes = {job.save_minutes:g}, '
        "so no time would be left to train before the run begins to save; raise time, or lower save_minutes"
    ]


def _mesh(config: RunConfig, cluster: ClusterSpec, shapes: list[tuple[int, ...]]) -> dict[str, int]:
    """Devices along both axes; `shapes`: of the parameters. Raises UserError where no such mesh can be laid."""
    batch, model = config.mesh.batch, config.mesh.model
    devices = cluster.processes * cluster.devices_per_process
    where = f'cluster "{cluster.name}" has {devices} ({cluster.processes} processes × {cluster.devices_per_process})'
    if batch != -1 and batch * model != devices:
        raise UserError(
            f"mesh.batch = {batch} × mesh.model = {model} needs {batch * model} devices; "
            f"{where}. Set mesh.batch=-1 to use all remaining devices, or choose another cluster"
        )
    # A model axis over two slices would send the activations of each layer through the slow network between them.
    per_slice = devices // cluster.slices
    sizes = [size for size in range(1, per_slice + 1) if per_slice % size == 0]
    allowed = [size for size in sizes if _splits_parameters(shapes, size)]
    if model not in allowed:
        if devices % model:
            problem = f"does not divide the devices: {where}"
        elif model not in sizes:
            problem = (
                f"does not fit into one of the {cluster.slices} slices or nodes: {where}, {per_slice} in each"
            )
        else:
            share = share_of_device(shapes, model)
            problem = f"divides few of {config.model.name}'s channels: each device would hold {share:.4g} of the parameters"
        raise UserError(f"mesh.model = {model} {problem}. Allowed: {', '.join(map(str, allowed))}")
    return {"batch": devices // model, "model": model}


def _splits_parameters(shapes: list[tuple[int, ...]], num_shards: int) -> bool:
    """Whether a model axis of `num_shards` devices saves at least half of what it could save at best."""
    return share_of_device(shapes, num_shards) <= (1 + 1 / num_shards) / 2


def _batch_problems(config: RunConfig, mesh: dict[str, int]) -> list[str]:
    batch, accumulate, shards = config.train.batch_size, config.train.accumulate, mesh["batch"]
    if batch % shards:
        below = batch // shards * shards
        nearest = f"{below} or {below + shards}" if below else shards
        message = f"train.batch_size = {batch} is not divisible by mesh.batch = {shards} devices"
        return [f"{message}; nearest: {nearest}"]
    per_device = batch // shards
    if per_device % accumulate:
        return [
            f"train.accumulate = {accumulate} does not divide the {per_device} images of a device "
            f"(train.batch_size = {batch} over {shards}); use a divisor of {per_device}"
        ]
    # A group of batch normalisation lies within the images that a device computes at once, or spans whole devices.
    group, micro = config.model.batch_norm, per_device // accumulate
    if isinstance(group, int) and micro % group and (group % micro or batch // accumulate % group):
        return [
            f"model.batch_norm = {group} neither divides the {micro} images of a device nor is a multiple of "
            f"them that divides the batch; use a divisor of {micro}, or global"
        ]
    return []


# Settings that may differ when a run is resumed: where the run runs, how often it saves and logs, how long it trains.
_FREE = {
    "mesh": None,
    "checkpoint": None,
    "log": None,
    "train": {"epochs", "steps", "eval_every_epochs"},
    "data": {
        "read_threads", "prefetch_batches", "memory_mib", "cache", "cache_gib", "on_bad_record", "max_bad_records",
    },
}  # fmt: skip


def differences(old: Plan, new: Plan) -> list[str]:
    """Settings of `new` that keep it from resuming the checkpoints of `old`, as `key: old, now new`."""
    changes = []
    # Validated anew, so that settings which the old plan did not have yet get today's defaults.
    old_config = old.run_config().model_dump(mode="json")
    # Data may move to another path: the checkpoint records the digest of the contents.
    old_config, new_config = _without_paths(old_config), _without_paths(new.config)
    for section, values in new_config.items():
        free = _FREE.get(section, set())
        if free is None:
            continue
        before = old_config.get(section, {})
        changes += [
            f"{section}.{key}: {before.get(key)}, now {value}"
            for key, value in values.items()
            if key not in free and before.get(key) != value
        ]
    return changes


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    data = config["data"]
    splits = {split: {**data[split], "path": None} for split in ("train", "eval")}
    return {**config, "data": {**data, **splits}}
