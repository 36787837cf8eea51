"""A Google Cloud on this machine: the VMs of tpu.py, an API that hands them out, and a bucket.

`launch` there is the laptop's. What the API does to a node, creation, preemption, deletion, happens to the VMs.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.rundir import run_id
from tests import gcs, tpu_api
from tests.clusters.runs import SAVE_EVERY, Command, Run
from tests.clusters.tpu import Slice
from tests.gcs import BUCKET
from tests.gcs import Server as Storage
from tests.tpu_api import MACHINES, TestMachine

STEPS = 3 * SAVE_EVERY
SHORT = f"train.steps={STEPS}"
ONE_VM = "tpu-v4-8"
CLUSTERS = """\
{name}:
  accelerator: {accelerator}
  platform: cpu
  python: {python}
  min_disk_gib: 0.05
  contact_seconds: 8
  environment: {environment}
"""


class Cloud:
    def __init__(self, vms: Slice, cache: Path):
        self.vms, self._cache = vms, cache
        self.storage = Storage(host=vms.here)
        machines = [self._machine(k) for k in range(len(vms.machines))]
        self._numbers = {m.internal_address: k for k, m in enumerate(vms.machines)}
        self.api = tpu_api.Server(machines, started=self._started, changed=self._let_in, ended=self._ended)

    def close(self) -> None:
        self.api.close()
        self.storage.close()

    def number(self, machine: TestMachine) -> int:
        return self._numbers[machine.internal]

    def _machine(self, k: int) -> TestMachine:
        machine = self.vms.machines[k]
        return TestMachine(machine.internal_address, machine.external_address, machine.host_key)

    def _started(
        self, node: dict[str, Any], machines: list[TestMachine], accelerator: str = "unknown"
    ) -> None:
        addresses = ",".join(f"unknown:unknown:{m.internal}" for m in machines)
        for worker, machine in enumerate(machines):
            k = self.number(machine)
            self.vms.set_metadata(k, "instance/preempted", "FALSE")
            self.vms.set_metadata(k, "instance/maintenance-event", "NONE")
            self.vms.set_attributes(
                k,
                {
                    "accelerator-type": node.get("acceleratorType", accelerator),
                    "agent-worker-number": str(worker),
                    "worker-network-endpoints": addresses,
                },
            )

        self._let_in(node, machines)

    def _let_in(self, node: dict[str, Any], machines: list[TestMachine]) -> None:
        """As the guest agent of a VM does."""
        keys = [user.partition(":")[2] for user in node["metadata"].get("ssh-keys", "").splitlines()]
        for machine in machines:
            self.vms.authorize(self.number(machine), keys)

    def _ended(self, node: dict[str, Any], machines: list[TestMachine]) -> None:
        for machine in machines:
            self.vms.wipe(self.number(machine))
            self.vms.authorize(self.number(machine), [])

    def environment(self, home: Path) -> dict[str, str]:
        """Of a laptop."""
        return {
            **os.environ,
            **gcs.environment(self.storage.address),
            **tpu_api.environment(self.api.address),
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / ".config"),
            "XDG_STATE_HOME": str(home / ".local" / "state"),
        }

    def environment_there(self) -> dict[str, str]:
        """Of a VM, which asks its metadata server for credentials."""
        values = gcs.environment(self.storage.address)
        return {
            name: value for name, value in values.items() if "GCE" not in name or name.startswith("GCSFS")
        }

    def write_clusters(
        self, home: Path, *accelerators: str, environment: Mapping[str, str], **settings: Any
    ) -> None:
        """Entries of the laptop's own clusters.yaml, with what stands for TPU chips here; `environment`: of workers."""
        file = home / ".config" / "podlaunch" / "clusters.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        more = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in settings.items())
        file.write_text(
            "".join(
                CLUSTERS.format(
                    name=f"tpu-{accelerator}",
                    accelerator=accelerator,
                    python=sys.executable,
                    environment=json.dumps(
                        {
                            **self.environment_there(),
                            "JAX_COMPILATION_CACHE_DIR": str(self._cache),
                            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
                            **environment,
                        }
                    ),
                )
                + more
                for accelerator in accelerators
            )
        )

    @property
    def nothing_is_left(self) -> bool:
        return not self.api.nodes and not self.api.queued_resources

    def creations(self) -> int:
        """How often something was to be created."""
        return sum(1 for method, path in self.api.log if method == "POST" and "queuedResources" in path)

    def give(self, accelerator: str) -> list[int]:
        """VMs of a slice that somebody has created by other means."""
        count = MACHINES[accelerator]
        node = {"metadata": {"ssh-keys": ""}}
        self._started(node, [self._machine(k) for k in range(count)], accelerator)
        return list(range(count))

    def delete(self, name: str) -> None:
        from launcher.providers.cloud_tpu import CloudTpu

        with pytest.MonkeyPatch.context() as patch:
            for key, value in tpu_api.environment(self.api.address).items():
                patch.setenv(key, value)
            CloudTpu(tpu_api.PROJECT, tpu_api.ZONE).delete(name)

    def clear(self) -> None:
        """All VMs are free and empty, whatever a test has left."""
        self.api.release()
        for queued in list(self.api.queued_resources):
            self.delete(queued.rpartition("/")[2])
        for k in range(len(self.vms.machines)):
            self.vms.wipe(k)


