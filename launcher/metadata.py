"""On a Google VM: what its metadata server says of it (https://cloud.google.com/compute/docs/metadata/overview)."""

import http.client
import os
import re
import urllib.request
from dataclasses import dataclass

HOST = "metadata.google.internal"
TIMEOUT_SECONDS = 2.0
# Never through a proxy: the server is this machine's own.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class TpuWorker:
    """One VM of a TPU slice."""

    worker: int
    """Its number in the slice."""
    addresses: tuple[str, ...]
    """Of all VMs of the slice, by their numbers."""
    accelerator_type: str
    slice: int
    slices: int
    megascale_coordinator: str | None
    """Where the slices meet, if there are several."""


def get(path: str) -> str | None:
    """The value at instance/`path`; None where there is none, or no metadata server."""
    host = os.environ.get("GCE_METADATA_HOST", HOST)  # as Google's own clients
    url = f"http://{host}/computeMetadata/v1/instance/{path}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return str(answer.read().decode())
    except (OSError, http.client.HTTPException):
        return None


def tpu_worker() -> TpuWorker | None:
    """Which VM of a slice this is; None where it is none."""
    number, endpoints = get("attributes/agent-worker-number"), get("attributes/worker-network-endpoints")
    if number is None or endpoints is None:
        return None
    # `KEY: 'value'` lines.
    environment = dict(
        re.findall(r"^(\w+):\s*'?([^'\n]*)'?\s*$", get("attributes/tpu-env") or "", re.MULTILINE)
    )
    return TpuWorker(
        int(number),
        # Bare addresses, or name:id:address.
        tuple(endpoint.rpartition(":")[2] for endpoint in endpoints.split(",")),
        get("attributes/accelerator-type") or environment.get("ACCELERATOR_TYPE", ""),
        int(environment.get("MEGASCALE_SLICE_ID", 0)),
        int(environment.get("MEGASCALE_NUM_SLICES", 1)),
        environment.get("MEGASCALE_COORDINATOR_ADDRESS"),
    )


def notice() -> str | None:
    """That this VM is about to be taken away, in words; None where nothing is known of it.

    https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
    """
    if (get("preempted") or "").upper() == "TRUE":
        return "this VM is being preempted"
    event = get("maintenance-event") or "NONE"
    return None if event == "NONE" else f"maintenance of this VM is announced: {event}"
