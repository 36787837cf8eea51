"""Cloud TPU: the slice of a run is created, reached by ssh, replaced when it is taken away, and deleted at the end.

On each VM an agent runs the worker and outlives the connection to it. All that a launcher needs lies in the run
directory under gs://, so any machine can take over the run.
"""

import contextlib
import dataclasses
import getpass
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from configs.clusters import TpuCluster
from configs.errors import UserError
from configs.google import UnreachableError
from launcher import costs
from launcher.accelerators import parse_tpu
from launcher.gang import State, recorded_state
from launcher.host.agent import FOLDER
from launcher.host.process import host_program
from launcher.plan import Plan
from launcher.providers import OWNER, Provider, Request, Resource
from launcher.providers.cloud_tpu import CloudTpu, project_and_zone
from launcher.remote import shipping
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.gang import RemoteGang
from launcher.remote.hosts import Hosts
from launcher.remote.prepare import check_secrets
from launcher.remote.ssh import HostError, connected, public_key
from launcher.rundir import RunDirectory, run_id

REMOTE = True
POLL_SECONDS = 5.0
# A worker reports every half minute at the latest, so this one is gone.
SILENT_SECONDS = 120.0
BAD_VM_FAILURES = 2
# Conditions in which a slice has to be created, after what may be left of it is deleted.
_GONE = ("absent", "lost", "deleting")


# What is requested


def resolve(plan: Plan) -> Plan:
    """The plan with this machine's defaults filled in, so that another machine can resume it."""
    cluster = _cluster(plan)
    project, zone = project_and_zone(cluster.project, cluster.zone)
    user = cluster.ssh_user or (None if cluster.os_login else getpass.getuser())
    resolved = cluster.model_copy(update={"project": project, "zone": zone, "ssh_user": user})
    # The hosts have a Python of their own, which preflight compares among them.
    provenance = {key: value for key, value in plan.provenance.items() if key not in ("python", "packages")}
    provenance["code"] = shipping.CodeArchive(shipping.pack(cluster.max_code_mib)).provenance
    return dataclasses.replace(plan, submission=resolved.model_dump(mode="json"), provenance=provenance)


def render(plan: Plan) -> str:
    cluster = _cluster(plan)
    if cluster.tpu:
        first = f"# the TPU {cluster.tpu}, as it is"
    else:
        request = dataclasses.asdict(_request(plan, "KEY"))
        lines = [f"#   {key}: {value}" for key, value in request.items() if value not in (None, {}, ())]
        first = "\n".join(["# one queued resource", *lines])
    folder = f"{FOLDER}/{run_id(plan.run_directory)}"
    python = cluster.python or f"{FOLDER}/environments/LOCK/bin/python"
    agent = shlex.join(host_program("agent", "start", folder, python=python))
    return f"{first}\n# on each of its {plan.hosts} VMs, by ssh, with the code in {folder}/code\n{agent}"


def check(plan: Plan) -> None:
    if not shutil.which("ssh"):
        raise UserError("ssh is not installed on this machine; install the OpenSSH client")
    check_secrets(_cluster(plan))


def quote(plan: Plan, run: RunDirectory) -> str | None:
    cluster, name = _cluster(plan), _name(plan)
    place = f"in zone {cluster.zone} of project {cluster.project}"
    condition = _provider(plan).condition(name)
    if cluster.tpu:
        if condition.status not in ("ready", "repairing"):
            raise UserError(
                f"--tpu {cluster.tpu}: {place} it is {condition}; name one that is READY, or leave --tpu out to have "
                "one created"
            )
        return None
    if condition.status != "absent" and condition.owner != run_id(plan.run_directory):
        problem = f"the name {name} is taken {place}, by a TPU that is not this run's"
        raise UserError(f"{problem}; choose another --name, or delete it")
    if condition.status in _GONE:
        return _describe_request(plan)
    old = run.plan()
    existing = old.submission["accelerator"] if old and old.submission else cluster.accelerator
    if existing != cluster.accelerator:
        raise UserError(
            f"{name} is a tpu-{existing}, from an earlier launch of this run; launch with --cluster tpu-{existing}, or delete it with "
            f"`launch gc --delete {name}`"
        )
    return None


