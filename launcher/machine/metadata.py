"""What the metadata server of a Google VM says (https://cloud.google.com/compute/docs/metadata/overview)."""

import http.client
import os
import re
import urllib.request
from dataclasses import dataclass

HOST = "metadata.google.internal"
TIMEOUT_SECONDS = 2.0
# The server is this machine's own, so a proxy of the environment is never used.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class TpuWorker:
    """One VM of a TPU slice."""

    worker: int
    """Number of this VM in its slice."""
    addresses: tuple[str, ...]
    """Internal addresses of all VMs of the slice, by their numbers."""
    accelerator_type: str
    slice: int
    slices: int
    megascale_coordinator: str | None
    """Address at which several slices meet; None for one slice."""


def get(path: str) -> str | None:
    """The value at instance/`path`; None where there is no such value, or no metadata server."""
    host = os.environ.get("GCE_METADATA_HOST", HOST)  # the variable of Google's own clients
    url = f"http://{host}/computeMetadata/v1/instance/{path}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return str(answer.read().decode())
    except (OSError, http.client.HTTPException):
        return None


def tpu_worker() -> TpuWorker | None:
    """The VM of a TPU slice that this machine is; None where it is no such VM."""
    number, endpoints = get("attributes/agent-worker-number"), get("attributes/worker-network-endpoints")
    if number is None or endpoints is None:
        return None
    # tpu-env has lines of the form `KEY: 'value'`.
    text = get("attributes/tpu-env") or ""
    environment = dict(re.findall(r"^(\w+):\s*'?([^'\n]*)'?\s*$", text, re.MULTILINE))
    return TpuWorker(
        int(number),
        # An endpoint is an address, or name:id:address.
        tuple(endpoint.rpartition(":")[2] for endpoint in endpoints.split(",")),
        get("attributes/accelerator-type") or environment.get("ACCELERATOR_TYPE", ""),
        int(environment.get("MEGASCALE_SLICE_ID", 0)),
        int(environment.get("MEGASCALE_NUM_SLICES", 1)),
        environment.get("MEGASCALE_COORDINATOR_ADDRESS"),
    )


def eviction_notice() -> str | None:
    """A sentence that announces a preemption or a maintenance of this VM; None where none is announced.

    https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
    """
    if (get("preempted") or "").upper() == "TRUE":
        return "this VM is being preempted"
    event = get("maintenance-event") or "NONE"
    return None if event == "NONE" else f"maintenance of this VM is announced: {event}"
