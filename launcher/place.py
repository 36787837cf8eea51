"""Where in a SLURM step this process is, and at which address the processes of the step meet.

What SLURM says of it: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

import fcntl
import itertools
import os
import re
import socket
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import UserError

SIOCGIFADDR = 0x8915  # netdevice(7)


@dataclass(frozen=True)
class Place:
    """One task of a step."""

    process: int
    processes: int
    local_process: int
    """Among those on its node."""
    node: str
    nodes: tuple[str, ...]
    """All nodes of the step, as SLURM names them."""
    step: str
    """JOB.STEP, as scancel takes it."""
    restart: int
    """How often the job was requeued."""

    @property
    def processes_per_node(self) -> int:
        return self.processes // len(self.nodes)


def in_slurm_step(environment: Mapping[str, str] = os.environ) -> Place | None:
    """From the variables of `srun`; None outside a step, as in a batch script."""
    if "SLURM_STEP_ID" not in environment:
        return None
    place = Place(
        process=int(environment["SLURM_PROCID"]),
        processes=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_process=int(environment["SLURM_LOCALID"]),
        node=environment["SLURMD_NODENAME"],
        nodes=tuple(hostnames(environment["SLURM_STEP_NODELIST"])),
        step=f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}",
        restart=int(environment.get("SLURM_RESTART_COUNT", 0)),
    )
    if place.processes % len(place.nodes):
        raise UserError(
            f"this SLURM step has {place.processes} tasks on {len(place.nodes)} nodes; give each node as many, "
            "with srun --ntasks-per-node"
        )
    return place


def hostnames(nodelist: str) -> list[str]:
    """The nodes of a SLURM node list, in order, as `scontrol show hostnames` expands it."""
    try:
        command = ["scontrol", "show", "hostnames", nodelist]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout:
            return done.stdout.split()
    except FileNotFoundError:
        pass
    return _expanded(nodelist)  # in a container, or with suffixes behind brackets, which SLURM 22.05 refuses


def _expanded(nodelist: str) -> list[str]:
    """`a[01-02,7]b[1-2],c` in full: each item is the product of its brackets."""
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        parts = re.split(r"\[([^\]]*)\]", item)  # text, bracket, text, …
        choices = [numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
        names += ["".join(chosen) for chosen in itertools.product(*choices)]
    return names


def numbers(bracket: str) -> list[str]:
    """`01-03,7` in full, as wide as written."""
    found = []
    for part in bracket.split(","):
        first, _, last = part.partition("-")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return found


def address(place: Place, interface: str | None) -> str:
    """IPv4 address of this host at which the others reach it: of `interface`, else of the one that leads to them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            if interface is not None:
                request = struct.pack("256s", interface.encode()[:15])
                return socket.inet_ntoa(fcntl.ioctl(s.fileno(), SIOCGIFADDR, request)[20:24])
            others = [node for node in place.nodes if node != place.node]
            s.connect((others[0] if others else "127.0.0.1", 9))  # of a datagram socket: sends nothing
            return str(s.getsockname()[0])
        except OSError as e:
            what = f"has no network interface {interface}" if interface else f"finds no way to {others[0]}"
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(
                f"{place.node} {what} ({e.strerror}); set the cluster's interface to one of: {names}"
            ) from None


def hold_port(host: str, port: int = 0) -> socket.socket:
    """A socket that keeps `port` of `host`, by default a free one, for jax's coordinator for as long as it is open.

    It never listens. Both set SO_REUSEPORT, as gRPC does, so the coordinator may bind the port, too; the
    kernel gives it to nobody else, neither to a job that looks for a free one nor to a connection.
    """
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind((host, port))
    return s
