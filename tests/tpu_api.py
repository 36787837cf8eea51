"""The Cloud TPU API (v2, REST) on a loopback port, in memory, with faults on demand.

Implements the part of https://cloud.google.com/tpu/docs/reference/rest that launcher/providers uses through Google's
client. Each body is parsed as the client library's message; unknown fields are refused, as by the real service.
`python -m tests.tpu_api --port 8080` serves other processes, with VMs that have no real machines.
"""

import argparse
import copy
import itertools
import json
import math
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from google.cloud.tpu_v2 import types
from google.protobuf import empty_pb2, json_format  # noqa: F401  (an answer of operations)

PROJECT, ZONE = "test", "us-central2-b"
ZONES = {"us-central2-b": ("v4",), "us-central1-a": ("v5litepod", "v6e"), "us-east5-a": ("v5p", "v6e")}
MACHINES = {
    "v4-8": 1, "v4-16": 2, "v4-32": 4, "v4-64": 8, "v5p-8": 1, "v5p-16": 2, "v5p-32": 4,
    "v5litepod-1": 1, "v5litepod-4": 1, "v5litepod-8": 1, "v5litepod-16": 4, "v5litepod-32": 8,
    "v6e-1": 1, "v6e-4": 1, "v6e-8": 1, "v6e-16": 4, "v6e-32": 8,
}  # fmt: skip
"""Number of VMs of each accelerator type."""
STATUSES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    409: "ALREADY_EXISTS", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE",
}  # fmt: skip
CODES = {
    "INVALID_ARGUMENT": 3,
    "NOT_FOUND": 5,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "INTERNAL": 13,
}
"""Of statuses, in operations."""
Resource = dict[str, Any]


@dataclass(frozen=True)
class TestMachine:
    """The machine that stands for a VM of a node."""

    __test__ = False  # it is nothing that pytest runs

    internal: str
    external: str | None = None
    host_key: str | None = None
    """Public host key, such as `ssh-ed25519 AAAA…`."""


@dataclass
class Fault:
    method: str
    error: "Refused"
    in_operation: bool


@dataclass(frozen=True)
class Asked:
    path: str
    """Path below /v2/, without the custom method after a colon."""
    query: Mapping[str, str]
    body: bytes

    @property
    def zone(self) -> str:
        return self.path.split("/")[3]


class Refused(Exception):  # noqa: N818
    """An answer other than success, with Google's form of error."""

    def __init__(self, code: int, message: str, reason: str = ""):
        super().__init__(message)
        self.code = code
        info = {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": "googleapis.com",
            "metadata": {"service": "tpu.googleapis.com", "consumer": f"projects/{PROJECT}"},
        }  # fmt: skip
        self.error = {"code": code, "message": message, "status": STATUSES[code]}
        if reason:
            self.error["details"] = [info]


class MalformedError(Refused):
    """The request violates the API."""

    def __init__(self, message: str, code: int = 400):
        super().__init__(code, message)


def nothing(node: Resource, machines: list[TestMachine]) -> None:
    pass


