"""Slices of Cloud TPU, by queued resources of its API (https://cloud.google.com/tpu/docs/queued-resources).

Google's packages are imported where they are used: they take 0.3 s, and most commands do without.
"""

import configparser
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from configs import google
from configs import settings as user_settings
from configs.errors import UserError
from launcher.providers import OWNER, Condition, Machine, Request, Resource

ENDPOINT = "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU"
"""gcloud's variable for another address of the API. An address without TLS gets no credentials."""
ROLE = "roles/tpu.admin"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
RESOURCE, IDLE = "podlaunch-resource", "podlaunch-idle-seconds"
"""Metadata of a VM that deploy/tpu/startup.sh reads: its queued resource, and after how many idle seconds to delete it."""
CALL_SECONDS = 30.0
RETRY_SECONDS = 60.0
POLL_SECONDS = 2.0
WAIT_SECONDS = 15 * 60.0
"""Limit for a deletion, and for a request to be accepted."""

# States of the API (https://cloud.google.com/tpu/docs/queued-resources). A SUSPENDED resource is never queued again,
# and a FAILED one stays until it is deleted, so both are lost. Of an ACTIVE one the states of its nodes decide.
_QUEUED = {
    "STATE_UNSPECIFIED": "waiting", "CREATING": "waiting", "ACCEPTED": "waiting", "WAITING_FOR_RESOURCES": "waiting",
    "PROVISIONING": "creating", "ACTIVE": "ready", "DELETING": "deleting",
    "SUSPENDING": "lost", "SUSPENDED": "lost", "FAILED": "lost",
}  # fmt: skip
# A preempted node may end in another state than PREEMPTED, so whatever does not come back by itself is lost.
_NODE = {
    "STATE_UNSPECIFIED": "creating", "CREATING": "creating", "READY": "ready", "DELETING": "deleting",
    "RESTARTING": "repairing", "REIMAGING": "repairing", "REPAIRING": "repairing", "STARTING": "repairing",
    "UNHIDING": "repairing",
    "STOPPING": "lost", "STOPPED": "lost", "PREEMPTED": "lost", "TERMINATED": "lost", "HIDING": "lost",
    "HIDDEN": "lost", "UNKNOWN": "unknown",
}  # fmt: skip
_WORST_FIRST = ("lost", "deleting", "unknown", "repairing", "creating", "ready")
# Codes of google.rpc.Code for why a queued resource FAILED that the user must mend: INVALID_ARGUMENT, NOT_FOUND,
# PERMISSION_DENIED, FAILED_PRECONDITION; not where the message tells of capacity, which may come back.
_USERS_CODES = {3, 5, 7, 9}
_NO_CAPACITY = re.compile(
    r"capacity|stock-?out|exhausted|enough resources|unavailable|not available|preempt", re.I
)


class NotGivenError(UserError):
    """Neither the user nor gcloud says which project or zone."""