def _describe_request(plan: Plan) -> str:
    """What would be created, and its price."""
    cluster, config = _cluster(plan), plan.run_config()
    tpu, slices = parse_tpu(cluster.accelerator)
    estimate = costs.estimate(
        config.model,
        image_size=config.data.image_size,
        num_images=plan.steps * plan.global_batch,
        tpu=tpu,
        num_slices=slices,
        price=costs.price(tpu.generation.name, cluster.provisioning),
    )
    many = f"{slices} × " if slices > 1 else ""
    return (
        f"{many}{tpu.accelerator_type} ({tpu.topology}), {plan.hosts} VMs, {cluster.provisioning}, in "
        f"{cluster.zone} of project {cluster.project}, as {_name(plan)}\n            {costs.describe(estimate)}"
    )


def acquire(plan: Plan, run: RunDirectory) -> None:
    cluster, name = _cluster(plan), _name(plan)
    packed = shipping.pack(cluster.max_code_mib)
    if cluster.python is None and not shipping.CodeArchive(packed).has_environment:
        raise UserError(
            f"the code in {shipping.HOME} has no {shipping.LOCK} from which to build a Python environment on the VMs: launch from a "
            "checkout, or set the cluster's python to one that has podlaunch's packages"
        )
    provider = _provider(plan)
    status = provider.condition(name).status
    if status in ("lost", "deleting"):
        provider.delete(name)
    is_new = status in _GONE
    try:
        if is_new:
            try:
                provider.create(_request(plan, _key(cluster)))
            except UserError:
                is_new = False  # the request was refused, so there is nothing to delete
                raise
        run.write_code(packed)
    except BaseException:  # Ctrl-C, too: what was created a moment ago costs money
        if is_new:
            with contextlib.suppress(UnreachableError):
                provider.delete(name)
        raise


def release(plan: Plan, run: RunDirectory) -> str:
    cluster, name = _cluster(plan), _name(plan)
    if cluster.tpu:
        return f"left as it was: {name}"
    if cluster.keep:
        return f"kept        {name}: it costs money until `launch gc --delete {name}`"
    try:
        _provider(plan).delete(name)
    except (UserError, UnreachableError) as e:
        return f"not deleted {name}: {e}; it costs money until `launch gc --delete {name}`"
    return f"deleted     {name}"


def shell(plan: Plan, run: RunDirectory, host: int, command: tuple[str, ...]) -> int:
    provider, cluster, name = _provider(plan), _cluster(plan), _name(plan)
    machines = provider.machines(name)
    if not machines:
        raise UserError(f"run {run.name} has no hosts now; see `launch status {run.name}`")
    if key := _key(cluster):
        provider.authorize(name, key)
    with connected(cluster, machines) as ssh:
        try:
            return subprocess.run(ssh.command(host, *command, terminal=sys.stdin.isatty())).returncode
        except HostError as e:
            raise UserError(f"host {host}: {e}") from None


def _request(plan: Plan, key: str | None) -> Request:
    cluster = _cluster(plan)
    tpu, slices = parse_tpu(cluster.accelerator)
    # A size such as 4x8 of v5e is requested by its topology, v4-32 by its name.
    is_topology = "x" in cluster.accelerator and tpu.topology in cluster.accelerator
    return Request(
        name=_name(plan),
        accelerator_type=tpu.accelerator_type,
        generation=tpu.generation.api_type,
        topology=tpu.topology if is_topology else None,
        runtime=cluster.runtime or tpu.generation.runtime,
        slices=slices,
        provisioning=cluster.provisioning,
        reservation=cluster.reservation,
        network=cluster.network or "default",
        subnetwork=cluster.subnetwork,
        external_ips=cluster.external_ips,
        service_account=cluster.service_account,
        labels={
            **cluster.labels,
            OWNER: run_id(plan.run_directory),
            "podlaunch-run": _slug(plan.name),
            "podlaunch-owner": _slug(getpass.getuser()),
            "podlaunch-generation": tpu.generation.name,
            "podlaunch-chips": str(tpu.chips * slices),
            "podlaunch-provisioning": cluster.provisioning,
        },
        tags=cluster.tags,
        metadata={"ssh-keys": key} if key else {"enable-oslogin": "TRUE"},
        description=plan.run_directory,
        valid_until_hours=cluster.valid_until_hours,
    )


def _key(cluster: TpuCluster) -> str | None:
    return None if cluster.os_login else f"{cluster.ssh_user}:{public_key(cluster)}"


def _cluster(plan: Plan) -> TpuCluster:
    return TpuCluster.model_validate(plan.submission)


def _provider(plan: Plan) -> Provider:
    cluster = _cluster(plan)
    assert cluster.project is not None
    assert cluster.zone is not None
    return CloudTpu(cluster.project, cluster.zone)


