"""`varflow gate --explain`: a verdict found, checked against its seal and its inputs, and laid out part by part."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evaluation.explain import show_growth, show_p, show_share
from evaluation.verdict import Verdict, check_seal, read_verdict
from infra.records import Record
from infra.settings import Settings
from infra.store import Store, open_store

COLUMNS = (
    "",
    "state",
    "test",
    "n",
    "champion → challenger",
    "difference",
    "interval",
    "bound",
    "detectable",
    "would decide",
)


@dataclass(frozen=True)
class FoundVerdict:
    """A verdict whose seal holds. `record` is None for a file of its own, of which nothing but the seal can be checked."""

    verdict: Verdict
    record: Record | None
    inputs_checked: int

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as it was written, and what was checked of it."""
        checked = {"seal_holds": True, "inputs_checked": self.inputs_checked}
        where = f"{self.record.step}/{self.record.fingerprint}" if self.record else None
        return self.verdict.model_dump(mode="json") | {"ref": where} | checked


def find_verdict(reference: str, *, settings: Settings) -> FoundVerdict:
    """Return the verdict of a run (its Prefect or MLflow id or page), of gate/FINGERPRINT, or of a verdict.json.

    Raises ValueError where none is found, where its seal is broken, and where its inputs on record are not what it weighed.
    """
    if Path(reference).is_file():
        return FoundVerdict(read_verdict(Path(reference).read_bytes()), None, 0)
    from flows.launch import find_step  # and with it Prefect and MLflow, which a file does without
    from infra.tracking import Tracking
    from tasks.execute import fetch_artifact

    store = open_store(settings)
    record = find_step(store, reference, step="gate", tracking=Tracking(settings.mlflow_tracking_uri))
    verdict = read_verdict((fetch_artifact(store, record, home=settings.home) / "verdict.json").read_bytes())
    on_record = digest_inputs(store, record)
    known = {name: on_record[name] for name in verdict.inputs if name in on_record}
    check_seal(verdict, inputs=verdict.inputs | known)
    if record.summary["seal"] != verdict.seal:
        raise ValueError(
            f"gate/{record.fingerprint[:12]}: its record has the seal {record.summary['seal'][:16]}, its verdict.json {verdict.seal[:16]}; "
            "the file was replaced after the gate wrote it"
        )
    return FoundVerdict(verdict, record, len(known))


def digest_inputs(store: Store, record: Record) -> dict[str, str]:
    """Return what the records say of a step's inputs: fingerprint or digest of each, and the sha256 of each file of it.

    What retention has deleted is left out.
    """
    names = {item.name.rpartition("/")[2].removesuffix(".json"): item.name for item in store.scan("records")}
    digests = dict(record.inputs)
    for given, fingerprint in record.inputs.items():
        found = store.get(names[fingerprint]) if fingerprint in names else None
        if found:
            files = Record.model_validate_json(found[0]).files
            digests |= {f"{given}/{file.name}": file.sha256 for file in files}
    return digests


def draw_verdict(found: FoundVerdict, console: Console) -> None:
    """Print a verdict: reasons, every part with its test, the flags, and what was checked."""
    verdict = found.verdict
    console.print(f"{verdict.decision}\n", style="bold", highlight=False)
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="dim")
    for cells in lay_out(verdict):
        table.add_row(*cells)
    console.print(table)
    for title, lines in (("because", verdict.reasons), ("before you believe it", verdict.flags)):
        if lines:
            console.print(f"\n{title}", style="dim", highlight=False)
        for line in lines:
            console.print(f"  - {line}", markup=False, highlight=False)
    looks = verdict.looks
    shared = f", look {looks.spent + 1} of {looks.planned} of the year" if looks.planned else ""
    console.print(f"\nalpha {looks.alpha_of_a_look:.4g} one-sided at each test{shared}", highlight=False)
    checked = f", {found.inputs_checked} of {len(verdict.inputs)} inputs as on record" if found.record else ""
    console.print(f"seal {verdict.seal[:16]} holds{checked}", highlight=False)


def lay_out(verdict: Verdict) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each part of a verdict; scores in points of 100."""
    for guard in verdict.guards:
        yield (
            f"guard {guard.benchmark}", guard.state.value, guard.method, f"{guard.n}",
            f"{100 * guard.champion:.1f} → {100 * guard.challenger:.1f}", f"{100 * guard.difference:+.1f}",
            f"[{100 * guard.low:+.1f}, {100 * guard.high:+.1f}] {show_share(guard.confidence)}",
            f"margin {100 * guard.margin:g} (holds {100 * guard.smallest_margin:.1f})",
            f"{100 * guard.detectable_difference:.1f}", show_count(guard.items_to_decide, "items"),
        )  # fmt: skip
    for target in verdict.targets:
        points, digits = (100, 1) if target.unit == "items" else (1, 3)
        yield (
            f"target {target.name}", "superior" if target.superior else "not shown", f"{target.method}, p {show_p(target.p_adjusted)}",
            f"{target.n}", f"{points * target.champion:.{digits}f} → {points * target.challenger:.{digits}f}",
            f"{points * target.gain:+.{digits}f}",
            f"[{points * target.low:+.{digits}f}, {points * target.high:+.{digits}f}] {show_share(target.confidence)}",
            f"above {points * target.min_gain:g}", f"{points * target.detectable_gain:.{digits}f}",
            show_count(target.more_to_decide, target.unit),
        )  # fmt: skip
    for floor in verdict.floors:
        points, digits = (100, 1) if floor.unit == "items" else (1, 3)
        yield (
            f"floor {floor.name}", floor.state.value, "score test" if floor.unit == "items" else "t test", f"{floor.n}",
            f"{points * floor.level:.{digits}f}", "",
            f"[{points * floor.low:.{digits}f}, {points * floor.high:.{digits}f}] {show_share(floor.confidence)}",
            f"floor {points * floor.floor:g}", "", show_count(floor.more_to_decide, floor.unit),
        )  # fmt: skip
    for growth in verdict.growths:
        yield (
            f"growth of {growth.name}", growth.state.value, "paired t, beyond the bound", f"{growth.n}",
            f"{growth.champion:.4g} → {growth.challenger:.4g}", show_growth(growth),
            f"[{growth.low:+.4g}, {growth.high:+.4g}] {show_share(growth.confidence)}",
            f"{100 * growth.bound:g} %", "", show_count(growth.more_to_decide, "prompts"),
        )  # fmt: skip
    for row in verdict.audit:
        points, digits = (100, 1) if row.unit == "items" else (1, 3)
        yield (
            f"audit {row.name}", "agrees" if row.agrees else "apart", "decides nothing", f"{row.n}", "",
            f"{points * row.difference:+.{digits}f}",
            f"[{points * row.low:+.{digits}f}, {points * row.high:+.{digits}f}] {show_share(row.confidence)}", "", "", "",
        )  # fmt: skip


def show_count(more: int | None, unit: str) -> str:
    """Return how many items or prompts would decide, if any number is told."""
    return "" if more is None else f"{more:,} {unit}"