class CloudRun(Run):
    """A run whose directory is on gs://."""

    def __init__(
        self, cloud: Cloud, folder: Path, recipe: Path, *, stub: bool, like: "CloudRun | None" = None,
        **settings: Any,
    ):  # fmt: skip
        home = folder / "home"
        home.mkdir()
        super().__init__(folder, recipe, cloud.environment(home), stub=stub)
        self.cloud = cloud
        self._stub = self.stub_environment() if stub else {}
        cloud.write_clusters(home, "v4-8", "v4-16", "v4-32", environment=self._stub, **settings)
        self.root_place = like.root_place if like else f"gs://{BUCKET}/{folder.name}"
        self.name = recipe.stem
        self.place = f"{self.root_place}/{self.name}"
        self.prefix = self.place.removeprefix(f"gs://{BUCKET}/") + "/"

    def slice(self) -> str:
        """The name of what is created for it."""
        return f"podlaunch-{self.name}-{run_id(self.place)[:6]}"

    def node(self) -> str:
        return next(name for name in self.cloud.api.nodes if name.endswith(self.slice()))

    def machines(self) -> list[int]:
        """Numbers of the VMs that it has, by process."""
        endpoints = self.cloud.api.nodes[self.node()]["networkEndpoints"]
        addresses = [m.internal_address for m in self.cloud.vms.machines]
        return [addresses.index(endpoint["ipAddress"]) for endpoint in endpoints]

    def on_vm(self, k: int, *arguments: str, **environment: str) -> Command:
        """Type a `launch` command on a VM."""
        values = {
            **self.cloud.environment_there(), "JAX_PLATFORMS": "cpu",
            "HOME": str(self.cloud.vms.home_there(k)), **self._stub, **environment,
        }  # fmt: skip
        command = Command(
            list(arguments), os.environ | values, self.folder / f"vm-{k}.txt", self.cloud.vms.inside(k)
        )
        self._commands.append(command)
        return command

    def launch(self, *more: str, cluster: str | None = "tpu-v4-16") -> Command:
        return super().launch(*more, cluster=cluster)

    def arguments(self, *more: str, cluster: str | None = "tpu-v4-16") -> list[str]:
        where = [] if cluster is None else ["--cluster", cluster]
        return [str(self.recipe), "--root", self.root_place, "--yes", *where, *more]

    def command(self, name: str, *more: str) -> Command:
        return self.plain(name, "--root", self.root_place, *more)

    def end(self) -> None:
        for command in self._commands:
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait()

    def _read(self, name: str) -> str | None:
        content = self.cloud.storage.contents(self.prefix + name).get(self.prefix + name)
        return None if content is None else content.decode()

    def result(self) -> dict:
        return json.loads(self._read("result.json") or "null")

    def attempts(self) -> list[dict]:
        return [json.loads(line) for line in (self._read("attempts.jsonl") or "").splitlines()]

    def report(self, process: int = 0) -> dict:
        return json.loads(self._read(f"hosts/{process}.json") or "{}")

    def log(self, attempt: int, process: int = 0) -> str:
        return self._read(f"logs/attempt-{attempt}/host-{process}.log") or ""

    def wait_for_step(self, step: int, *, attempt: int = 1) -> None:
        def reached() -> bool:
            report = self.report()
            begun = self._read(f"logs/attempt-{attempt}/attempt.json") is not None
            return begun and report.get("phase") == "training" and report.get("step", 0) >= step

        self.wait_until(reached, f"step {step} of attempt {attempt}")

    def checkpoint_steps(self) -> list[int]:
        below = f"{self.prefix}checkpoints/"
        names = [n.removeprefix(below).split("/") for n in self.cloud.storage.contents(below)]
        return sorted(int(folder) for folder, *rest in names if rest == ["commit_success.txt"])

    def download(self) -> None:
        """To where the others keep theirs, so that bits can be compared."""
        for name, content in self.cloud.storage.contents(f"{self.prefix}checkpoints/").items():
            file = self.path / name.removeprefix(self.prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def workers(self) -> dict[int, int]:
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            values = dict(v.partition(b"=")[::2] for v in environment)
            if run_id(self.place).encode() in values.get(b"LAUNCH_RUN", b""):
                found[int(values[b"LAUNCH_PROCESS"])] = int(process.name)
        return found


@contextmanager
def raised(vms: Slice, cache: Path) -> Iterator[Cloud]:
    cloud = Cloud(vms, cache)
    try:
        yield cloud
    finally:
        cloud.close()
