"""Cancel the runs of a Prefect server that is about to stop, so that their compute children save what they have."""

import time
from typing import Any

from infra.settings import Settings
from infra.stack.http import NoAnswer, ask
from infra.stack.state import Progress

CANCEL_SECONDS = 75.0  # a compute child may take 60 s for its checkpoint
ALIVE = ("RUNNING", "PENDING", "CANCELLING")
PAGE = 200


def cancel_runs(settings: Settings, *, progress: Progress) -> tuple[str, ...]:
    """Cancel every run that is under way, wait until they have ended, and return their names.

    Of another Prefect than the local stack's only the runs of this stack's work pool are ours to cancel. A server that no
    longer answers has no runs to cancel: the processes are found by their mark.
    """
    try:
        runs = _find_runs(settings)
        for run in runs:
            if run["state_type"] != "CANCELLING":
                ask(f"{settings.prefect_api_url}/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})
        deadline = time.monotonic() + CANCEL_SECONDS
        while (left := _find_runs(settings)) and time.monotonic() < deadline:
            progress(f"waiting for {len(left)} runs to save their work: {', '.join(run['name'] for run in left)}")
            time.sleep(0.5)
    except NoAnswer as error:
        progress(f"no runs cancelled: {error}")
        return ()
    return tuple(run["name"] for run in runs)


def _find_runs(settings: Settings) -> list[dict[str, Any]]:
    query: dict[str, Any] = {"flow_runs": {"state": {"type": {"any_": list(ALIVE)}}}, "limit": PAGE}
    if not settings.is_local("prefect"):
        query["work_pools"] = {"name": {"any_": [settings.work_pool]}}
    runs: list[dict[str, Any]] = ask(f"{settings.prefect_api_url}/flow_runs/filter", query)
    return runs