class Server:
    """A running server: its `address`, the resources, the faults, and a log of the requests."""

    def __init__(
        self,
        machines: list[TestMachine] | None = None,
        *,
        started: Callable[[Resource, list[TestMachine]], None] = nothing,
        changed: Callable[[Resource, list[TestMachine]], None] = nothing,
        ended: Callable[[Resource, list[TestMachine]], None] = nothing,
        port: int = 0,
    ):
        self.seconds = 0.1
        """Seconds that each state lasts."""
        self.page = 2
        """Largest number of entries per page of a list."""
        self.nodes: dict[str, Resource] = {}
        """Nodes by full name, in the JSON form of the API."""
        self.queued_resources: dict[str, Resource] = {}
        self.operations: dict[str, Resource] = {}
        self.log: list[tuple[str, str]] = []
        """HTTP method and path of each request."""
        self.authorizations: set[str] = set()
        """Authorization headers that came with requests."""
        self.rejected: list[str] = []
        """Requests that violate the API, with the reason."""
        self.hold = False
        """Whether queued resources wait in the queue until `release()`."""
        self.held_zones: set[str] = set()
        """Zones whose queued resources wait in the queue until `release()`."""
        self.answers_host_keys = True
        self.after: dict[str, Callable[[], None]] = {}
        """What to call after a request of a method such as `queuedResources.create` was served, before its answer."""
        self.lock = threading.RLock()
        self._started, self._changed, self._ended = started, changed, ended
        self._free = machines
        self._given: dict[str, list[TestMachine]] = {}
        self._failures: list[tuple[str, int, str]] = []
        self._faults: list[Fault] = []
        self._numbers = itertools.count(1)
        self._closed = False
        self._http = _TcpServer(("127.0.0.1", port), type("Handler", (_Handler,), {"server_": self}))
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._http.shutdown()
        self._http.server_close()

    # What tests do to it

    def release(self) -> None:
        """Let the resources that wait in the queue proceed."""
        with self.lock:
            self.hold = False
            self.held_zones.clear()
            for name in self.queued_resources:
                self._later(self._provision, name)

    def preempt(self, node: str) -> None:
        """Preempt a node, which is given by its full name or the last part of it."""
        with self.lock:
            name = next(n for n in self.nodes if n == node or n.endswith(f"/nodes/{node}"))
            self.nodes[name]["state"] = "PREEMPTED"
            queued = self.nodes[name].get("queuedResource", "")
            if queued in self.queued_resources:
                self._set(queued, "SUSPENDING", stateInitiator="SERVICE")
                self._later(self._suspend, queued)
        self._end(name)

    def creation_fails(self, message: str, *, code: int = 8, times: int = 1, zone: str = "") -> None:
        """Make the next queued resources, of any zone or of one, fail when they are provisioned."""
        with self.lock:
            self._failures += times * [(message, code, zone)]

    def fail_next(
        self,
        status: int,
        message: str = "injected",
        reason: str = "",
        *,
        method: str = "",
        times: int = 1,
        in_operation: bool = False,
    ) -> None:
        """Refuse the next requests of a method such as `queuedResources.create`, or of any method; or let the request
        start an operation that ends with this error."""
        with self.lock:
            self._faults += times * [Fault(method, Refused(status, message, reason), in_operation)]

    def forgive(self) -> None:
        """Refuse no more requests."""
        with self.lock:
            self._faults.clear()

    def service_disabled(self) -> None:
        words = (
            f"Cloud TPU API has not been used in project {PROJECT} before or it is disabled. Enable it by visiting "
            f"https://console.developers.google.com/apis/api/tpu.googleapis.com/overview?project={PROJECT} then retry."
        )
        self.fail_next(403, words, "SERVICE_DISABLED")

    # What time does to it

    def _later(self, step: Callable[[str], None], name: str) -> None:
        timer = threading.Timer(self.seconds, self._step, (step, name))
        timer.daemon = True
        timer.start()

    def _step(self, step: Callable[[str], None], name: str) -> None:
        if not self._closed:
            step(name)

    def _queue(self, name: str) -> None:
        with self.lock:
            if self._state(name) == "ACCEPTED":
                self._set(name, "WAITING_FOR_RESOURCES")
                self._later(self._provision, name)

    def _provision(self, name: str) -> None:
        with self.lock:
            zone = name.split("/")[3]
            if self._state(name) != "WAITING_FOR_RESOURCES" or self.hold or zone in self.held_zones:
                return
            if failure := next((f for f in self._failures if f[2] in ("", zone)), None):
                self._failures.remove(failure)
                error = {"code": failure[1], "message": failure[0]}
                self._set(name, "FAILED", failedData={"error": error})
                return
            nodes = {
                f"{spec['parent']}/nodes/{i}": spec["node"]
                for spec, i in _node_ids(self.queued_resources[name])
            }
            if not self._give(nodes):
                return  # until others end
            self._set(name, "PROVISIONING")
            for node, spec in nodes.items():
                self._add_node(node, spec, queuedResource=name, multisliceNode=len(nodes) > 1)
            self._later(self._activate, name)

    def _activate(self, name: str) -> None:
        for node in [n for n, r in list(self.nodes.items()) if r.get("queuedResource") == name]:
            self._make_ready(node)
        with self.lock:
            if self._state(name) == "PROVISIONING":
                self._set(name, "ACTIVE")

    def _suspend(self, name: str) -> None:
        with self.lock:
            if self._state(name) == "SUSPENDING":
                self._set(name, "SUSPENDED", stateInitiator="SERVICE")

    def _make_ready(self, name: str) -> None:
        machines = self._given.get(name, [])
        self._call(self._started, self.nodes[name], machines)
        with self.lock:
            node = self.nodes.get(name)
            if node and node["state"] == "CREATING":
                external = node.get("networkConfig", {}).get("enableExternalIps", False)
                node["networkEndpoints"] = [
                    {
                        "ipAddress": m.internal, "port": 8470,
                        "accessConfig": {"externalIp": m.external} if external and m.external else {},
                    }
                    for m in machines
                ]  # fmt: skip
                node |= {"state": "READY", "health": "HEALTHY"}

    def _remove_queued(self, name: str) -> None:
        for node in [n for n, r in list(self.nodes.items()) if r.get("queuedResource") == name]:
            self._remove_node(node)
        with self.lock:
            self.queued_resources.pop(name, None)

    def _remove_node(self, name: str) -> None:
        self._end(name)
        with self.lock:
            queued = self.nodes.pop(name, {}).get("queuedResource", "")
            if self._state(queued) == "ACTIVE":
                self._set(queued, "SUSPENDED", stateInitiator="USER")

    def _end(self, name: str) -> None:
        """Free the machines of a node."""
        with self.lock:
            machines, node = self._given.pop(name, None), self.nodes.get(name)
        if machines is None or node is None:
            return
        self._call(self._ended, node, machines)
        with self.lock:
            if self._free is not None:
                self._free = sorted(self._free + machines, key=lambda machine: machine.internal)
            for queued in self.queued_resources:
                self._later(self._provision, queued)

    def _call(
        self, told: Callable[[Resource, list[TestMachine]], None], node: Resource, machines: list[TestMachine]
    ) -> None:
        """Call a callback of the testbed without holding the lock: it may be slow, and may send requests itself."""
        try:
            told(copy.deepcopy(node), machines)
        except Exception:  # noqa: BLE001  (of a test: this server goes on)
            traceback.print_exc()

    def _give(self, nodes: Mapping[str, Resource]) -> bool:
        """Assign machines to nodes if there are enough for all of them."""
        counts = {name: _num_machines(spec) for name, spec in nodes.items()}
        if self._free is not None and sum(counts.values()) > len(self._free):
            return False
        for name, count in counts.items():
            if self._free is None:
                numbers = [next(self._numbers) for _ in range(count)]
                self._given[name] = [
                    TestMachine(f"10.0.0.{n}", f"34.0.0.{n}", f"ssh-ed25519 AAAA{n}") for n in numbers
                ]
            else:
                self._given[name], self._free = self._free[:count], self._free[count:]
        return True

    def _state(self, name: str) -> str:
        return self.queued_resources.get(name, {}).get("state", {}).get("state", "")

    def _set(self, name: str, state: str, **data: Any) -> None:
        self.queued_resources[name]["state"] = data | {"state": state}

    def _add_node(self, name: str, spec: Resource, **more: Any) -> None:
        own = {
            "name": name, "state": "CREATING", "id": str(10**18 + next(self._numbers)), "createTime": _now(),
            "apiVersion": "V2",
        }  # fmt: skip
        self.nodes[name] = spec | own | more

    # What an HTTP connection asks of it

    def answer(self, http_method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Resource]:
        self.log.append((http_method, path))
        try:
            for route_method, pattern, name, handle, allowed in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and route_method == http_method:
                    if unknown := query.keys() - {"$alt", *allowed}:
                        raise MalformedError(f'Invalid JSON payload received. Unknown name "{min(unknown)}"')
                    return 200, self._handle(name, handle, Asked(match[1], query, body))
            raise MalformedError(f"{http_method} {path} is not of this API", 404)
        except Refused as refused:
            if isinstance(refused, MalformedError):
                self.rejected.append(f"{http_method} {path}: {refused}")
            return refused.code, {"error": refused.error}

    def _handle(self, name: str, handle: Callable[["Server", Asked], Resource], asked: Asked) -> Resource:
        with self.lock:
            fault = next((f for f in self._faults if f.method in ("", name)), None)
            if fault is None:
                answer = copy.deepcopy(handle(self, asked))
            else:
                self._faults.remove(fault)
        if fault is None:
            self.after.get(name, lambda: None)()
            return answer
        if not fault.in_operation:
            raise fault.error
        error = fault.error.error
        return self._operation(asked, error={"code": CODES[error["status"]], "message": error["message"]})

    def _operation(self, asked: Asked, **result: Any) -> Resource:
        """An operation that is done at its next request."""
        name = f"projects/{PROJECT}/locations/{asked.zone}/operations/operation-{next(self._numbers)}"
        metadata = {
            "@type": "type.googleapis.com/google.cloud.tpu.v2.OperationMetadata",
            "createTime": _now(), "target": asked.path, "apiVersion": "v2",
        }  # fmt: skip
        self.operations[name] = {"name": name, "metadata": metadata, "done": True, **result}
        return {"name": name, "metadata": metadata}

    def _get_operation(self, asked: Asked) -> Resource:
        return _found(self.operations, asked.path)

    def _create_queued_resource(self, asked: Asked) -> Resource:
        queued = _parsed(types.QueuedResource, asked.body)
        name = f"{asked.path}/{_new_id(asked, 'queuedResourceId')}"
        specs = queued.get("tpu", {}).get("nodeSpec", [])
        _require(len(specs) == 1, "tpu.node_spec")
        parent = asked.path.removesuffix("/queuedResources")
        for spec in specs:
            _require(spec.get("parent") == parent, "tpu.node_spec.parent")
            _require("nodeId" in spec or "multisliceParams" in spec, "tpu.node_spec.node_id")
            if "multisliceParams" in spec:
                _require(spec["multisliceParams"].get("nodeCount", 0) > 1, "multislice_params.node_count")
            _check_node(spec.get("node", {}), asked.zone)
        _check_absent(self.queued_resources, name)
        for _, node in _node_ids(queued):
            _check_absent(self.nodes, f"{parent}/nodes/{node}")
        self.queued_resources[name] = queued | {"name": name, "createTime": _now()}
        self._set(name, "ACCEPTED")
        self._later(self._queue, name)
        return self._operation(asked, response=_any("QueuedResource", self.queued_resources[name]))

    def _get_queued_resource(self, asked: Asked) -> Resource:
        return _found(self.queued_resources, asked.path)

    def _list_queued_resources(self, asked: Asked) -> Resource:
        return self._listed("queuedResources", self.queued_resources, asked)

    def _delete_queued_resource(self, asked: Asked) -> Resource:
        state = _found(self.queued_resources, asked.path)["state"]["state"]
        nodes = [n for n in self.nodes.values() if n.get("queuedResource") == asked.path]
        force = asked.query.get("force", "").lower() == "true"
        if nodes and not force and state not in ("ACCEPTED", "FAILED", "SUSPENDED"):
            raise Refused(400, f"queued resource {asked.path} is {state}, and has nodes; use force")
        if state == "DELETING":
            raise Refused(400, f"queued resource {asked.path} is being deleted")
        self._set(asked.path, "DELETING")
        for node in nodes:
            node["state"] = "DELETING"
        self._later(self._remove_queued, asked.path)
        return self._operation(asked, response=_EMPTY)

    def _reset_queued_resource(self, asked: Asked) -> Resource:
        if _found(self.queued_resources, asked.path)["state"]["state"] != "SUSPENDED":
            raise Refused(400, f"queued resource {asked.path} is not SUSPENDED")
        for node in [n for n, r in self.nodes.items() if r.get("queuedResource") == asked.path]:
            del self.nodes[node]
        self._set(asked.path, "ACCEPTED")
        self._later(self._queue, asked.path)
        return self._operation(asked, response=_any("QueuedResource", self.queued_resources[asked.path]))

    def _create_node(self, asked: Asked) -> Resource:
        node = _parsed(types.Node, asked.body)
        name = f"{asked.path}/{_new_id(asked, 'nodeId')}"
        _check_node(node, asked.zone)
        _check_absent(self.nodes, name)
        if not self._give({name: node}):
            raise Refused(429, f'There is no more capacity in the zone "{asked.zone}"')
        self._add_node(name, node)
        self._later(self._make_ready, name)
        return self._operation(asked, response=_any("Node", self.nodes[name]))

    def _get_node(self, asked: Asked) -> Resource:
        return _found(self.nodes, asked.path)

    def _list_nodes(self, asked: Asked) -> Resource:
        return self._listed("nodes", self.nodes, asked)

    def _patch_node(self, asked: Asked) -> Resource:
        node, patch = _found(self.nodes, asked.path), _parsed(types.Node, asked.body)
        for field in asked.query["updateMask"].split(","):
            _require(field in ("description", "labels", "metadata", "tags"), "update_mask")
            node[field] = patch.get(field, type(node.get(field, ""))())
        threading.Thread(
            target=self._call, args=(self._changed, node, self._given.get(asked.path, []))
        ).start()
        return self._operation(asked, response=_any("Node", node))

    def _delete_node(self, asked: Asked) -> Resource:
        _found(self.nodes, asked.path)["state"] = "DELETING"
        self._later(self._remove_node, asked.path)
        return self._operation(asked, response=_EMPTY)

    def _guest_attributes(self, asked: Asked) -> Resource:
        wanted = _parsed(types.GetGuestAttributesRequest, asked.body)
        _found(self.nodes, asked.path)
        machines = self._given.get(asked.path, [])
        if not (self.answers_host_keys and machines and all(m.host_key for m in machines)):
            raise Refused(404, "no guest attributes")
        workers = [int(w) for w in wanted.get("workerIds", []) if w] or range(len(machines))
        keys = [str(machines[w].host_key).split()[:2] for w in workers]
        boot = {"namespace": "guestInventory", "key": "ShortName", "value": "ubuntu"}
        return {
            "guestAttributes": [
                {"queryValue": {"items": [boot, {"namespace": "hostkeys", "key": kind, "value": value}]}}
                for kind, value in keys
            ]
        }

    def _accelerator_types(self, asked: Asked) -> Resource:
        found = {
            name: {"name": name, "type": kind}
            for zone, generations in ZONES.items()
            for kind in MACHINES
            if kind.partition("-")[0] in generations
            for name in [f"projects/{PROJECT}/locations/{zone}/acceleratorTypes/{kind}"]
        }
        return self._listed("acceleratorTypes", found, asked)

    def _locations(self, asked: Asked) -> Resource:
        return {"locations": [{"name": f"{asked.path}/{zone}", "locationId": zone} for zone in ZONES]}

    def _listed(self, key: str, resources: Mapping[str, Resource], asked: Asked) -> Resource:
        matching = [r for n, r in sorted(resources.items()) if asked.zone in ("-", n.split("/")[3])]
        start = int(asked.query.get("pageToken", 0))
        end = start + min(int(asked.query.get("pageSize", self.page)), self.page)
        return {key: matching[start:end]} | ({"nextPageToken": str(end)} if end < len(matching) else {})


