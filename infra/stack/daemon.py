"""Talk to supervisord, the one parent of the services, over its socket in the home."""

import http.client
import re
import socket
import subprocess
import sys
import time
import xmlrpc.client
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import Faults

from infra.settings import Service, Settings
from infra.stack.processes import await_end
from infra.stack.services import environment, write_configuration
from infra.stack.state import StackError, run_folder

ANSWER_SECONDS = 10.0
START_SECONDS = 30.0
TAIL_BYTES = 65_536
CAUSE = re.compile(
    r"^F\d{4} |^\w*(Error|Exception)\b|\b(fatal|panic|denied|no space left)\b", re.IGNORECASE
)  # F1231: Go's fatal


class Daemon:
    """A running supervisord. Raises StackError where it does not answer."""

    def __init__(self, path: Path) -> None:
        self._proxy = xmlrpc.client.ServerProxy("http://localhost", transport=_UnixTransport(path))

    def processes(self) -> dict[Service, dict[str, Any]]:
        """Give supervisord's view of each service: `statename`, `pid`, `start` and `now` (unix seconds), `spawnerr`."""
        return {info["name"]: info for info in self._ask("getAllProcessInfo")}

    def start(self, service: Service) -> None:
        """Start a service, without waiting for it; one that supervisord is starting already is left to it."""
        try:
            self._proxy.supervisor.startProcess(service, False)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != Faults.ALREADY_STARTED:
                raise StackError(f"supervisord cannot start {service}: {fault.faultString}") from fault
        except (OSError, http.client.HTTPException) as error:
            raise StackError(f"supervisord did not start {service}: {error}") from error

    def stop_all(self) -> None:
        """Stop all services, without waiting for them; supervisord kills what does not end in time."""
        self._ask("stopAllProcesses", False)

    def shutdown(self) -> None:
        """Tell supervisord to end, and wait until it has."""
        process = psutil.Process(self._ask("getPID"))
        self._ask("shutdown")
        await_end(process, seconds=ANSWER_SECONDS)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._proxy.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise StackError(f"supervisord did not {method} {' '.join(map(str, arguments))}: {error}") from error


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def connect(home: Path) -> Daemon | None:
    """Return the daemon of this home, None where none answers."""
    daemon = Daemon(run_folder(home) / "supervisor.sock")
    try:
        daemon.processes()
    except StackError:
        return None
    return daemon


def start(settings: Settings) -> Daemon:
    """Start supervisord in the background, all services still stopped."""
    configuration = write_configuration(settings)
    (run_folder(settings.home) / "supervisor.sock").unlink(missing_ok=True)
    words = [sys.executable, "-P", "-m", "supervisor.supervisord", "-c", str(configuration)]
    log = settings.home / "logs" / "supervisord.log"
    with (settings.home / "logs" / "start.log").open("w+") as out:
        ended = subprocess.run(
            words,
            env=environment(settings),
            cwd=settings.home,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            check=False,
        )
        out.seek(0)
        said = out.read().strip()
    deadline = time.monotonic() + START_SECONDS
    while ended.returncode == 0 and time.monotonic() < deadline:
        if daemon := connect(settings.home):
            return daemon
        time.sleep(0.05)
    raise StackError(f"supervisord did not start (status {ended.returncode}): {said or f'see {log}'}")


def read_tail(home: Path, service: Service, *, lines: int = 8, causes: int = 3) -> str:
    """Return the last lines of a service's log, after the last ones before them that look like the cause of its end."""
    path = home / "logs" / f"{service}.log"
    if not path.exists():
        return f"(no {path})"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace").splitlines()
    likely = [line for line in text[:-lines] if CAUSE.search(line)][-causes:]
    return "\n".join(f"  {line[:300]}" for line in (*likely, *text[-lines:]))
