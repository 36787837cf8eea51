"""TPU VMs on this machine: where a launch's time goes, commands on many hosts at once, the VMs' Python.

The VMs and Google's API are those of the tests, so the first two need root and sshd. Launches: from typing
`launch` to the end of the first step, on a slice that is created, and of the same run again on its kept hosts.
Fan-out: a look at each host and the code to each, as a launch does it, beside loops of the same commands; all
hosts are addresses of one VM. Environment: deploy/tpu/environment.sh with the real lock file, from its network.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Network
from itertools import islice
from pathlib import Path

from benchmarks._common import REPOSITORY, print_table
from configs.clusters import TpuCluster
from launcher.host.agent import FOLDER
from launcher.providers import Machine
from launcher.remote import shipping
from launcher.remote.prepare import bootstrap_command
from launcher.remote.ssh import Ssh, connected
from launcher.rundir import RunDirectory, run_id
from tests.clusters import cloud as clouds
from tests.clusters import network
from tests.clusters import tpu as slices
from tests.clusters.cloud import Cloud, CloudRun
from tests.clusters.tpu import HOSTS, Slice

PARTS = ("launches", "fan-out", "environment")
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
# One program for any number of steps, so that the second launch finds it compiled.
CONSTANT = ("schedule.name=constant", "schedule.warmup_epochs=0")
IN_LAUNCH = {
    "API": "hosts",
    "ssh": "ssh",
    "copy": "copy",
    "environment": "environment",
    "checks": "checks",
}
IN_WORKER = {
    "import jax, flax, …": ["import"],
    "join": ["join"],
    "open data": ["open_data"],
    "initialise or restore": ["initialise", "restore"],
    "compile": ["compile"],
    "first batch": ["first_batch"],
    "first step": ["first_step"],
}
ADDRESSES = IPv4Network("10.77.8.0/23")
WAYS = {
    "each, as launch does": (True, ()),
    "a loop": (False, ()),
    "a loop, a connection a command": (False, ("ControlMaster=no", "ControlPath=none")),
}


# Launches


def launch(run: CloudRun, accelerator: str, attempt: int) -> dict[str, float]:
    """The split of process 0, from typing to the end of the first step."""
    typed = time.time()
    launched = run.launch("--keep", f"train.steps={attempt}", *CONSTANT, cluster=f"tpu-{accelerator}")
    folder = Path(FOLDER, run_id(run.location), "run")

    def trains() -> bool:
        """By the word on the VM's disk; on gs:// it is seconds old."""
        vms = run.cloud.vms
        reports = [RunDirectory(vms.home(k) / folder).hosts.report(0) for k in range(len(vms.machines))]
        return any("first_step" in r.get("seconds", {}) and r["begun"] > typed for r in reports)

    run.wait_until(trains, "the first step")
    total = time.time() - typed
    if launched.wait():
        raise SystemExit(launched.text)
    name = f"{run.prefix}logs/attempt-{attempt}/where.json"
    where = json.loads(run.cloud.storage.contents(name)[name])
    report = run.hosts.report()
    before = {label: where["start_seconds"][key] for label, key in IN_LAUNCH.items()}
    split = {
        "launcher: import, plan, request": where["begun"] - typed,
        **before,
        "start: agent, Python": report["begun"] - where["begun"] - sum(before.values()),
        **{label: sum(report["seconds"].get(k, 0.0) for k in keys) for label, keys in IN_WORKER.items()},
    }
    return split | {"rest": total - sum(split.values()), "typing to first step": total}


def launches(accelerators: list[str], rounds: int) -> None:
    os.environ.setdefault("XLA_FLAGS", "")  # the testbed gives its VMs what the tests have
    columns: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary, clouds.raised(Path(temporary, "cache")) as cloud:
        for accelerator in accelerators * rounds:
            for what, split in launched_twice(cloud, temporary, accelerator).items():
                columns.setdefault(f"{accelerator}, {what}", []).append(split)
    phases = next(iter(columns.values()))[0]
    medians = [[statistics.median(split[phase] for split in c) for c in columns.values()] for phase in phases]
    print_table(
        ["seconds, process 0", *columns],
        [[phase, *(f"{seconds:.2f}" for seconds in row)] for phase, row in zip(phases, medians, strict=True)],
    )


def launched_twice(cloud: Cloud, temporary: str, accelerator: str) -> dict[str, dict[str, float]]:
    """On a new slice, without compiled programs, and again on the same hosts."""
    shutil.rmtree(Path(temporary, "cache"), ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=temporary))
    run = CloudRun(cloud, folder, QUICKSTART)
    cloud.write_clusters(folder / "home", accelerator)
    try:
        return {"created": launch(run, accelerator, 1), "kept": launch(run, accelerator, 2)}
    finally:
        run.end()
        cloud.clear()


# Fan-out


