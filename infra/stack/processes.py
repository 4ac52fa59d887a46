"""Find and end the processes of a stack, whatever became of their parents.

A pid file proves nothing after a reboot, and a child in its own session has no tie to its parent that a dead parent leaves
behind. So everything the stack starts carries a mark in its environment, which children inherit.
"""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil

from infra.settings import LOOPBACK, STACK_MARK, Service

SERVICE_MARK = "VARFLOW_SERVICE"


def find_processes(home: Path, *, service: Service | None = None) -> list[psutil.Process]:
    """Return the living processes that carry the mark of this home (and service), without this one and its parents."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["status", "environ"]):  # None where it is another user's
        inherited = process.info["environ"] or {}
        if process.pid in own or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if inherited.get(STACK_MARK) == str(home) and service in (None, inherited.get(SERVICE_MARK)):
            found.append(process)
    return found


def end_processes(home: Path, *, service: Service | None = None, grace_seconds: float) -> list[str]:
    """End all marked processes: SIGTERM, time for a checkpoint, SIGKILL. Returns `pid command` of each.

    Repeats until none is found, since a process may start another while it is being ended.
    """
    ended: dict[int, str] = {}
    deadline = time.monotonic() + grace_seconds
    while found := find_processes(home, service=service):
        for process in found:
            late = time.monotonic() >= deadline
            if process.pid in ended and not late:
                continue
            ended.setdefault(process.pid, f"{process.pid} {command_line(process)}")
            try:
                process.kill() if late else process.terminate()
            except psutil.Error:
                continue
        pause = time.monotonic() + min(2.0, max(0.2, deadline - time.monotonic()))
        for process in found:
            with suppress(psutil.Error):
                await_end(process, seconds=pause - time.monotonic())
    return list(ended.values())


def await_end(process: psutil.Process, *, seconds: float) -> None:
    """Wait until a process has ended, if only as a zombie: not every container has an init that takes note of the dead."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)


def command_line(process: psutil.Process) -> str:
    """Return the command line in at most 100 characters."""
    try:
        return " ".join(process.cmdline())[:100] or process.name()
    except psutil.Error:
        return "(gone)"


def is_taken(port: int) -> bool:
    """Tell whether something listens on this loopback port. Sockets that merely wait to be forgotten do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return True
    return False


def describe_owner(port: int) -> str:
    """Say who listens on a port: pid and command line, where the system lets us know."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return "a process that this user may not see"
    for connection in connections:
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            if connection.pid is None:
                break
            try:
                return f"pid {connection.pid} ({command_line(psutil.Process(connection.pid))})"
            except psutil.Error:
                break
    return "a process of another user"
