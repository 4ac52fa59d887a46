"""Start, stop and look at the stack. The processes and the servers say what runs; the files of the home only name places."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import psutil

from infra.settings import Service, Settings, read_object
from infra.stack import daemon as supervisord
from infra.stack.daemon import Daemon
from infra.stack.health import probe
from infra.stack.processes import describe_owner, end_processes, find_processes, is_taken
from infra.stack.runs import cancel_runs
from infra.stack.services import SERVICES, TITLES, ports
from infra.stack.state import (
    DownReport,
    Progress,
    ServiceStatus,
    StackError,
    StackStatus,
    describe,
    locked,
    with_credentials,
    write_private,
)

START_SECONDS = 300.0  # a busy machine; what crashes is told sooner, by LIVES
STOP_SECONDS = 45.0
CHECKPOINT_SECONDS = 65.0  # what a compute child may take to save its work, and a little
LIVES = 3  # a service that died so often while starting will not start
NEEDS: dict[Service, tuple[Service, ...]] = {"worker": ("prefect",)}


def up(
    settings: Settings,
    *,
    services: Sequence[Service] = SERVICES,
    progress: Progress = lambda message: None,
    on_ready: Callable[[Settings], None] = lambda settings: None,
) -> StackStatus:
    """Start what is not running of the local services, and return when all of them do their work.

    `on_ready` is called with the complete settings (credentials of the local S3 included) whenever something was started.
    A service whose setting names another server is left alone. Raises StackError, with nothing of a cold start left running.
    """
    wanted = [service for service in services if settings.is_local(service)]
    for service in set(services).difference(wanted):
        progress(f"{TITLES[service]} is the one at {_url(service, settings)}, which is not this stack's to start")
    with locked(settings.home, progress=progress):
        settings = with_credentials(settings)
        daemon = supervisord.connect(settings.home)
        cold = daemon is None
        missing = _make_room(daemon, settings, wanted=wanted, progress=progress)
        try:
            if daemon is None and missing:
                write_private(settings.home / "stack.json", json.dumps(describe(settings), indent=1))
                daemon = supervisord.start(settings)
            if daemon is not None:
                _wait_until_healthy(daemon, settings, wanted=wanted, missing=missing, progress=progress)
            if missing:
                on_ready(settings)
        except BaseException:
            if cold:
                progress("stopping what was started")
                _stop_all(settings, supervisord.connect(settings.home), grace_seconds=5.0)
            raise
        return StackStatus(settings, _look(daemon, settings, services), tuple(missing))


def down(settings: Settings, *, progress: Progress = lambda message: None) -> DownReport:
    """Cancel the runs under way, stop every service, and return when no process of the stack is left."""
    if not settings.home.is_dir():
        return DownReport((), (), ())
    with locked(settings.home, progress=progress):
        settings = with_credentials(settings)
        daemon = supervisord.connect(settings.home)
        running = _running(daemon)
        cancelled = cancel_runs(settings, progress=progress) if running or find_processes(settings.home) else ()
        progress("stopping " + (", ".join(TITLES[service] for service in running) or "what is left"))
        ended = _stop_all(settings, daemon, grace_seconds=CHECKPOINT_SECONDS)
        return DownReport(stopped=tuple(running), cancelled=cancelled, ended=tuple(ended))


def status(settings: Settings) -> StackStatus:
    """Look at every service and change nothing."""
    if not settings.home.is_dir():
        return StackStatus(settings, _look(None, settings, SERVICES))
    return StackStatus(settings, _look(supervisord.connect(settings.home), settings, SERVICES))


def _running(daemon: Daemon | None) -> list[Service]:
    found = daemon.processes() if daemon else {}
    return [service for service in SERVICES if found.get(service, {}).get("pid")]


def _make_room(
    daemon: Daemon | None, settings: Settings, *, wanted: Sequence[Service], progress: Progress
) -> Sequence[Service]:
    """End what an earlier life left, check the ports, and return the services to be started."""
    if daemon is None:
        missing = wanted
        if ended := end_processes(settings.home, grace_seconds=CHECKPOINT_SECONDS):
            progress(f"ended {len(ended)} processes that an earlier stack left behind")
    else:
        _check_same_stack(settings)
        running = _running(daemon)
        missing = [service for service in wanted if service not in running]
        for service in missing:
            if service != "worker":  # its runs may live on
                end_processes(settings.home, service=service, grace_seconds=0)
    _check_ports(missing, settings)
    return missing


def _check_same_stack(settings: Settings) -> None:
    """Refuse to mend a stack by other settings than it runs with: half of it would move."""
    running, asked = read_object(settings.home / "stack.json"), describe(settings)
    for name in sorted(running.keys() | asked.keys()):
        if running and running.get(name) != asked.get(name):
            raise StackError(
                f"the stack of {settings.home} runs with {name}={running.get(name, 'its own')}, these settings say "
                f"{asked.get(name, 'its own')}; run `varflow down` first, or unset VARFLOW_{name.upper()}"
            )


def _check_ports(missing: Sequence[Service], settings: Settings) -> None:
    """Raise StackError that names every port already taken, its owner and the setting that moves it."""
    taken = [
        f"port {port} of {TITLES[service]} is taken by {describe_owner(port)}: stop that, or set {variable} to another port"
        for service in missing
        for port, variable in ports(service, settings).items()
        if is_taken(port)
    ]
    if taken:
        raise StackError("; ".join(taken))


def _wait_until_healthy(
    daemon: Daemon, settings: Settings, *, wanted: Sequence[Service], missing: Sequence[Service], progress: Progress
) -> None:
    """Start what is missing, each when what it needs is healthy, and wait for all. Raises StackError with the log's tail."""
    began = time.monotonic()
    healthy: set[Service] = set()
    to_start = list(missing)
    lives: dict[Service, set[int]] = {service: set() for service in wanted}
    with ThreadPoolExecutor(len(SERVICES)) as pool:
        while True:
            for service in list(to_start):
                if all(need in healthy or need not in wanted for need in NEEDS.get(service, ())):
                    daemon.start(service)
                    to_start.remove(service)
            view = daemon.processes()
            asked = [service for service in wanted if service not in healthy and service not in to_start]
            faults = pool.map(_find_fault, asked, [view[service] for service in asked], repeat(settings))
            for service, reason in zip(asked, faults, strict=True):
                lives[service].add(view[service]["start"])
                seconds = time.monotonic() - began
                if not reason:
                    healthy.add(service)
                    if missing:
                        progress(f"{TITLES[service]} is up ({seconds:.0f} s)")
                elif len(lives[service]) > LIVES or seconds > START_SECONDS:
                    raise StackError(
                        f"{TITLES[service]} did not start within {seconds:.0f} s: {reason}; mend that and run `varflow up` "
                        f"again; from its log, {settings.home / 'logs' / service}.log:\n"
                        f"{supervisord.read_tail(settings.home, service)}"
                    )
            if len(healthy) == len(wanted):
                return
            time.sleep(0.2)


