"""A person's word before a promotion: the run pauses on Prefect's page, with the verdict and its report, until somebody answers."""

from collections.abc import Sequence
from datetime import timedelta

from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from tasks.mirror import listener

PATIENCE = timedelta(days=7)  # after which the run fails; its steps stay done, and the same run asks again
POLL_SECONDS = 3


class Approval(RunInput):
    """What is asked. Resumed without an answer, nothing is promoted: that is a no."""

    promote: bool = Field(
        False,
        title="Promote",
        description="On: the challenger becomes champion. Off: the champion stays, and this verdict is refused.",
    )
    note: str = Field("", max_length=1000, title="Note", description="Who decides, and why; at most 1,000 characters.")


def ask_approval(*, model: str, reasons: Sequence[str], flags: Sequence[str], report: str, page: str) -> Approval:
    """Pause the flow run on `page` until it is resumed with an answer, and return that. Raises FlowPauseTimeout after a week."""
    listening = listener.get()
    if listening:
        listening.started(f"waiting for approval: resume the run at {page}")
    text = "\n".join([
        f"The gate says **PROMOTE** for `{model}`. Read [the report]({report}) before you answer.", "",
        *(f"- {reason}" for reason in reasons),
        *(["", "Before you believe it:", "", *(f"- {flag}" for flag in flags)] if flags else []),
    ])  # fmt: skip
    asked = Approval.with_initial_data(description=text)
    return pause_flow_run(wait_for_input=asked, timeout=int(PATIENCE.total_seconds()), poll_interval=POLL_SECONDS)


def describe_refusal(approval: Approval) -> str:
    """Return what the history keeps of a no."""
    return f"not approved: {approval.note or 'no note'}"
