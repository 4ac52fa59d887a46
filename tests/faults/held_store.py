"""A way to the S3 server that stops at a chosen request: what is half done can then be killed at that very point."""

import socket
import threading
from contextlib import suppress
from typing import Self

CHUNK_BYTES = 65_536


class HeldStore:
    """Passes bytes on between boto3 and the server. A request that begins with `held` is kept back, or only its answer.

    One kept back goes on when `release` is set.
    """

    def __init__(self, endpoint: str, *, held: bytes, pass_request: bool) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._server, self._held, self._pass = (host, int(port)), held, pass_request
        self.reached, self.release = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                mute = threading.Event()
                threading.Thread(target=self._ask, args=(client, server, mute), daemon=True).start()
                threading.Thread(target=self._answer, args=(client, server, mute), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, mute: threading.Event) -> None:
        """Pass requests on; the held one once it is released, or at once with its answers, and all later ones, kept back."""
        with suppress(OSError), server:
            while data := client.recv(CHUNK_BYTES):
                if data.startswith(self._held) and self._pass:
                    mute.set()
                elif data.startswith(self._held):
                    self.reached.set()
                    self.release.wait()
                server.sendall(data)

    def _answer(self, client: socket.socket, server: socket.socket, mute: threading.Event) -> None:
        with suppress(OSError), client:
            while data := server.recv(CHUNK_BYTES):
                if not mute.is_set() or data.startswith(b"HTTP/1.1 100"):
                    client.sendall(data)
                else:
                    self.reached.set()
