"""Sockets are closed while a benchmark runs, and open again after it."""

import socket
import threading

import pytest

from evaluation.harness.offline import closed_sockets


@pytest.fixture
def server() -> socket.socket:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(10)
    return listening


def test_connections_are_refused_by_their_address_and_possible_again(server: socket.socket) -> None:
    address = server.getsockname()
    with closed_sockets():
        for connect in (socket.create_connection, lambda where: socket.socket().connect(where)):
            with pytest.raises(
                ConnectionRefusedError, match=r"evaluation: a connection to .*127\.0\.0\.1.* was refused"
            ):
                connect(address)
        with pytest.raises(ConnectionRefusedError):
            socket.socket().connect_ex(address)
        with pytest.raises(ConnectionRefusedError, match="huggingface"):
            socket.getaddrinfo("huggingface.co", 443)
    with socket.create_connection(address):
        server.accept()[0].close()
    server.close()


def test_the_one_place_that_is_named_stays_open(server: socket.socket) -> None:
    port = server.getsockname()[1]
    with closed_sockets(but=("localhost", port)):
        with socket.create_connection(("localhost", port)):
            server.accept()[0].close()
        with pytest.raises(ConnectionRefusedError, match="was refused"):
            socket.create_connection(("localhost", port + 1))
        with pytest.raises(ConnectionRefusedError, match="was refused"):
            socket.socket().connect(("127.0.0.1", port + 1))
    server.close()


def test_a_unix_socket_stays_open() -> None:
    with closed_sockets():
        ours, theirs = socket.socketpair()
        threading.Thread(target=theirs.sendall, args=(b"x",)).start()
        assert ours.recv(1) == b"x"
    ours.close()
    theirs.close()
