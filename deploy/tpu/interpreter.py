"""On a TPU VM: `interpreter.py FOLDER [ADDRESS]` fetches the Python that interpreter.json pins, and unpacks it to FOLDER.

It comes from ADDRESS, https:// or gs://, or else from the address of the pin, and only with the pinned SHA-256.
environment.sh calls it, on any Python from 3.8 on.
"""

import hashlib
import http.client
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

PIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "interpreter.json")
TIMEOUT_SECONDS = 60
TRIES = 4
# The metadata server is this machine's own, so a proxy of the environment is never asked.
OWN = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def request_for(address, file):
    """The request for a file in a folder under https:// or gs://."""
    if not address.startswith("gs://"):
        return urllib.request.Request(f"{address.rstrip('/')}/{urllib.parse.quote(file)}")  # noqa: S310
    bucket, _, prefix = address[len("gs://") :].partition("/")
    name = urllib.parse.quote("/".join(filter(None, [prefix.strip("/"), file])), safe="")
    # The variable of Google's own clients. An address without TLS gets no credentials.
    service = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com").rstrip("/")
    request = urllib.request.Request(f"{service}/storage/v1/b/{bucket}/o/{name}?alt=media")  # noqa: S310
    if service.startswith("https://"):
        request.add_header("Authorization", "Bearer " + token())
    return request


def token():
    """An access token of the VM's service account."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/service-accounts/default/token"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with OWN.open(request, timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)["access_token"]


def copy(address, file, to):
    """Copy a file to the open file `to`; its SHA-256."""
    digest = hashlib.sha256()
    to.seek(0)
    to.truncate()
    with urllib.request.urlopen(request_for(address, file), timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
        for piece in iter(lambda: answer.read(1 << 20), b""):
            digest.update(piece)
            to.write(piece)
    return digest.hexdigest()


def fetch(address, file, to):
    """`copy`, with some tries."""
    tries = 0
    while True:
        try:
            return copy(address, file, to)
        except (OSError, http.client.HTTPException) as e:
            tries += 1
            if tries == TRIES or (isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 429):
                raise
            time.sleep(2**tries)


def main():
    folder = sys.argv[1]
    with open(PIN, encoding="utf-8") as f:
        pin = json.load(f)
    address = sys.argv[2] if len(sys.argv) > 2 and sys.argv[2] else pin["address"]
    where = f"{address.rstrip('/')}/{pin['file']}"
    with tempfile.TemporaryFile() as archive:
        try:
            found = fetch(address, pin["file"], archive)
        except (OSError, http.client.HTTPException) as e:
            sys.exit(
                f"the Python of the environment cannot be fetched from {where}: {e}; copy that file to a bucket or a "
                "server that the VMs reach, and set the cluster's interpreter to its folder"
            )
        if found != pin["sha256"]:
            sys.exit(
                f"{where} has SHA-256 {found}, and deploy/tpu/interpreter.json has {pin['sha256']}: it is not used; "
                "copy the right file there"
            )
        archive.seek(0)
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            tar.extractall(folder + ".unpacked")  # noqa: S202 (its digest is the pinned one)
    # The archive has one folder, `python`.
    os.rename(os.path.join(folder + ".unpacked", "python"), folder)
    shutil.rmtree(folder + ".unpacked")


if __name__ == "__main__":
    main()