_P = r"/v2/(projects/[^/:]+/locations"
_QUEUED, _NODES = _P + r"/[^/]+/queuedResources", _P + r"/[^/]+/nodes"
_LIST = ("pageSize", "pageToken")
_ROUTES: list[tuple[str, str, str, Callable[[Server, Asked], Resource], tuple[str, ...]]] = [
    ("POST", _QUEUED + ")", "queuedResources.create", Server._create_queued_resource, ("queuedResourceId", "requestId")),
    ("GET", _QUEUED + ")", "queuedResources.list", Server._list_queued_resources, _LIST),
    ("GET", _QUEUED + "/[^/:]+)", "queuedResources.get", Server._get_queued_resource, ()),
    ("DELETE", _QUEUED + "/[^/:]+)", "queuedResources.delete", Server._delete_queued_resource, ("force", "requestId")),
    ("POST", _QUEUED + "/[^/:]+):reset", "queuedResources.reset", Server._reset_queued_resource, ()),
    ("POST", _NODES + ")", "nodes.create", Server._create_node, ("nodeId",)),
    ("GET", _NODES + ")", "nodes.list", Server._list_nodes, _LIST),
    ("GET", _NODES + "/[^/:]+)", "nodes.get", Server._get_node, ()),
    ("PATCH", _NODES + "/[^/:]+)", "nodes.patch", Server._patch_node, ("updateMask",)),
    ("DELETE", _NODES + "/[^/:]+)", "nodes.delete", Server._delete_node, ()),
    ("POST", _NODES + "/[^/:]+):getGuestAttributes", "nodes.getGuestAttributes", Server._guest_attributes, ()),
    ("GET", _P + "/[^/]+/operations/[^/]+)", "operations.get", Server._get_operation, ()),
    ("GET", _P + "/[^/]+/acceleratorTypes)", "acceleratorTypes.list", Server._accelerator_types, _LIST),
    ("GET", _P + ")", "locations.list", Server._locations, _LIST),
]  # fmt: skip
_EMPTY = {"@type": "type.googleapis.com/google.protobuf.Empty"}


