"""The address and the port at which the processes of a run meet."""

import socket

import pytest

from configs.errors import UserError
from launcher.machine.network import address, reserve_port


def test_address_is_that_of_the_interface_asked_for():
    assert address("n1", [], "lo") == "127.0.0.1"


def test_processes_of_one_node_meet_on_loopback():
    assert address("n1", [], None) == "127.0.0.1"


def test_address_is_the_one_that_leads_to_the_other_nodes():
    assert address("n1", ["localhost"], None) == "127.0.0.1"


def test_interface_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(UserError, match=r"n1 has no network interface ib9 .* one of: .*lo"):
        address("n1", [], "ib9")


def test_nodes_that_cannot_be_found_are_told():
    with pytest.raises(UserError, match=r"n1 finds no way to nowhere\.invalid"):
        address("n1", ["nowhere.invalid"], None)


def test_held_port_is_the_coordinators_and_nobody_elses():
    with reserve_port("127.0.0.1") as held, reserve_port("127.0.0.1") as other:
        name = held.getsockname()
        assert other.getsockname() != name
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(name)
        with socket.socket() as coordinator:  # as gRPC does
            coordinator.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            coordinator.bind(name)
            coordinator.listen()
            with socket.create_connection(name, timeout=5) as client:
                coordinator.accept()[0].close()
                assert client.recv(1) == b""
