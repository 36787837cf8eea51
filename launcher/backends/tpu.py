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
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

from configs.clusters import TpuCluster
from configs.errors import UserError
from configs.google import UnreachableError
from launcher import costs
from launcher.accelerators import parse_tpu
from launcher.gang import Released, State, recorded_state
from launcher.host.agent import FOLDER
from launcher.host.process import host_program
from launcher.plan import Plan
from launcher.providers import OWNER, Provisioning, Request, Resource
from launcher.providers.cloud_tpu import CloudTpu, project_and_zone
from launcher.remote import shipping
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.gang import RemoteGang
from launcher.remote.hosts import Hosts
from launcher.remote.prepare import check_secrets
from launcher.remote.rental import GONE, Rental, delete_for_long
from launcher.remote.rental import describe as describe_rented
from launcher.remote.ssh import HostError, connected, public_key
from launcher.rundir import RunDirectory, run_id
from launcher.supervise import has_completed

REMOTE = True
POLL_SECONDS = 5.0
# A worker reports every half minute at the latest, so this one is gone.
SILENT_SECONDS = 120.0
BAD_VM_FAILURES = 2


# What is requested


def resolve(plan: Plan) -> Plan:
    """The plan with this machine's defaults filled in, so that another machine can resume it."""
    cluster = _cluster(plan)
    project, default = project_and_zone(cluster.project, "".join(cluster.zones[:1]) or None)
    user = cluster.ssh_user or (None if cluster.os_login else getpass.getuser())
    resolved = cluster.model_copy(
        update={"project": project, "zone": cluster.zone or default, "ssh_user": user}
    )
    # The hosts have a Python of their own, which preflight compares among them.
    provenance = {key: value for key, value in plan.provenance.items() if key not in ("python", "packages")}
    provenance["code"] = _code(cluster.max_code_mib)[1].provenance
    return dataclasses.replace(plan, submission=resolved.model_dump(mode="json"), provenance=provenance)


@cache
def _code(max_code_mib: float) -> tuple[bytes, shipping.CodeArchive]:
    """The code for the hosts, packed once: what the plan names is what is sent."""
    packed = shipping.pack(max_code_mib)
    return packed, shipping.CodeArchive(packed)


def render(plan: Plan) -> str:
    cluster = _cluster(plan)
    if cluster.tpu:
        first = f"# the TPU {cluster.tpu}, as it is"
    else:
        asked = _request(plan, "KEY", cluster.provisioning, cluster.valid_until_hours)
        request = dataclasses.asdict(asked) | {
            "startup_script": shipping.STARTUP if asked.startup_script else None
        }
        lines = [f"#   {key}: {value}" for key, value in request.items() if value not in (None, {}, ())]
        first = "\n".join([f"# one queued resource in {' and in '.join(cluster.zones)}", *lines])
    folder = f"{FOLDER}/{run_id(plan.run_directory)}"
    python = cluster.python or f"{FOLDER}/environments/LOCK/bin/python"
    agent = shlex.join(host_program("agent", "start", folder, python=python))
    return f"{first}\n# on each of its {plan.hosts} VMs, by ssh, with the code in {folder}/code\n{agent}"


def check(plan: Plan) -> None:
    if not shutil.which("ssh"):
        raise UserError("ssh is not installed on this machine; install the OpenSSH client")
    cluster = _cluster(plan)
    check_secrets(cluster)
    if not (cluster.tpu or shipping.startup_script()) and _idle_minutes(cluster) is not None:
        raise UserError(
            f"the code in {shipping.HOME} has no {shipping.STARTUP}, by which abandoned TPUs delete themselves: launch from a checkout, "
            "or set idle_minutes=null"
        )


