"""`varflow gate --explain`: a verdict found, checked against its seal and its inputs, and laid out part by part."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evaluation.gate.explain import explain_noise, show_growth, show_p, show_share
from evaluation.gate.verdict import Verdict, check_inputs, read_verdict
from infra.records import Record
from infra.settings import Settings
from infra.store import Store, open_store
from tasks.gate import CHALLENGER, CHAMPION

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
    answers: dict[str, dict[str, float]] = field(default_factory=dict)  # what each model's held-out answers cost

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as it was written, and what was checked of it."""
        checked = {"seal_holds": True, "inputs_checked": self.inputs_checked, "cost_of_answers": self.answers}
        where = self.record.ref if self.record else None
        return self.verdict.model_dump(mode="json") | {"ref": where} | checked


def find_verdict(reference: str, *, settings: Settings) -> FoundVerdict:
    """Return the verdict of a run (its Prefect or MLflow id or page), of gate/FINGERPRINT, or of a verdict.json.

    Raises ValueError where none is found, where its seal is broken, and where its inputs on record are not what it weighed.
    """
    if Path(reference).is_file():
        return FoundVerdict(read_verdict(Path(reference).read_bytes()), None, 0)
    from flows.launch import find_step  # and with it Prefect and MLflow, which a file does without
    from infra.tracking import Tracking
    from tasks.candidate import read_sealed

    store = open_store(settings)
    record = find_step(store, reference, step="gate", tracking=Tracking(settings.mlflow_tracking_uri))
    verdict = read_sealed(store, record)
    made = read_inputs(store, record)
    on_record = digest_inputs(record, made)
    known = {name: on_record[name] for name in verdict.inputs if name in on_record}
    check_inputs(verdict, verdict.inputs | known)
    costs = {who: made[name].cost for who in (CHAMPION, CHALLENGER) if (name := f"{who}_answers") in made}
    return FoundVerdict(verdict, record, len(known), costs)


def read_inputs(store: Store, record: Record) -> dict[str, Record]:
    """Return the records of a step's inputs by name, without what is a source or was deleted by retention."""
    names = {item.name.rpartition("/")[2].removesuffix(".json"): item.name for item in store.scan("records")}
    texts = {given: store.get(names[found]) for given, found in record.inputs.items() if found in names}
    return {given: Record.model_validate_json(text[0]) for given, text in texts.items() if text}


def digest_inputs(record: Record, made: Mapping[str, Record]) -> dict[str, str]:
    """Return what the records say of a step's inputs: fingerprint or digest of each, and the sha256 of each file of it."""
    files = {f"{name}/{file.name}": file.sha256 for name, given in made.items() for file in given.files}
    return record.inputs | files


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
    for name, floors in verdict.noise.items():
        for floor in floors:
            console.print(f"noise floor of {explain_noise(name, floor)}", markup=False, highlight=False)
    if found.answers:
        told = (
            f"{who} {cost['wall_seconds']:,.1f} s" + (f", {cost['usd']:,.4g} USD" if "usd" in cost else "")
            for who, cost in found.answers.items()
        )
        console.print(f"held-out answers took: {'; '.join(told)}", highlight=False)
    looks = verdict.looks
    planned = f", of {looks.planned} planned at {looks.alpha_of_a_year:g} together" if looks.planned else ""
    console.print(
        f"\nalpha {looks.alpha_of_a_look:.4g} one-sided at each test; look {looks.spent + 1} of the year{planned}",
        highlight=False,
    )
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