def _parsed(message: Any, body: bytes) -> Resource:
    """A body as JSON with the field names of the API. Refuses unknown fields, as Google does."""
    try:
        parsed = message.from_json(body.decode() or "{}", ignore_unknown_fields=False)
    except json_format.ParseError as e:
        raise MalformedError(f"Invalid JSON payload received. {e}") from None
    return json_format.MessageToDict(message.pb(parsed))


def _check_node(node: Resource, zone: str) -> None:
    _require("runtimeVersion" in node, "node.runtime_version")
    _require(("acceleratorType" in node) != ("acceleratorConfig" in node), "node.accelerator_type")
    _require(len(node.get("description", "")) <= 512, "node.description")
    for key, value in node.get("labels", {}).items():
        _require(re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key), f"node.labels key {key!r}")
        _require(re.fullmatch(r"[a-z0-9_-]{0,63}", value), f"node.labels value {value!r}")
    for tag in node.get("tags", []):
        _require(re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", tag), f"node.tags {tag!r}")
    kind = node.get("acceleratorType")
    if kind and (kind not in MACHINES or kind.partition("-")[0] not in ZONES.get(zone, ())):
        words = f"Cloud TPU received a bad request. the accelerator {kind} was not found in zone {zone}"
        raise Refused(400, words)


def _num_machines(node: Resource) -> int:
    if kind := node.get("acceleratorType"):
        return MACHINES[kind]
    return max(1, math.prod(map(int, node["acceleratorConfig"]["topology"].split("x"))) // 4)


def _node_ids(queued: Resource) -> list[tuple[Resource, str]]:
    """(spec, node id) for each node of a queued resource."""
    found = []
    for spec in queued["tpu"]["nodeSpec"]:
        several = spec.get("multisliceParams", {})
        prefix = several.get("nodeIdPrefix")
        ids = [f"{prefix}-{i}" for i in range(several["nodeCount"])] if several else [spec["nodeId"]]
        found += [(spec, i) for i in ids]
    return found


def _new_id(asked: Asked, parameter: str) -> str:
    value = asked.query.get(parameter, "")
    _require(re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", value), f"{parameter} {value!r}")
    return value


def _require(holds: Any, field: str) -> None:
    if not holds:
        raise MalformedError(f"Invalid value for field {field}")


def _check_absent(resources: Mapping[str, Resource], name: str) -> None:
    if name in resources:
        raise Refused(409, f"Resource '{name}' already exists")


def _found(resources: Mapping[str, Resource], name: str) -> Resource:
    if name not in resources:
        raise Refused(404, f"Resource '{name}' was not found")
    return resources[name]


def _any(kind: str, resource: Resource) -> Resource:
    return {"@type": f"type.googleapis.com/google.cloud.tpu.v2.{kind}", **resource}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@contextmanager
def in_use(monkeypatch: pytest.MonkeyPatch, server: Server) -> Iterator[Server]:
    """The launcher's own client asks this server, and neither waits long for the other."""
    server.seconds = 0.02
    for name, value in environment(server.address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launcher.providers.cloud_tpu.POLL_SECONDS", 0.01)
    yield server
    server.close()


def environment(address: str) -> dict[str, str]:
    """Environment with which launcher/providers uses only the server at `address`."""
    return {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": address,
        "GOOGLE_CLOUD_PROJECT": PROJECT,
        "CLOUDSDK_COMPUTE_ZONE": ZONE,
        "GCE_METADATA_ROOT": "127.0.0.1:9",  # nobody: no minute's search for credentials
        "GCE_METADATA_HOST": "127.0.0.1:9",
        "NO_GCE_CHECK": "true",
    }


class _TcpServer(ThreadingTCPServer):  # an HTTPServer looks its own name up
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_: Server

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True  # the client has gone

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server_.authorizations |= {*filter(None, [self.headers.get("Authorization")])}
        status, answer = self.server_.answer(
            self.command, url.path, dict(parse_qsl(url.query, keep_blank_values=True)), body
        )
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0)
    server = Server(port=parser.parse_args().port)
    print(server.address, flush=True)  # noqa: T201
    threading.Event().wait()


if __name__ == "__main__":
    main()
