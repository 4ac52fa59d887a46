"""Cancel the runs of a Prefect server that is about to stop, so that their compute children save what they have."""

import time
from typing import Any

from infra.settings import Settings
from infra.stack.http import NoAnswer, ask
from infra.stack.state import Progress

CANCEL_SECONDS = 75.0  # a compute child may take 60 s for its checkpoint
MARK_SECONDS = 15.0
ALIVE = ("RUNNING", "PENDING", "CANCELLING")
PAGE = 200


def cancel_runs(settings: Settings, *, progress: Progress) -> tuple[str, ...]:
    """Cancel every run that is under way, wait until they have ended, and return their names.

    A run that no worker minds, or whose worker did not end it in time, is marked cancelled, so that it is not shown as
    running for ever. Of another Prefect than the local stack's only the runs of this stack's work pool are ours to cancel. A
    server that no longer answers has nothing to cancel: the processes are found by their mark.
    """
    names: dict[str, str] = {}
    deadline = time.monotonic() + CANCEL_SECONDS
    try:
        while (runs := _find_runs(settings)) and time.monotonic() < deadline + MARK_SECONDS:
            for run in runs:
                if run["id"] not in names:
                    progress(f"cancelling run {run['name']}, which may save its work first")
                    names[run["id"]] = run["name"]
                if run["work_pool_name"] is None or time.monotonic() >= deadline:
                    _set_state(settings, run, {"type": "CANCELLED", "message": "the stack was stopped"}, force=True)
                elif run["state_type"] != "CANCELLING":
                    _set_state(settings, run, {"type": "CANCELLING"}, force=False)
            time.sleep(0.3)
    except NoAnswer as error:
        progress(f"runs are not cancelled: {error}")
    return tuple(names.values())


def _set_state(settings: Settings, run: dict[str, Any], state: dict[str, str], *, force: bool) -> None:
    ask(f"{settings.prefect_api_url}/flow_runs/{run['id']}/set_state", {"state": state, "force": force})


def _find_runs(settings: Settings) -> list[dict[str, Any]]:
    query: dict[str, Any] = {"flow_runs": {"state": {"type": {"any_": list(ALIVE)}}}, "limit": PAGE}
    if not settings.is_local("prefect"):
        query["work_pools"] = {"name": {"any_": [settings.work_pool]}}
    runs: list[dict[str, Any]] = ask(f"{settings.prefect_api_url}/flow_runs/filter", query)
    return runs
