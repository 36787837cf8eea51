"""Where the machines of a run are rented. Another cloud, or another API of this one, is one file here.

A provider only makes, watches and deletes machines; launcher/backends/tpu.py decides when, and trains on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

OWNER = "podlaunch-id"
"""Label that says whose a resource is."""


@dataclass(frozen=True)
class Request:
    """What is to be rented: `slices` slices of one kind."""

    name: str
    """Of the request, and of its one node; those of several slices are name-0, name-1, …"""
    accelerator_type: str
    """As the provider writes it, such as v4-32."""
    generation: str
    """As the provider writes it, such as V4."""
    runtime: str
    """What is installed on the machines, by the provider's name."""
    topology: str | None = None
    """Such as 2x2x4: replaces `accelerator_type`."""
    slices: int = 1
    provisioning: Literal["on-demand", "spot", "reserved"] = "on-demand"
    reservation: str | None = None
    """Its name, or its full path."""
    network: str = "default"
    subnetwork: str | None = None
    external_ips: bool = True
    service_account: str | None = None
    """Null: the project's default."""
    labels: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    valid_until_hours: float | None = None
    """How long it may wait in the queue."""


@dataclass(frozen=True)
class Condition:
    """How what was rented stands."""

    word: str
    """`absent`, `waiting` in the queue, `creating`, `ready`, `repairing` (may come back), `lost` (does not come
    back by itself), or `leaving` (is being deleted)."""
    detail: str = ""
    """In the provider's words."""
    owner: str = field(default="", compare=False)
    """Its label OWNER."""

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


@dataclass(frozen=True)
class Machine:
    """One VM, on which one process runs."""

    slice: int
    worker: int
    """Its number in the slice."""
    internal: str
    external: str | None
    host_keys: tuple[str, ...]
    """Public keys by which ssh knows it, such as `ssh-ed25519 AAAA…`; empty where the provider does not tell."""
    alias: str
    """Name under which ssh keeps them: no other machine ever has it."""


@dataclass(frozen=True)
class Found:
    """Something that is there, and may cost money."""

    name: str
    zone: str
    kind: str
    """`node` or `queued resource`."""
    accelerator_type: str
    state: Condition
    created: datetime
    labels: Mapping[str, str]
    description: str


class Provider(Protocol):
    """Raises UserError for what the user must mend, and configs.google.UnreachableError."""

    def create(self, request: Request) -> None:
        """Ask for it, and return once that is accepted. What is there already and has the same OWNER is taken up."""
        ...

    def condition(self, name: str) -> Condition:
        """Also of a node that was made by other means."""
        ...

    def machines(self, name: str) -> list[Machine]:
        """Sorted by slice and worker."""
        ...

    def let_in(self, name: str, key: str) -> None:
        """Have its machines take a `user:public key` that they do not take yet."""
        ...

    def delete(self, name: str) -> None:
        """Delete it with its nodes, and return when all is gone, as it may have been before."""
        ...

    def ours(self, label: str) -> list[Found]:
        """What has the label, in all zones. A request and its nodes are one."""
        ...

    def zones_with(self, accelerator_type: str) -> list[str]: ...
