"""The model card: what an exported model is, what it was made of, what was measured and decided, in Markdown."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field

from evaluation.alignment import AlignmentResult
from evaluation.gate.verdict import Verdict
from training.config import Config


class CardScore(Config):
    """A benchmark's deciding score, from 0 to 1, with its 95 % interval."""

    benchmark: str
    metric: str
    filter: str
    value: float
    low: float
    high: float
    n: int
    num_fewshot: int | None
    harness_version: str


class CardRewards(Config):
    """What a reward model says of the answers to a prompt set, with 95 % intervals."""

    result: AlignmentResult
    interval: tuple[float, float] | None  # of the mean reward; None of a single prompt
    scorer: str
    baseline: str | None  # None where the answers were held against nobody's


class CardWinRate(Config):
    """How often a judge prefers the answers to somebody else's, from 0 to 1, with its 95 % interval."""

    benchmark: str
    judge: str
    against: str
    value: float
    low: float
    high: float
    n: int
    flag: str | None


class CardSource(Config):
    """What came from outside, by the name it was given and the digest of its bytes."""

    role: str  # step.input
    name: str
    digest: str
    licence: str | None  # None where its files do not state any


class CardStep(Config):
    """One step of the lineage."""

    step: str
    fingerprint: str
    created: str
    wall_seconds: float


class Card(Config):
    """Everything the card says. What is not known is None or empty, and the card says that it is not known."""

    title: str
    ref: str
    digest: str
    base: str | None
    licence: str | None
    objective: str
    training: dict[str, Any]  # the step's config
    figures: dict[str, Any] = Field({})  # its summary
    data: dict[str, Any] = Field({})  # counts of ingest
    reward: str | None = None  # what scored the responses
    reward_figures: dict[str, Any] = Field({})
    scores: tuple[CardScore, ...] = ()
    rewards: tuple[CardRewards, ...] = ()
    win_rates: tuple[CardWinRate, ...] = ()
    verdict: Verdict | None = None
    verdict_ref: str = ""
    promoted: str | None = None  # by which entry of whose history
    sources: tuple[CardSource, ...] = ()
    steps: tuple[CardStep, ...] = ()
    files: dict[str, str] = Field({})  # name -> sha256
    adapter: bool = False
    commit: str = ""
    versions: dict[str, str] = Field({})

    @property
    def flags(self) -> list[str]:
        """Why rewards and win rates may not say what they seem to."""
        of_rewards = [f"{each.result.name}: {each.result.flag}" for each in self.rewards if each.result.flag]
        return of_rewards + [f"{each.benchmark}: {each.flag}" for each in self.win_rates if each.flag]


def render_card(card: Card) -> str:
    """Return README.md as the hub and people read it."""
    environment = Environment(
        loader=PackageLoader("evaluation.pages", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False,  # Markdown; `cell` keeps what others wrote within its cell
    )  # fmt: skip
    environment.filters |= {"cell": show_cell, "points": lambda score: f"{100 * score:.1f}"}
    return environment.get_template("card.md.j2").render(card=card)


def show_cell(value: Any) -> str:
    """Return a value as text that stays within one cell of a Markdown table and makes no markup."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    for mark in "\\`|<[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