def quote(plan: Plan, run: RunDirectory) -> str | None:
    cluster, rental = _cluster(plan), _rental(plan, run)
    place, conditions = _place(cluster), rental.conditions()
    if cluster.tpu:
        condition = rental.condition()
        if condition.status not in ("ready", "repairing"):
            raise UserError(
                f"--tpu {cluster.tpu}: {place} it is {condition}; name one that is READY, or leave --tpu out to have "
                "one created"
            )
        return None
    existing = [condition for condition in conditions.values() if condition.status != "absent"]
    if any(condition.owner != run_id(plan.run_directory) for condition in existing):
        problem = f"the name {rental.name} is taken {place}, by a TPU that is not this run's"
        raise UserError(f"{problem}; choose another --name, or delete it")
    if all(condition.status in GONE for condition in existing):
        return f"{_described(plan)}, as {rental.name}\n            {estimate(plan)}"
    _check_accelerator(plan, run)
    return None


def _check_accelerator(plan: Plan, run: RunDirectory) -> None:
    """Raises UserError where an earlier launch of the run has left another kind of TPU."""
    name, accelerator = _name(plan), _cluster(plan).accelerator
    old = run.plan()
    existing = old.submission["accelerator"] if old and old.submission else accelerator
    if existing != accelerator:
        raise UserError(
            f"{name} is a tpu-{existing}, from an earlier launch of this run; launch with --cluster tpu-{existing}, or delete it with "
            f"`launch gc --delete {name}`"
        )


def _place(cluster: TpuCluster) -> str:
    zones = f"zone {cluster.zones[0]}" if len(cluster.zones) == 1 else f"zones {', '.join(cluster.zones)}"
    return f"in {zones} of project {cluster.project}"


def _described(plan: Plan) -> str:
    """What would be created, and where."""
    cluster = _cluster(plan)
    tpu, slices = parse_tpu(cluster.accelerator)
    many = f"{slices} × " if slices > 1 else ""
    where = " or ".join(cluster.zones) + (", whichever grants it first," if len(cluster.zones) > 1 else "")
    return (
        f"{many}{tpu.accelerator_type} ({tpu.topology}), {plan.hosts} VMs, {cluster.provisioning}, in "
        f"{where} of project {cluster.project}"
    )


def estimate(plan: Plan) -> str:
    """Of an hour, and of the whole run, at each provisioning that the user allows."""
    cluster, config = _cluster(plan), plan.run_config()
    tpu, slices = parse_tpu(cluster.accelerator)

    def priced(provisioning: str) -> costs.Estimate:
        return costs.estimate(
            config.model,
            image_size=config.data.image_size,
            num_images=plan.steps * plan.global_batch,
            tpu=tpu,
            num_slices=slices,
            price=costs.price(tpu.generation.name, provisioning),
        )

    text = costs.describe(priced(cluster.provisioning))
    if (hours := cluster.on_demand_after_hours) is not None:
        on_demand = costs.describe_hourly(priced("on-demand"))
        text += f"\n            on demand, if spot is not granted within {hours:g} h: {on_demand}"
    return text


def acquire(plan: Plan, run: RunDirectory) -> None:
    cluster, rental = _cluster(plan), _rental(plan, run)
    packed, code = _code(cluster.max_code_mib)
    if cluster.python is None and not code.has_environment:
        raise UserError(
            f"the code in {shipping.HOME} has no {shipping.LOCK} from which to build a Python environment on the VMs: launch from a "
            "checkout, or set the cluster's python to one that has podlaunch's packages"
        )
    # Before the request, since a launcher that comes after this one needs it.
    run.write_code(packed)
    rental.withdraw_elsewhere()
    if cluster.tpu:
        return
    request = _request(plan, _key(cluster), cluster.provisioning, cluster.valid_until_hours)
    conditions = rental.conditions()
    existing = [zone for zone, condition in conditions.items() if condition.status not in GONE]
    for zone in existing:
        if (known := rental.requested(zone)) is None:
            rental.record(zone, request)
        elif known.kept:
            rental.take_back(known)
    if not existing:
        run.resources.write_waiting_since(None)  # the user's limit begins anew
        _request_everywhere(rental, request)


