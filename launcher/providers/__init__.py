"""Where the machines of a run are rented. Another cloud, or another API of this one, is one file here.

A provider only creates, watches and deletes machines; launcher/backends/tpu.py decides when.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

Provisioning = Literal["on-demand", "spot", "reserved"]
OWNER = "podlaunch-id"
"""Label with the id of the run that a resource belongs to."""


@dataclass(frozen=True)
class Request:
    """A request for `slices` slices of one kind."""

    name: str
    """Name of the request and of its node; the nodes of several slices are called name-0, name-1 and so on."""
    accelerator_type: str
    """As the provider writes it, such as v4-32."""
    generation: str
    """As the provider writes it, such as V4."""
    runtime: str
    """The provider's name of the software that is installed on the machines."""
    topology: str | None = None
    """Such as 2x2x4, in the place of `accelerator_type`."""
    slices: int = 1
    provisioning: Provisioning = "on-demand"
    reservation: str | None = None
    """Name of the reservation, or its full path; None is any reservation, if `provisioning` is `reserved`."""
    network: str = "default"
    subnetwork: str | None = None
    external_ips: bool = True
    service_account: str | None = None
    """None is the project's default."""
    labels: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    valid_until_hours: float = 24.0
    """How long the request may wait in the queue. No request waits without end: nobody may be left to delete it."""
    startup_script: str = field(default="", repr=False)
    """What each VM runs as root when it starts."""
    idle_minutes: float | None = None
    """After so long without a sign of life from a run, `startup_script` has the machines deleted; None is never."""


@dataclass(frozen=True)
class Condition:
    """The state of a request and its machines."""

    status: str
    """`absent`, `waiting` in the queue, `creating`, `ready`, `repairing` (the machines may come back), `unknown` (ask
    again), `lost` (they do not come back by themselves, another request may), `invalid` (the request failed for a
    reason that the user must mend), or `deleting`."""
    detail: str = ""
    """What the provider says."""
    owner: str = field(default="", compare=False)
    """Value of the label OWNER."""

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}" if self.detail else self.status


@dataclass(frozen=True)
class Machine:
    """One VM, on which one process runs."""

    slice: int
    worker: int
    """Number of the VM in its slice."""
    internal: str
    external: str | None
    host_keys: tuple[str, ...]
    """Public host keys, such as `ssh-ed25519 AAAA…`; empty where the provider does not know them."""
    alias: str
    """Name under which ssh remembers the host keys. No other machine ever has the same."""


@dataclass(frozen=True)
class Resource:
    """A resource that exists, and may cost money."""

    name: str
    zone: str
    accelerator_type: str
    condition: Condition
    created: datetime
    labels: Mapping[str, str]
    description: str


class Provider(Protocol):
    """Raises UserError for what the user must mend, and configs.google.UnreachableError."""

    def create(self, request: Request) -> None:
        """Request machines, and return once the request is accepted. An earlier request of the same name and OWNER counts."""

    def condition(self, name: str) -> Condition:
        """The state of a request, or of a node that was created by other means."""

    def machines(self, name: str) -> list[Machine]:
        """The machines of a request, sorted by slice and worker."""

    def authorize(self, name: str, key: str) -> None:
        """Have the machines accept a `user:public key`, if they do not yet."""

    def delete(self, name: str) -> None:
        """Delete a request and its nodes, and return when none of them exists any more."""

    def list_labelled(self, label: str) -> list[Resource]:
        """Resources that have the label, in all zones. A request and its nodes count as one."""
