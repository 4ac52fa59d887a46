"""Whether a service does its work, not merely lives. A probe returns "" or the reason why not."""

from datetime import datetime
from typing import Any

from infra.settings import Service, Settings
from infra.stack.http import NoAnswer, ask
from infra.stack.services import worker_name

CHECK_NAME = "health/stack"
PROTECTED = (401, 403)  # it lives, and wants credentials that only its own library reads


def probe(service: Service, settings: Settings, *, started: float = 0.0) -> str:
    """Ask one service. `started`: when its process started (unix seconds); an older sign of life does not count."""
    if service == "s3":
        return _probe_s3(settings)
    if service == "worker":
        return _probe_worker(settings, started=started)
    url = settings.prefect_api_url if service == "prefect" else settings.mlflow_tracking_uri
    try:
        ask(f"{url}/health")
    except NoAnswer as error:
        return "" if error.status in PROTECTED and not settings.is_local(service) else str(error)
    return ""


def _probe_s3(settings: Settings) -> str:
    """Write an object and read it back, after a cheap look whether anything answers at all."""
    if settings.s3_endpoint is not None:
        try:
            ask(settings.s3_endpoint)
        except NoAnswer as error:
            if error.status is None:
                return str(error)
    from infra.store import StoreError, open_store  # boto3 takes half a second

    store = open_store(settings)
    try:
        if settings.is_local("s3"):
            store.ensure_bucket()
        store.put(CHECK_NAME, b"here")
        answer = store.get(CHECK_NAME)
    except StoreError as error:
        return str(error)
    return "" if answer and answer[0] == b"here" else f"wrote {CHECK_NAME}, read back {answer!r}"


def _probe_worker(settings: Settings, *, started: float) -> str:
    """Look for this machine's worker in its pool: online, with a heartbeat of this life."""
    url = f"{settings.prefect_api_url}/work_pools/{settings.work_pool}/workers/filter"
    try:
        workers: list[dict[str, Any]] = ask(url, {})
    except NoAnswer as error:
        if error.status in PROTECTED and not settings.is_local("prefect"):
            return ""  # its process runs, which is what can be known from here
        return f"its Prefect: {error}"
    for worker in workers:
        beat = worker.get("last_heartbeat_time")
        if worker["name"] != worker_name() or not beat:
            continue
        if worker["status"] == "ONLINE" and datetime.fromisoformat(beat).timestamp() >= started:
            return ""
        return f"last heard of at {beat}, {worker['status'].lower()}"
    return f"not yet in the work pool {settings.work_pool!r}"