def _request_everywhere(rental: Rental, request: Request) -> None:
    """Request in all zones. Where this fails, also by Ctrl-C, nothing is left, or the message says what is."""
    try:
        for zone in rental.zones:
            rental.withdraw(zone)  # what may be left of an earlier slice
            rental.request(zone, request)
    except BaseException as e:
        for zone in rental.zones:
            with contextlib.suppress(UserError, UnreachableError):
                if rental.requested(zone):
                    rental.withdraw(zone)
        if left := rental.run.resources.left_behind():
            raise UserError(
                f"{e or type(e).__name__}; {describe_rented(left)} may have been created, and could not be deleted: it costs money until "
                f"`launch attach {rental.run.name}`"
            ) from None
        raise


def release(
    plan: Plan, run: RunDirectory, announce: Callable[[str], None], give_up: threading.Event
) -> Released:
    cluster, rental = _cluster(plan), _rental(plan, run)
    kept = rental.keep() if cluster.keep and not cluster.tpu else []
    if left := rental.release(announce, give_up):
        again = f"`launch attach {run.name}` tries again"
        return Released(
            f"not deleted {describe_rented(left)}: IT STILL COSTS MONEY; {again}", costs_money=True
        )
    if cluster.tpu:
        return Released(f"left as it was: {rental.name}")
    if kept:
        until = f"it costs money until `launch gc --delete {rental.name}`"
        return Released(f"kept        {describe_rented(kept)}: {until}")
    return Released(f"deleted     {rental.name}")


def shell(plan: Plan, run: RunDirectory, host: int, command: tuple[str, ...]) -> int:
    rental, cluster = _rental(plan, run), _cluster(plan)
    provider, name = rental.provider(), rental.name
    machines = provider.machines(name)
    if not machines:
        raise UserError(f"run {run.name} has no hosts now; see `launch status {run.name}`")
    if key := _key(cluster):
        provider.authorize(name, key)
    with connected(cluster.model_copy(update={"zone": rental.zone}), machines) as ssh:
        try:
            return subprocess.run(ssh.command(host, *command, terminal=sys.stdin.isatty())).returncode
        except HostError as e:
            raise UserError(f"host {host}: {e}") from None


def _request(plan: Plan, key: str | None, provisioning: Provisioning, hours: float) -> Request:
    """`hours`: how long the request may wait."""
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
        provisioning=provisioning,
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
            "podlaunch-provisioning": provisioning,
        },
        tags=cluster.tags,
        metadata={"ssh-keys": key} if key else {"enable-oslogin": "TRUE"},
        description=plan.run_directory,
        valid_until_hours=hours,
        startup_script=shipping.startup_script(),
        idle_minutes=_idle_minutes(cluster),
    )


def _idle_minutes(cluster: TpuCluster) -> float | None:
    """After how long without a sign of life the TPUs delete themselves; None is never."""
    return None if cluster.keep else cluster.idle_minutes


def _key(cluster: TpuCluster) -> str | None:
    return None if cluster.os_login else f"{cluster.ssh_user}:{public_key(cluster)}"


def _cluster(plan: Plan) -> TpuCluster:
    return TpuCluster.model_validate(plan.submission)