def _name(plan: Plan) -> str:
    """Name of the run's TPU. It has the run's id, since two users may have runs of the same name."""
    short = _slug(plan.name)[:32].strip("-")
    return _cluster(plan).tpu or f"podlaunch-{short}-{run_id(plan.run_directory)[:6]}"


def _slug(text: str) -> str:
    """`text` as Google's labels and names take it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63]


# What exists


def state(run: RunDirectory) -> State:
    plan = run.plan()
    if run.is_running():
        report = run.hosts.report(0)
        return State("queued", report["phase"]) if report.get("queued") else State("running")
    if plan is None or plan.submission is None or run.result() is not None:
        return recorded_state(run)
    try:
        condition = _provider(plan).condition(_name(plan))
    except (UserError, UnreachableError) as e:
        return State("unknown", f"no launcher supervises it; {e}")
    if condition.status == "absent" or (_cluster(plan).tpu and not _has_agents(run)):
        return recorded_state(run)
    status = "running" if condition.status == "ready" and _has_agents(run) else "queued"
    detail = f"{_name(plan)} is {condition.status}, and no launcher looks after it"
    return State(status, f"{detail}; `launch attach {run.name}`")


def _has_agents(run: RunDirectory) -> bool:
    return bool(run.attempts.info(run.attempts.last()).get("agents"))


def leftovers(project: str | None) -> list[Resource]:
    """All resources of a project that podlaunch created and that still exist."""
    return CloudTpu(project_and_zone(project, "-")[0], "-").list_labelled(OWNER)


def describe(resource: Resource) -> str:
    """State, age and owner of a resource, and its cost since it was created."""
    labels, hours = resource.labels, (datetime.now(UTC) - resource.created).total_seconds() / 3600
    cost = f"{hours:.1f} h old"
    if resource.condition.status in ("ready", "repairing") and "podlaunch-chips" in labels:
        price = costs.price(labels["podlaunch-generation"], labels["podlaunch-provisioning"])
        cost = costs.cost_so_far(int(labels["podlaunch-chips"]), hours, price)
    return f"{resource.condition.status}, {cost}, owner {labels.get('podlaunch-owner', 'unknown')}"


def may_be_deleted(resource: Resource) -> bool:
    """Whether a resource is this user's, and its run is over: no launcher holds the run, and no worker reports."""
    if resource.labels.get("podlaunch-owner") != _slug(getpass.getuser()):
        return False
    try:
        run = RunDirectory(resource.description)
        silent = time.time() - run.hosts.report(0).get("time", 0.0)
        return not run.is_running() and (run.result() is not None or silent > SILENT_SECONDS)
    except (UserError, UnreachableError):
        return False


def delete(project: str | None, resource: Resource) -> None:
    CloudTpu(project_and_zone(project, resource.zone)[0], resource.zone).delete(resource.name)


# Attempts


def job_info() -> dict[str, Any]:
    return {"job": None, "restart_count": None}


def can_restart(plan: Plan, run: RunDirectory) -> bool:
    """True; a slice with a VM that failed twice is deleted first, so that the restart creates another."""
    failures = [a["failure"] for a in run.attempts.of_launch() if a["failure"]]
    counts = Counter(f["host"] for f in failures if f["cause"] in ("lost", "not started"))
    if failures and counts[failures[-1]["host"]] >= BAD_VM_FAILURES and not _cluster(plan).tpu:
        with contextlib.suppress(UnreachableError, UserError):  # otherwise the restart tries the same slice
            _provider(plan).delete(_name(plan))
    return True


def start(plan: Plan, run: RunDirectory, attempt: int) -> RemoteGang:
    return _gang(plan, run, attempt, adopted=False)


def adopt(plan: Plan, run: RunDirectory, attempt: int) -> RemoteGang | None:
    if _has_agents(run) and _provider(plan).condition(_name(plan)).status == "ready":
        return _gang(plan, run, attempt, adopted=True)
    return None


def _gang(plan: Plan, run: RunDirectory, attempt: int, *, adopted: bool) -> RemoteGang:
    cluster = _cluster(plan)
    key = _key(cluster)
    request = None if cluster.tpu else lambda: _request(plan, key)
    hosts = Hosts(_provider(plan), _name(plan), request, key)
    return RemoteGang(RemoteAttempt(plan, run, attempt), hosts, adopted=adopted)
