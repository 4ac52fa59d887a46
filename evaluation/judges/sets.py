"""Sets that test whoever judges, a reward model or a judge: pairs of answers of which the better one is known.

Both are read from the files of their repositories as they are. EvalBiasBench: github ncsoft/offsetbias, `biasbench.json`
(arXiv 2407.06551). LLMBar: github princeton-nlp/LLMBar, `<subset>/dataset.json` (arXiv 2310.07641).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from training.config import Config

BIAS_FILE, LLMBAR_FILE = "biasbench.json", "dataset.json"
LLMBAR_SUBSETS = (
    "Natural",
    "Adversarial/Neighbor",
    "Adversarial/GPTInst",
    "Adversarial/GPTOut",
    "Adversarial/Manual",
)
Text = Annotated[str, Field(pattern=r"\S")]
Row = TypeVar("Row", bound=Config)
Rows = TypeVar("Rows")


@dataclass(frozen=True)
class JudgeItem:
    """One instruction with two answers. `group` is what the item tests: a bias, or a subset."""

    id: str  # the group and the item's place in it, from 0
    group: str
    instruction: str
    chosen: str
    rejected: str


class BiasRow(Config):
    """An item of EvalBiasBench; `label` is the number of the better response."""

    bias: Text
    instruction: Text
    response1: Text
    response2: Text
    label: Literal[1, 2]

    @model_validator(mode="after")
    def _differ(self) -> "BiasRow":
        return check_pair(self, self.response1, self.response2)


class LLMBarRow(Config):
    """An item of LLMBar; `label` is the number of the better output."""

    input: Text
    output_1: Text
    output_2: Text
    label: Literal[1, 2]

    @model_validator(mode="after")
    def _differ(self) -> "LLMBarRow":
        return check_pair(self, self.output_1, self.output_2)


def read_evalbiasbench(folder: Path) -> list[JudgeItem]:
    """Return the items of `biasbench.json` in its order; the groups are its six biases, as it names them.

    Raises ValueError naming the file and the item of what is missing or not in its format.
    """
    rows = _read(folder / BIAS_FILE, TypeAdapter(dict[Text, list[BiasRow]]), name="EvalBiasBench")
    return [
        _order(group, place, row.instruction, (row.response1, row.response2), row.label)
        for group, members in rows.items()
        for place, row in enumerate(members)
    ]


def read_llmbar(folder: Path) -> list[JudgeItem]:
    """Return the items of all five subsets, Natural first; the groups are the subsets' paths, such as Adversarial/Neighbor.

    Raises ValueError naming the file and the item of what is missing or not in its format.
    """
    items = []
    for subset in LLMBAR_SUBSETS:
        rows = _read(folder / subset / LLMBAR_FILE, TypeAdapter(list[LLMBarRow]), name="LLMBar")
        items += [
            _order(subset, place, row.input, (row.output_1, row.output_2), row.label) for place, row in enumerate(rows)
        ]
    return items


def check_pair(row: Row, one: str, other: str) -> Row:
    """Return a row whose answers differ; of two equal ones none is better."""
    if one == other:
        raise ValueError("both answers are the same text, so neither is better")
    return row


def _order(group: str, place: int, instruction: str, answers: tuple[str, str], label: int) -> JudgeItem:
    return JudgeItem(f"{group}/{place}", group, instruction, chosen=answers[label - 1], rejected=answers[2 - label])


def _read(path: Path, adapter: TypeAdapter[Rows], *, name: str) -> Rows:
    if not path.is_file():
        raise ValueError(f"{name}: no file {path}; expected the repository's own file; fetch it, or name its folder")
    try:
        rows = adapter.validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ", ".join(map(str, fault["loc"])) or "the file"
        raise ValueError(
            f"{name} {path}: {error.error_count()} faults; first, at {where}: {fault['msg']}, got "
            f"{str(fault['input'])[:80]!r}; fetch the file again"
        ) from None
    if not rows:
        raise ValueError(f"{name} {path}: no items; expected at least one; fetch the file again")
    return rows
