"""What a preflight finds: how each check came out, and `preflight.json`, which holds all of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "preflight.json"
ROWS_SHOWN = 3


class Failure(Exception):  # noqa: N818 - a finding, told with all others
    """What a check found wrong, in one line, and the rows that show it."""

    def __init__(self, line: str, row_ids: Sequence[str] = ()) -> None:
        super().__init__(line)
        self.row_ids = list(row_ids)[:ROWS_SHOWN]


class NotApplicable(Exception):  # noqa: N818 - likewise
    """Why a check has nothing to say about this run."""


@dataclass(frozen=True)
class Check:
    """One check's outcome."""

    name: str
    outcome: str  # passed | failed | not applicable
    line: str
    seconds: float
    rows: list[dict[str, str]] = field(default_factory=list)  # row_id and excerpt of the rows that show a failure


@dataclass
class Report:
    """All outcomes of a run's preflight."""

    plan: str  # digest of the steps that were looked at
    identity: str  # digest of all that the run is bound to: config, base, data
    runtime: dict[str, Any]
    seconds_allowed: float
    microbatch_tokens: int  # what the device has room for
    checks: list[Check] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.outcome == "failed"]

    @property
    def passed(self) -> bool:
        """Whether all checks, of which that of memory is the last, were made and none failed."""
        return not self.failures and any(check.name == "memory" for check in self.checks)

    def is_of(self, other: "Report") -> bool:
        """Whether both are of the same run: what one has found holds for the other."""
        return (self.plan, self.identity, self.runtime) == (other.plan, other.identity, other.runtime)

    @property
    def seconds(self) -> float:
        """What it took."""
        return round(sum(check.seconds for check in self.checks), 3)

    def as_json(self) -> dict[str, Any]:
        """Return what `preflight.json` holds."""
        return {"passed": self.passed, "seconds": self.seconds} | asdict(self)

    def summary(self) -> dict[str, int | float]:
        """Return the figures of a run's summary."""
        done = {
            f"preflight_{outcome}": sum(c.outcome == outcome for c in self.checks) for outcome in ("passed", "failed")
        }
        peak = {"preflight_peak_bytes": self.memory["peak_bytes"]} if "peak_bytes" in self.memory else {}
        return done | {"preflight_seconds": self.seconds} | peak

    def require(self) -> None:
        """Raise ValueError with every failure, where there is one."""
        if self.failures:
            raise ValueError(
                f"preflight: {len(self.failures)} of {len(self.checks)} checks failed, nothing was trained:\n"
                + "\n".join(describe_failure(check) for check in self.failures)
            )


def describe_failure(check: Check) -> str:
    """Return a failure in words: its line, and the rows that show it."""
    rows = "".join(f"\n      {row['row_id'][:12]}  {row['excerpt']}" for row in check.rows)
    return f"  - {check.name}: {check.line}{rows}"


def read_report(path: Path) -> Report | None:
    """Return what an earlier attempt's `preflight.json` tells, None where there is none, or what is there cannot be read."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        told = {name: found[name] for name in ("plan", "identity", "runtime", "seconds_allowed", "microbatch_tokens", "memory")}  # fmt: skip
        return Report(**told, checks=[Check(**check) for check in found["checks"]])
    except (ValueError, TypeError, KeyError):
        return None