def _rental(plan: Plan, run: RunDirectory) -> Rental:
    cluster = _cluster(plan)
    if not (cluster.project and cluster.zones):  # `resolve` fills both in, but others may write to the bucket
        raise UserError(f"the plan of run {run.name} has no project or no zone; `launch` the run anew")
    return Rental(run, _name(plan), cluster.project, cluster.zones, CloudTpu, is_ours=cluster.tpu is None)


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
    if plan is None or plan.submission is None:
        return recorded_state(run)
    if run.result() is not None:
        return dataclasses.replace(recorded_state(run), costs=_left_behind(plan, run))
    rental = _rental(plan, run)
    try:
        conditions = [rental.condition()] if rental.granted_zone() else [*rental.conditions().values()]
    except (UserError, UnreachableError) as e:
        return State("unknown", f"no launcher supervises it; {e}")
    existing = [condition for condition in conditions if condition.status != "absent"]
    if not existing and has_completed(plan, run):
        return State(
            "queued", f"all steps are done, and its TPUs are gone; `launch attach {run.name}` ends it"
        )
    if not existing or (_cluster(plan).tpu and not _has_agents(run)):
        return recorded_state(run)
    is_ready = any(condition.status == "ready" for condition in existing)
    detail = f"{_name(plan)} is {existing[0].status}, and no launcher looks after it"
    status = "running" if is_ready and _has_agents(run) else "queued"
    return State(status, f"{detail}; `launch attach {run.name}`")


def _left_behind(plan: Plan, run: RunDirectory) -> str:
    """What an ended run has that still costs money, as a sentence; empty where there is nothing."""
    if not (left := run.resources.unreleased()):
        return ""
    try:  # it may have been deleted by other means
        absent = [r for r in left if CloudTpu(r.project, r.zone).condition(r.name).status == "absent"]
        left = [r for r in left if r not in absent]
    except (UserError, UnreachableError) as e:
        return f"{describe_rented(left)} may still cost money ({e}); `launch attach {run.name}` deletes it"
    if not left:
        return ""
    kept = [rented for rented in left if rented.kept]
    how = f"`launch gc --delete {left[0].name}`" if kept == left else f"`launch attach {run.name}`"
    return f"{describe_rented(left)} still costs money, until {how}"


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


def delete(
    project: str | None, resource: Resource, announce: Callable[[str], None], give_up: threading.Event
) -> bool:
    """Delete a resource, trying for long, and record it in its run; whether it is gone."""
    project = project_and_zone(project, resource.zone)[0]
    provider = CloudTpu(project, resource.zone)
    if not delete_for_long(partial(provider.delete, resource.name), resource.name, announce, give_up):
        return False
    with contextlib.suppress(UserError, UnreachableError):  # the record is an extra: the resource is gone
        resources = RunDirectory(resource.description).resources
        for rented in resources.unreleased():
            if rented.key == (project, resource.zone, resource.name):
                resources.release(rented)
    return True


# Attempts


def job_info() -> dict[str, Any]:
    return {"job": None, "restart_count": None}


def can_restart(plan: Plan, run: RunDirectory) -> bool:
    """True; a slice with a VM that failed twice is deleted first, so that the restart creates another."""
    failures = [a["failure"] for a in run.attempts.of_launch() if a["failure"]]
    counts = Counter(f["host"] for f in failures if f["cause"] in ("lost", "not started"))
    if failures and counts[failures[-1]["host"]] >= BAD_VM_FAILURES and not _cluster(plan).tpu:
        with contextlib.suppress(UnreachableError, UserError):  # otherwise the restart tries the same slice
            rental = _rental(plan, run)
            rental.withdraw(rental.zone)
    return True


def start(plan: Plan, run: RunDirectory, attempt: int) -> RemoteGang:
    return _gang(plan, run, attempt, adopted=False)


def adopt(plan: Plan, run: RunDirectory, attempt: int) -> RemoteGang | None:
    if _has_agents(run) and _rental(plan, run).condition().status == "ready":
        return _gang(plan, run, attempt, adopted=True)
    return None


def _gang(plan: Plan, run: RunDirectory, attempt: int, *, adopted: bool) -> RemoteGang:
    key = _key(_cluster(plan))

    def request(provisioning: Provisioning, hours: float) -> Request:
        return _request(plan, key, provisioning, hours)

    hosts = Hosts(_rental(plan, run), request, key)
    return RemoteGang(RemoteAttempt(plan, run, attempt), hosts, adopted=adopted)
