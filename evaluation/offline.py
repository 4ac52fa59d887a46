"""No connection leaves this process while it evaluates: what is not in the mirror is an error, and never fetched in silence."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def closed_sockets() -> Iterator[None]:
    """Refuse every connection and name look-up of this process but those to a Unix socket, with an error that says whereto."""
    methods = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
    look_up = socket.getaddrinfo

    def guard(name: str) -> Any:
        def refuse(self: socket.socket, *arguments: Any) -> Any:
            if self.family == socket.AF_UNIX:
                return methods[name](self, *arguments)
            raise refusal(arguments[-1])

        return refuse

    def refuse_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        raise refusal(host)

    for name in methods:
        setattr(socket.socket, name, guard(name))
    socket.getaddrinfo = refuse_look_up
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(socket.socket, name, method)
        socket.getaddrinfo = look_up


def refusal(address: Any) -> ConnectionRefusedError:
    """Return the error of a connection that was refused here."""
    return ConnectionRefusedError(
        f"evaluation: a connection to {address!r} was refused, since evaluation runs offline; put what it would fetch into the "
        "mirror, or take the task out of the suite"
    )