@dataclass(frozen=True)
class CloudTpu:
    project: str
    zone: str

    def create(self, request: Request) -> None:
        from google.api_core.exceptions import Conflict

        with self._explained(f"TPU {request.name}", request):
            try:
                operation = self._call(
                    "create_queued_resource",
                    parent=self._parent,
                    queued_resource=_queued_resource(request, self._parent),
                    queued_resource_id=request.name,
                )
                _wait(request.name, [operation], lambda: self._queued(request.name) is not None)
            except Conflict as e:
                # Where the answer to a first try was lost, the retry conflicts with our own request.
                queued = self._queued(request.name)
                if queued and OWNER in request.labels and _owner(queued) == request.labels[OWNER]:
                    return
                raise UserError(
                    f"TPU {request.name}: the name is taken in {self.project}, {self.zone} ({_message(e)}); "
                    "choose another --name, or delete the TPU that has it"
                ) from None

    def condition(self, name: str) -> Condition:
        with self._explained(f"TPU {name}"):
            queued, nodes = self._queued(name), self._nodes(name)
        owners = [_owner(resource) for resource in ([queued] if queued else nodes)]
        return replace(_condition(queued, nodes), owner=owners[0] if owners else "")

    def machines(self, name: str) -> list[Machine]:
        with self._explained(f"TPU {name}"):
            return [m for i, node in enumerate(self._nodes(name)) for m in self._machines(i, node)]

    def authorize(self, name: str, key: str) -> None:
        with self._explained(f"TPU {name}"):
            for node in self._nodes(name):
                keys = node.metadata.get("ssh-keys", "").splitlines()
                if key not in keys:
                    metadata = {**node.metadata, "ssh-keys": "\n".join([*keys, key])}
                    changed = {"name": node.name, "metadata": metadata}
                    self._call("update_node", {"node": changed, "update_mask": {"paths": ["metadata"]}})

    def delete(self, name: str) -> None:
        """As `Provider.delete`. With `force`, Google deletes the nodes of a queued resource along with it."""
        with self._explained(f"TPU {name}"):
            self._remove(
                "delete_queued_resource", name, lambda: filter(None, [self._queued(name)]), force=True
            )
            # A node that has no queued resource any more, or was created without one.
            self._remove("delete_node", name, lambda: self._nodes(name))

    def list_labelled(self, label: str) -> list[Resource]:
        everywhere = {"parent": f"projects/{self.project}/locations/-"}
        with self._explained(f"TPUs of project {self.project}"):
            nodes = list(self._call("list_nodes", everywhere))
            requests = list(self._call("list_queued_resources", everywhere))
        nodes_of: dict[tuple[str, str], list[Any]] = {}
        for node in nodes:
            nodes_of.setdefault((_zone(node.name), _id(node.queued_resource)), []).append(node)
        found = [(q, _condition(q, nodes_of.pop((_zone(q.name), _id(q.name)), []))) for q in requests]
        # What is left in `nodes_of` was created without a request.
        found += [(node, _condition(None, [node])) for group in nodes_of.values() for node in group]
        return [_resource(r, condition) for r, condition in found if label in _node_of(r).labels]

    def zones_with(self, accelerator_type: str) -> list[str]:
        with self._explained(f"TPUs of project {self.project}"):
            parent = f"projects/{self.project}/locations/-"
            types = self._call("list_accelerator_types", parent=parent)
            return sorted({_zone(t.name) for t in types if t.type_ == accelerator_type})

    @property
    def _parent(self) -> str:
        return f"projects/{self.project}/locations/{self.zone}"

    @cached_property
    def _client(self) -> Any:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.tpu_v2 import TpuClient
        from google.cloud.tpu_v2.services.tpu.transports import TpuRestTransport

        if not (endpoint := os.environ.get(ENDPOINT, "").rstrip("/")):
            return TpuClient(transport="rest")
        credentials = AnonymousCredentials() if endpoint.startswith("http://") else None
        return TpuClient(transport=TpuRestTransport(host=endpoint, credentials=credentials))

    def _call(self, method: str, *arguments: Any, **parameters: Any) -> Any:
        """Call a method of the client, with our timeout and retries."""
        return getattr(self._client, method)(*arguments, **parameters, **_call_options())

    def _queued(self, name: str) -> Any:
        """The queued resource, or None."""
        from google.api_core.exceptions import NotFound

        with suppress(NotFound):
            return self._call("get_queued_resource", name=f"{self._parent}/queuedResources/{name}")
        return None

    def _nodes(self, name: str) -> list[Any]:
        """The nodes of a queued resource, by slice; or the one node of that name."""
        nodes = self._call("list_nodes", parent=self._parent)
        named = [n for n in nodes if name in (_id(n.name), _id(n.queued_resource))]
        return sorted(named, key=lambda n: (len(n.name), n.name))  # name-2 comes before name-10

    def _remove(self, method: str, name: str, existing: Callable[[], Iterable[Any]], **options: bool) -> None:
        """Delete what `existing` lists, by a `method` of the client, and wait until it lists nothing."""
        from google.api_core.exceptions import NotFound

        operations = []
        for resource in existing():
            if _state(resource) != "DELETING":
                with suppress(NotFound):
                    operations.append(self._call(method, {"name": resource.name, **options}))
        _wait(name, operations, lambda: not list(existing()))

    def _machines(self, index: int, node: Any) -> list[Machine]:
        endpoints = list(node.network_endpoints)
        keys = self._host_keys(node)
        return [
            Machine(
                slice=index,
                worker=worker,
                internal=endpoint.ip_address,
                external=endpoint.access_config.external_ip or None,
                host_keys=keys[worker] if len(keys) == len(endpoints) else (),
                alias=f"tpu.{node.id}-{worker}",
            )
            for worker, endpoint in enumerate(endpoints)
        ]

    def _host_keys(self, node: Any) -> list[tuple[str, ...]]:
        """Host keys of each worker; empty where the VMs have not published any, or the project forbids that."""
        from google.api_core.exceptions import GoogleAPICallError

        # Without a query path and worker ids the answer has all attributes of all workers; gcloud asks like this, too.
        # Not retried: without the keys, ssh keeps the key of the first connection.
        with suppress(GoogleAPICallError):
            answer = self._client.get_guest_attributes({"name": node.name}, timeout=CALL_SECONDS)
            attributes = [worker.query_value.items for worker in answer.guest_attributes]
            return [
                tuple(f"{a.key} {a.value}" for a in items if a.key.startswith(("ssh-", "ecdsa-")))
                for items in attributes
            ]
        return []

    @contextmanager
    def _explained(self, what: str, request: Request | None = None) -> Iterator[None]:
        """Raises UserError for what the user must mend, and google.UnreachableError."""
        from google.api_core.exceptions import ClientError

        with google.explained(what, bucket="", roles=f"the role {ROLE}"):
            try:
                yield
            except ClientError as e:
                if e.code == 401:  # google.explained has a message for refused credentials
                    raise
                raise UserError(f"{what}: {self._problem(e, request)}") from None

    def _problem(self, error: Any, request: Request | None) -> str:
        """Google's message on a refused request, and the next step."""
        message = _message(error)
        if error.reason == "SERVICE_DISABLED":
            return (
                f"the Cloud TPU API is not enabled in project {self.project}; "
                f"enable it with `gcloud services enable tpu.googleapis.com --project {self.project}`"
            )
        if _is_quota(error):
            return f"{message}; ask for less, or for more quota, or choose another zone or provisioning"
        if error.code == 403:
            grant = f"give these credentials {ROLE} on project {self.project}"
            return f"{message}; {grant}, or log in with others: {google.LOG_IN}"
        if request and error.code in (400, 404):
            # The hint is an extra: where the zones cannot be listed, Google's own message has to do.
            with suppress(UserError, google.UnreachableError):
                zones = self.zones_with(request.accelerator_type)
                if zones and self.zone not in zones:
                    return f"zone {self.zone} has no {request.accelerator_type}; zones that have it: {', '.join(zones)}"
        return f"{message}; mend what was asked of project {self.project}, zone {self.zone}"


