"""The address and the port of this machine at which the processes of a run meet."""

import fcntl
import socket
import struct
from collections.abc import Sequence

from configs.errors import UserError

SIOCGIFADDR = 0x8915  # netdevice(7)


def address(node: str, others: Sequence[str], interface: str | None) -> str:
    """The IPv4 address at which the other nodes, by their names or addresses, reach this one, called `node`.

    It is the address of `interface`, or without one that of the interface through which the first of the other
    nodes is reached. Raises UserError where there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            if interface is not None:
                request = struct.pack("256s", interface.encode()[:15])
                return socket.inet_ntoa(fcntl.ioctl(s.fileno(), SIOCGIFADDR, request)[20:24])
            # To connect a datagram socket sends nothing: the kernel only chooses the route.
            s.connect((others[0] if others else "127.0.0.1", 9))
            return str(s.getsockname()[0])
        except OSError as e:
            what = f"has no network interface {interface}" if interface else f"finds no way to {others[0]}"
            problem = f"{node} {what} ({e.strerror})"
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(f"{problem}; set the cluster's interface to one of: {names}") from None


def reserve_port(host: str, port: int = 0) -> socket.socket:
    """A socket that reserves `port` of `host`, by default a free one, for jax's coordinator while the socket is open.

    The port that is free now may be taken a second later, and jax aborts where its coordinator cannot bind. The
    socket never listens. It sets SO_REUSEPORT, as gRPC does, so that the coordinator can bind the port too;
    the kernel gives the port to nobody else, neither to a job that looks for a free one nor to a connection.
    """
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind((host, port))
    return s