def _find_fault(service: Service, info: dict[str, Any], settings: Settings) -> str:
    """Return why a service does not do its work, "" if it does."""
    if not info["pid"]:
        return info["spawnerr"] or "its process is not running"
    return probe(service, settings, started=info["start"])


def _stop_all(settings: Settings, daemon: Daemon | None, *, grace_seconds: float) -> list[str]:
    """Stop the services side by side, then supervisord, then whatever carries the stack's mark. Returns the latter."""
    home = settings.home
    if daemon is not None:
        try:
            daemon.stop_all()
            deadline = time.monotonic() + STOP_SECONDS
            while _running(daemon) and time.monotonic() < deadline:
                time.sleep(0.1)
            daemon.shutdown()
        except (StackError, psutil.Error):
            pass  # it died meanwhile, or hangs: its processes are found by their mark
    ended = end_processes(home, grace_seconds=grace_seconds)
    for name in ("stack.json", "supervisord.pid"):
        (home / name).unlink(missing_ok=True)
    return ended


def _look(daemon: Daemon | None, settings: Settings, services: Sequence[Service]) -> tuple[ServiceStatus, ...]:
    view = daemon.processes() if daemon else {}
    with ThreadPoolExecutor(len(services)) as pool:
        return tuple(pool.map(lambda service: _look_at(service, view.get(service), settings), services))


def _url(service: Service, settings: Settings) -> str:
    urls = {"s3": settings.s3_endpoint or "AWS S3", "mlflow": settings.mlflow_tracking_uri}
    return urls.get(service, settings.prefect_api_url)


def _look_at(service: Service, info: dict[str, Any] | None, settings: Settings) -> ServiceStatus:
    url = _url(service, settings)
    if not settings.is_local(service):
        reason = probe(service, settings)
        return ServiceStatus(service, "external", not reason, url, detail=reason)
    if info is None and (left := find_processes(settings.home, service=service)):
        reason = "supervisord is gone, this process is left; run `varflow up`"
        return ServiceStatus(service, "orphaned", False, url, pid=left[0].pid, detail=reason)
    if info is None or not info["pid"]:
        state = "failed" if info and info["statename"] in ("FATAL", "BACKOFF") else "stopped"
        return ServiceStatus(service, state, False, url, detail=(info or {}).get("spawnerr") or "run `varflow up`")
    reason = probe(service, settings, started=info["start"])
    return ServiceStatus(
        service=service,
        state="starting" if reason and info["statename"] == "STARTING" else "running",
        healthy=not reason,
        url=url,
        pid=info["pid"],
        port=next(iter(ports(service, settings)), None),
        uptime_seconds=float(info["now"] - info["start"]),
        detail=reason,
    )