def project_and_zone(project: str | None, zone: str | None) -> tuple[str, str]:
    """Project and zone as given, or as the user's settings, gcloud and Google's clients have them. Raises NotGivenError."""
    settings, environment, own = _gcloud_settings(), os.environ, user_settings.load()
    project = (
        project
        or environment.get("GOOGLE_CLOUD_PROJECT")
        or environment.get("CLOUDSDK_CORE_PROJECT")
        or own.project
        or settings.get("core", "project", fallback=None)
        or _project_of_credentials()
    )
    zone = (
        zone
        or environment.get("CLOUDSDK_COMPUTE_ZONE")
        or own.zone
        or settings.get("compute", "zone", fallback=None)
    )
    if not project:
        raise NotGivenError(
            "no Google Cloud project is given; set one once with `launch configure project=PROJECT` "
            "or `gcloud config set project PROJECT`, or with the variable GOOGLE_CLOUD_PROJECT"
        )
    if not zone:
        raise NotGivenError(
            "no zone is given; set one once with `launch configure zone=ZONE` "
            "or `gcloud config set compute/zone ZONE`, or with the variable CLOUDSDK_COMPUTE_ZONE"
        )
    return project, zone


def _gcloud_settings() -> configparser.ConfigParser:
    """Settings of gcloud's active configuration, empty where there is none. Raises UserError."""
    folder = Path(os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud")
    active = os.environ.get("CLOUDSDK_ACTIVE_CONFIG_NAME")
    if not active and (file := folder / "active_config").is_file():
        active = file.read_text().strip()
    settings = configparser.ConfigParser(interpolation=None)
    file = folder / "configurations" / f"config_{active or 'default'}"
    try:
        settings.read(file)
    except (configparser.Error, UnicodeDecodeError) as e:
        raise UserError(
            f"{file}: cannot be read: {_one_line(str(e))}; repair it with `gcloud config`"
        ) from None
    return settings


def _project_of_credentials() -> str | None:
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    with suppress(DefaultCredentialsError):
        return google.auth.default()[1]
    return None


def _queued_resource(request: Request, parent: str) -> Any:
    from google.cloud.tpu_v2 import types
    from google.protobuf.duration_pb2 import Duration

    spec = types.QueuedResource.Tpu.NodeSpec(parent=parent, node=_node(request, parent))
    if request.slices == 1:
        spec.node_id = request.name
    else:
        spec.multislice_params = {"node_count": request.slices, "node_id_prefix": request.name}
    queued = types.QueuedResource(tpu={"node_spec": [spec]})
    if request.provisioning == "spot":
        queued.spot = {}
    elif request.provisioning == "reserved":
        # As gcloud's v2 asks for it, with neither a tier nor a scheduling config; `-` is any reservation of the project.
        reservation = request.reservation or "-"
        queued.reservation_name = (
            reservation if "/" in reservation else f"{parent}/reservations/{reservation}"
        )
    seconds = round(3600 * request.valid_until_hours)
    queued.queueing_policy = {"valid_until_duration": Duration(seconds=seconds)}
    return queued


def _node(request: Request, parent: str) -> Any:
    from google.cloud.tpu_v2 import types

    metadata = dict(request.metadata)
    if request.startup_script:
        # Of the VM's own metadata, only this tells it the name and project of its queued resource.
        metadata |= {
            "startup-script": request.startup_script,
            RESOURCE: f"{parent}/queuedResources/{request.name}",
        }
    if request.idle_minutes is not None:
        metadata[IDLE] = str(round(60 * request.idle_minutes))
    node = types.Node(
        description=request.description,
        runtime_version=request.runtime,
        network_config=types.NetworkConfig(
            network=request.network, subnetwork=request.subnetwork, enable_external_ips=request.external_ips
        ),
        labels=request.labels,
        tags=request.tags,
        metadata=metadata,
        # Without an e-mail address the account is Compute Engine's default. A VM may have to delete itself.
        service_account=types.ServiceAccount(email=request.service_account or "", scope=[SCOPE]),
    )
    if request.topology:
        node.accelerator_config = types.AcceleratorConfig(type_=request.generation, topology=request.topology)
    else:
        node.accelerator_type = request.accelerator_type
    return node


def _condition(queued: Any, nodes: list[Any]) -> Condition:
    """The condition of a queued resource; where there is none, or it is ACTIVE, the worst condition of its nodes."""
    if queued and _state(queued) != "ACTIVE":
        error = queued.state.failed_data.error
        status = "invalid" if _is_users(error) else _QUEUED.get(_state(queued), "repairing")
        why = f": {_one_line(error.message)}" if error.message else ""
        return Condition(status, f"queued resource {_state(queued)}{why}")
    expected = sum(spec.multislice_params.node_count or 1 for spec in queued.tpu.node_spec) if queued else 0
    if len(nodes) < expected:  # a node was deleted by other means
        return Condition("lost", f"queued resource ACTIVE, with {len(nodes)} of {expected} nodes")
    if not nodes:
        return Condition("absent")
    return min(map(_condition_of_node, nodes), key=lambda condition: _WORST_FIRST.index(condition.status))


def _is_users(error: Any) -> bool:
    """Whether a queued resource FAILED for a reason that the user must mend."""
    if "quota" in error.message.lower():
        return True
    return error.code in _USERS_CODES and not _NO_CAPACITY.search(error.message)


def _condition_of_node(node: Any) -> Condition:
    why = f": {_one_line(node.health_description)}" if node.health_description else ""
    return Condition(_NODE.get(_state(node), "repairing"), f"node {_id(node.name)} {_state(node)}{why}")


def _resource(resource: Any, condition: Condition) -> Resource:
    """A node or a queued resource of Google as ours."""
    node = _node_of(resource)
    config = node.accelerator_config
    return Resource(
        name=_id(resource.name),
        zone=_zone(resource.name),
        accelerator_type=node.accelerator_type or f"{config.type_.name} {config.topology}",
        condition=condition,
        created=resource.create_time,
        labels=dict(node.labels),
        description=node.description,
    )


def _wait(name: str, operations: list[Any], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not reached():
        for operation in operations:
            if operation.done() and (error := operation.exception()):
                raise error
        if time.monotonic() > deadline:
            raise google.UnreachableError(f"TPU {name}: not done after {WAIT_SECONDS / 60:g} minutes")
        time.sleep(POLL_SECONDS)


def _call_options() -> dict[str, Any]:
    """Timeout and retries of the client, which by default does not retry these calls."""
    from google.api_core.exceptions import ServerError, TooManyRequests
    from google.api_core.retry import Retry
    from google.auth.exceptions import TransportError
    from requests.exceptions import RequestException

    passing = (ServerError, TooManyRequests, RequestException, TransportError)

    def is_passing(error: Exception) -> bool:
        return isinstance(error, passing) and not _is_quota(error)

    retry = Retry(is_passing, initial=1.0, maximum=10.0, timeout=RETRY_SECONDS)
    return {"retry": retry, "timeout": CALL_SECONDS}


def _is_quota(error: Any) -> bool:
    """Whether an error is about the quota of chips, not about the rate of requests."""
    from google.api_core.exceptions import TooManyRequests

    if not isinstance(error, TooManyRequests) or error.reason == "RATE_LIMIT_EXCEEDED":
        return False
    return "quota" in error.message.lower()


def _message(error: Any) -> str:
    """Google's message, without the address that its client puts before it."""
    return _one_line(re.sub(r"^[A-Z]+ https?://\S+: ", "", error.message)).rstrip(".")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _state(resource: Any) -> str:
    """Name of the state of a resource, or the number of a state that this client does not know."""
    state = getattr(resource.state, "state", resource.state)
    return str(getattr(state, "name", state))


def _node_of(resource: Any) -> Any:
    """The node itself, or the node that a queued resource asks for."""
    return resource.tpu.node_spec[0].node if "queuedResources" in resource.name else resource


def _owner(resource: Any) -> str:
    return str(_node_of(resource).labels.get(OWNER, ""))


def _id(path: str) -> str:
    return path.rpartition("/")[2]


def _zone(path: str) -> str:
    return path.split("/")[3]
