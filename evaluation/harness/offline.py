"""No connection leaves this process while it evaluates: what is not in the mirror is an error, and never fetched in silence."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def closed_sockets(*, but: tuple[str, int] | None = None) -> Iterator[None]:
    """Refuse every connection and name look-up of this process, with an error that says whereto.

    What stays open are Unix sockets, and `but`, the host and port of an endpoint.
    """
    methods = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
    look_up = socket.getaddrinfo
    allowed = {but}  # and what its host's name stands for

    def guard(name: str) -> Any:
        def refuse(self: socket.socket, *arguments: Any) -> Any:
            if self.family == socket.AF_UNIX or tuple(arguments[-1][:2]) in allowed:
                return methods[name](self, *arguments)
            raise refusal(arguments[-1])

        return refuse

    def refuse_look_up(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if (host, port) != but:
            raise refusal(host)
        found = look_up(host, port, *arguments, **options)
        allowed.update((str(address[0]), int(address[1])) for *_, address in found)
        return found

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
