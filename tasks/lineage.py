"""What an artifact was made of, back to its sources, read from record to record."""

from dataclasses import dataclass

from infra import records
from infra.records import Given, Record
from infra.store import Store


@dataclass(frozen=True)
class Lineage:
    """Every step behind an artifact, itself last, and every source with the step and input that took it (`train.base`)."""

    steps: tuple[Record, ...]
    sources: dict[str, Given]

    def find(self, step: str) -> Record | None:
        """Return the last step of a kind."""
        return next((record for record in reversed(self.steps) if record.step == step), None)

    @property
    def wall_seconds(self) -> dict[str, float]:
        """What each kind of step cost when it was computed."""
        total: dict[str, float] = {}
        for record in self.steps:
            total[record.step] = total.get(record.step, 0.0) + record.cost.get("wall_seconds", 0.0)
        return total


def read_lineage(store: Store, record: Record) -> Lineage:
    """Return the lineage of an artifact. Raises ValueError where a step that it names is on record no more."""
    steps: dict[str, Record] = {}
    sources: dict[str, Given] = {}

    def visit(made: Record) -> None:
        for name, given in made.given.items():
            fingerprint = made.inputs[name]
            if not given.name.endswith(f"/{fingerprint}"):
                sources[f"{made.step}.{name}"] = given
            elif fingerprint not in steps:
                found = records.read_record(store, step=given.name.partition("/")[0], fingerprint=fingerprint)
                if found is None:
                    raise ValueError(f"{made.ref}: was made of {given.name}, of which there is no record any more")
                visit(found[0])
        steps[made.fingerprint] = made

    visit(record)
    return Lineage(tuple(steps.values()), sources)