def fan_out(counts: list[int]) -> None:
    packed = shipping.CodeArchive(shipping.pack(100.0)).delta({})
    assert packed is not None
    with tempfile.TemporaryDirectory() as folder, slices.raised("2g") as vms:
        cluster, machines = many_hosts(vms, Path(folder))
        rows = []
        for count in counts:
            for way, (at_once, options) in WAYS.items():
                asked = cluster.model_copy(update={"ssh_options": options})
                home = vms.home_there(0) / "many"
                figures = reach(asked, machines[:count], home, packed, at_once)
                vms.run(0, "rm", "-rf", str(home))
                rows.append([f"{count} hosts, {way}", *figures])
    print_table(["", "look s", "copy s", "close s", "MiB", "processes"], rows)
    print(f"the code: {len(packed) / 2**20:.2f} MiB")


def many_hosts(vms: Slice, folder: Path) -> tuple[TpuCluster, list[Machine]]:
    """Addresses of the first VM, whose sshd listens on all of them."""
    network.ip("route", "add", str(ADDRESSES), "via", HOSTS[0].address, check=True)
    vms.run(0, "ip", "route", "add", "local", str(ADDRESSES), "dev", "lo")
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    vms.authorize(0, [key.with_name("key.pub").read_text()])
    settings = vms.folder / "vm-0" / "sshd_config"
    everywhere = settings.read_text().replace(HOSTS[0].address, "0.0.0.0")  # noqa: S104
    settings.write_text(f"{everywhere}MaxStartups 1000\n")
    vms.stop_sshd(0)
    vms.start_sshd(0)
    cluster = TpuCluster(accelerator="v4-2048", reach="internal", ssh_user="root", ssh_key=str(key))
    keys = (vms.machines[0].host_key,)
    return cluster, [
        Machine(0, number, str(address), None, keys, f"host-{number}")
        for number, address in enumerate(islice(ADDRESSES.hosts(), 256))
    ]


def reach(
    cluster: TpuCluster, machines: list[Machine], home: Path, packed: bytes, at_once: bool
) -> list[str]:
    """Seconds of each step; memory and number of ssh's processes while a command is open on each host."""
    before = pss_bytes("self")
    with connected(cluster, machines) as ssh:

        def told(command: str, text: bytes = b"") -> Callable[[int], bytes]:
            return lambda process: ssh.run(
                process, *bootstrap_command(command, f"{home}/{process}"), text=text
            )

        seconds = [timed(ssh, told("probe"), at_once), timed(ssh, told("receive", packed), at_once)]
        channels = ssh.each(lambda process: opened(ssh, process))
        pids = pids_of(ssh)
        grown = pss_bytes("self") - before
        memory = grown + sum(map(pss_bytes, pids))
        for channel in channels:
            channel.communicate()
        ended = time.perf_counter()
    seconds.append(time.perf_counter() - ended)
    return [*(f"{s:.1f}" for s in seconds), f"{memory / 2**20:.0f}", str(len(pids))]


def opened(ssh: Ssh, process: int) -> "subprocess.Popen[bytes]":
    """A command on a host that has answered, and waits."""
    channel = ssh.open(process, "sh", "-c", "echo here; cat")
    assert channel.stdout is not None
    assert channel.stdout.readline() == b"here\n"
    return channel


def timed(ssh: Ssh, work: Callable[[int], bytes], at_once: bool) -> float:
    begun = time.perf_counter()
    if at_once:
        ssh.each(work)
    else:
        for process in range(len(ssh.machines)):
            work(process)
    return time.perf_counter() - begun


def pids_of(ssh: Ssh) -> list[str]:
    """Of all clients that were given its folder, and of the shared connections, which tell it in their titles."""
    option = next(word for word in ssh.command(0) if word.startswith("UserKnownHostsFile="))
    sign = str(Path(option.partition("=")[2]).parent).encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if sign in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def pss_bytes(pid: str) -> int:
    """Its memory, with its share of what it has in common with others."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


# Environment


def environment() -> None:
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code")
        for name in (shipping.SETUP, shipping.LOCK, *shipping.INTERPRETER):
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, code / name)
        rows = []
        for what in ("the first time", "the second time"):
            begun = time.perf_counter()
            subprocess.run(
                ["sh", code / shipping.SETUP, f"{folder}/environments"],
                env=os.environ | {"PIP_NO_CACHE_DIR": "1"}, check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            rows.append([what, f"{time.perf_counter() - begun:.2f}", f"{mib_of(Path(folder)):.0f}"])
    print_table(["environment.sh", "s", "MiB"], rows)


def mib_of(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*")) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument("--accelerators", nargs="+", default=["v4-16"], help="v4-8, v4-16, v4-32")
    parser.add_argument("--rounds", type=int, default=3, help="of launches, whose medians are told")
    parser.add_argument("--hosts", nargs="+", type=int, default=[8, 64, 256], help="256 at most")
    args = parser.parse_args()
    if args.parts != ["environment"] and (reason := slices.missing()):
        raise SystemExit(reason)
    if "launches" in args.parts:
        launches(args.accelerators, args.rounds)
    if "fan-out" in args.parts:
        fan_out(args.hosts)
    if "environment" in args.parts:
        environment()


if __name__ == "__main__":
    main()
