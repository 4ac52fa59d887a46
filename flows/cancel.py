"""Cancelling, from Prefect's page or API, a flow that runs in the caller's own process.

A worker watches the runs it started; nobody watches the others, and Prefect would leave them *Cancelling* for ever. So a
thread asks how the run's state is, and ends this process the way SIGTERM does: the child saves and goes.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectException
from prefect.states import Cancelled, StateType

POLL_SECONDS = 5.0


@contextmanager
def cancellable(flow: Flow[Any, Any]) -> Iterator[Callable[..., Any]]:
    """Yield the flow, to be called within this block; a cancelled run ends as such, with SIGTERM's exit."""
    watch = Watch()
    watch.start()
    try:
        yield flow.with_options(on_running=[watch.follow])
    finally:
        watch.ended.set()
        watch.join()
        if watch.cancelled and watch.run_id:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(watch.run_id, Cancelled(message="its process has ended"), force=True)


class Watch(threading.Thread):
    """Looks at one flow run's state every few seconds, from the moment it runs."""

    def __init__(self) -> None:
        super().__init__(name="cancellation", daemon=True)
        self.ended = threading.Event()
        self.cancelled = False
        self.run_id: UUID | None = None

    def follow(self, flow: Any, flow_run: Any, state: Any) -> None:
        """Learn which run it is: a hook of the flow."""
        self.run_id = flow_run.id

    def run(self) -> None:
        """Pass a cancellation on to this process, once."""
        if self.ended.wait(POLL_SECONDS):
            return
        with get_client(sync_client=True) as client:  # one for the whole run: making one takes longer than asking
            while not self._is_cancelled(client):
                if self.ended.wait(POLL_SECONDS):
                    return
        self.cancelled = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _is_cancelled(self, client: SyncPrefectClient) -> bool:
        """Return whether somebody asked for the run to be cancelled; a server that is away says nothing."""
        if self.run_id is None:
            return False
        try:
            state = client.read_flow_run(self.run_id).state
        except (PrefectException, httpx.HTTPError):
            return False
        return state is not None and state.type in {StateType.CANCELLING, StateType.CANCELLED}
