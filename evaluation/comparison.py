"""Two or more models side by side, on what was measured of all of them alike: the numbers of `varflow compare`, as plain data.

The first model is the reference; a difference is another model minus it, over the same items or prompts. Nothing decides
here: intervals are two-sided, and p-values are adjusted for how many are shown.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation import statistics
from evaluation.harness.result import BenchmarkResult, ItemKey, check_profiles, pair_items
from evaluation.judges.scores import STRONG_WEIGHT, rate_questions, to_score
from training.config import Config

CONFIDENCE = 0.95
BOOTSTRAP_SEED = 20_241_105
SAMPLES = 8
REWARD_DETAIL = "mean reward of a prompt's answers"
WORDS = re.compile(r"\S+\s*|\s+")  # a word with the space behind it

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class ItemText:
    """What one item asked and what a model answered."""

    prompt: str
    answer: str
    target: str


@dataclass(frozen=True)
class Answer:
    """A model's answers to one held-out prompt, and whether the cap cut them."""

    prompt: str
    responses: tuple[str, ...]
    truncated: tuple[bool, ...]


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of a model's answers, each held against the same baseline's answer in both orders."""

    detail: str  # whose answers they are held against, and by whom
    profile: Mapping[str, Any]  # what two of them must share
    margins: Mapping[str, Sequence[int]]  # every verdict on a question, by its id: from -2 to 2, positive for the model


@dataclass(frozen=True)
class Subject:
    """One model with what was measured of it. What was not is absent."""

    name: str
    ref: str
    results: Mapping[str, BenchmarkResult] = field(default_factory=dict)
    texts: Mapping[str, Mapping[ItemKey, ItemText]] = field(default_factory=dict)  # by benchmark
    answers: Mapping[str, Answer] = field(default_factory=dict)  # by row id
    rewards: Mapping[str, float] = field(default_factory=dict)  # mean of a row's responses, by row id
    sets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # the same of each prompt set, by name
    verdicts: Mapping[str, Verdicts] = field(default_factory=dict)  # by what was judged
    settings: Mapping[str, Any] = field(default_factory=dict)  # `step.field`: value, and sources by name
    data: Mapping[str, Any] = field(default_factory=dict)  # counts of ingest
    tokens: Mapping[str, "TokenAnswers"] = field(default_factory=dict)  # by row id; of the reference none
    rows: frozenset[str] = frozenset()  # ids of the rows it was trained from
    cost: Mapping[str, float] = field(default_factory=dict)  # wall seconds by step


# of each token its text, and its log-probability under the reference and under the model, in nats
Tokens = Sequence[tuple[str, float, float]]


@dataclass(frozen=True)
class TokenAnswers:
    """The tokens of the reference's answer and of a model's own, each scored by both. None where it could not be."""

    reference: Tokens | None
    own: Tokens | None


class Level(Config):
    """One model's mean with its interval."""

    value: float
    low: float
    high: float


class Difference(Config):
    """One model minus the reference, over the same items or prompts."""

    what: str  # benchmark, prompt set, what was judged, heldout_reward or answer_characters
    subject: str
    n: int
    difference: float
    low: float
    high: float
    won: int  # items on which this model is higher
    lost: int
    p_value: float  # two-sided, of no difference
    p_adjusted: float  # by Holm, over all differences of the comparison
    detectable: (
        float | None
    )  # a true difference this many show with 80 % power, one-sided at 5 %; None where nothing differs
    method: str
    stratified_low: float | None = None  # of the same difference by Student's within tasks; None where there is one
    stratified_high: float | None = None


class Measure(Config):
    """What was measured of every model alike: their levels in order, and each later one against the first."""

    what: str
    detail: str  # metric and filter, or the unit
    unit: str  # items and questions, on which scores run from 0 to 1, or prompts
    n: int
    levels: tuple[Level, ...]
    differences: tuple[Difference, ...]


class Flip(Config):
    """An item on which a model and the reference do not score alike."""

    benchmark: str
    task: str
    doc_id: str
    subject: str
    won: bool
    prompt: str
    target: str
    reference_answer: str
    answer: str


class Span(Config):
    """A piece of an answer: a token with its log-probability under both models, or words and whether the other answer lacks them."""

    text: str
    own: bool = False
    logp_reference: float | None = None  # nats
    logp: float | None = None  # under the model that is held against the reference

    @property
    def difference(self) -> float | None:
        """How much likelier the model finds the token than the reference does, in nats."""
        return None if self.logp is None or self.logp_reference is None else self.logp - self.logp_reference


class Sample(Config):
    """One held-out prompt with every model's first answer, in the order of the models."""

    prompt: str
    answers: tuple[tuple[Span, ...], ...]
    rewards: tuple[float | None, ...]


class FieldRow(Config):
    """A setting, count or cost of every model, in order; None where a model has none."""

    name: str
    values: tuple[Any, ...]


class Overlap(Config):
    """Rows that a model and the reference were trained from."""

    subject: str
    both: int
    only_reference: int
    only_subject: int


class Comparison(Config):
    """Everything that is shown, in JSON, on the page and in the terminal."""

    subjects: tuple[str, ...]
    refs: tuple[str, ...]
    confidence: float
    benchmarks: tuple[Measure, ...]
    judges: tuple[Measure, ...]  # win rates against one baseline
    alignment: tuple[Measure, ...]  # rewards of the answers to prompt sets
    reward: Measure | None
    length: Measure | None
    truncated: tuple[float, ...]  # share of the held-out answers that the cap cut, by model; empty where there are none
    flips: tuple[Flip, ...]
    samples: tuple[Sample, ...]
    settings: tuple[FieldRow, ...]  # those that differ
    data: tuple[FieldRow, ...]
    overlaps: tuple[Overlap, ...]
    cost: tuple[FieldRow, ...]
    not_compared: tuple[str, ...]

    @property
    def measures(self) -> list[Measure]:
        """Everything with an interval, in the order in which it is shown."""
        single = [measure for measure in (self.reward, self.length) if measure]
        return [*self.benchmarks, *self.judges, *self.alignment, *single]


def compare(subjects: Sequence[Subject]) -> Comparison:
    """Compare models on what all of them have. Raises ValueError, naming the field, for scores of different profiles."""
    if len(subjects) < 2:
        raise ValueError(f"compare: got {len(subjects)} models, expected at least 2")
    benchmarks = [measure_benchmark(name, subjects) for name in shared(subjects, lambda s: s.results)]
    judges = [measure_verdicts(name, subjects) for name in shared(subjects, lambda s: s.verdicts)]
    alignment = [
        measure_prompts(name, REWARD_DETAIL, [subject.sets[name] for subject in subjects], subjects)
        for name in shared(subjects, lambda s: s.sets)
    ]
    reward = measure_rewards(subjects)
    length = measure_lengths(subjects)
    measures = adjust([*benchmarks, *judges, *alignment, *(measure for measure in (reward, length) if measure)])
    by_what = {measure.what: measure for measure in measures}
    first = subjects[0]
    answered = all(subject.answers for subject in subjects)
    return Comparison(
        subjects=tuple(subject.name for subject in subjects),
        refs=tuple(subject.ref for subject in subjects),
        confidence=CONFIDENCE,
        benchmarks=tuple(by_what[measure.what] for measure in benchmarks),
        judges=tuple(by_what[measure.what] for measure in judges),
        alignment=tuple(by_what[measure.what] for measure in alignment),
        reward=by_what[reward.what] if reward else None,
        length=by_what[length.what] if length else None,
        truncated=tuple(map(truncated_share, subjects)) if answered else (),
        flips=tuple(flip for measure in benchmarks for flip in find_flips(measure.what, subjects)),
        samples=choose_samples(subjects) if answered else (),
        settings=differing([subject.settings for subject in subjects]),
        data=rows_of([subject.data for subject in subjects]),
        overlaps=tuple(overlap(first, subject) for subject in subjects[1:] if first.rows and subject.rows),
        cost=rows_of([subject.cost for subject in subjects]),
        not_compared=tuple(list_absent(subjects)),
    )


def measure_benchmark(name: str, subjects: Sequence[Subject]) -> Measure:
    """Return all models' scores on one benchmark, paired by item."""
    results = [subject.results[name] for subject in subjects]
    row = next(row for row in results[0].scores if row.decides)
    tasks = [task for task, _ in results[0].keys]
    differences = [
        describe_difference(name, subject.name, *pair_items(result, results[0]), strata=tasks)
        for subject, result in zip(subjects[1:], results[1:], strict=True)
    ]
    levels = [
        Level(value=r.score, low=low, high=high)
        for r in results
        for low, high in [statistics.score_interval([*r.items.values()])]
    ]
    detail = row.metric if row.filter == "none" else f"{row.metric}, {row.filter}"
    return Measure(
        what=name,
        detail=detail,
        unit="items",
        n=len(results[0].items),
        levels=tuple(levels),
        differences=tuple(differences),
    )


def measure_verdicts(name: str, subjects: Sequence[Subject]) -> Measure:
    """Return all models' win rates against the same baseline by the same judge, paired by question, over those on which every model
    has its verdicts. Raises ValueError, naming the field, for verdicts of different profiles."""
    given = [subject.verdicts[name] for subject in subjects]
    for subject, own in zip(subjects[1:], given[1:], strict=True):
        check_profiles(name, own.profile, given[0].profile, who=(subject.name, subjects[0].name))
    asked = set[str]().union(*(own.margins for own in given))
    questions = sorted(asked.intersection(*(own.margins for own in given)))
    if not questions:
        raise ValueError(
            f"{name}: none of {len(asked)} questions has verdicts of every model; judge their answers again"
        )
    rated = [rate_verdicts([own.margins[question] for question in questions]) for own in given]
    _, first_Q, linear_Q = rated[0]
    differences = [
        describe_difference(name, subject.name, own_linear_Q, linear_Q).model_copy(
            update={"won": int((own_Q > first_Q).sum()), "lost": int((own_Q < first_Q).sum())}
        )
        for subject, (_, own_Q, own_linear_Q) in zip(subjects[1:], rated[1:], strict=True)
    ]
    left_out = len(asked) - len(questions)
    return Measure(
        what=name,
        detail=given[0].detail + (f"; without {left_out} that lack a verdict on some model" if left_out else ""),
        unit="questions",
        n=len(questions),
        levels=tuple(level for level, _, _ in rated),
        differences=tuple(differences),
    )


def rate_verdicts(margins: Sequence[Sequence[int]]) -> tuple[Level, Scores, Scores]:
    """Return the win rate of the verdicts on each question with the interval that the judge's step gives it, the score of each question
    (Q,), 1 for the model and 0 for the baseline, and the same linearised (Q,).

    The rate is a ratio, weighted verdicts over weights, since a strong verdict counts three times in Arena-Hard. R + w_Q (s_Q - R) / mean(w)
    has the mean R and, to first order, the spread of the ratio, so a paired t of two models' tests the difference of their rates.
    """
    weights = [[STRONG_WEIGHT if abs(margin) == 2 else 1 for margin in own] for own in margins]
    weight_Q = np.array([sum(own) for own in weights], dtype=np.float64)
    both = zip(margins, weights, strict=True)
    score_Q = np.array([np.dot([to_score(margin) for margin in own], weight) for own, weight in both]) / weight_Q
    rate = rate_questions(score_Q, weight_Q, np.arange(len(score_Q)))
    share_Q = weight_Q / weight_Q.mean()
    level = Level(value=rate.value, low=rate.low, high=rate.high)
    return level, score_Q, share_Q * score_Q + (1 - share_Q) * rate.value


def measure_rewards(subjects: Sequence[Subject]) -> Measure | None:
    """Return the held-out reward of all models over the prompts, None where some model has none."""
    if not all(subject.rewards for subject in subjects):
        return None
    return measure_prompts("heldout_reward", REWARD_DETAIL, [subject.rewards for subject in subjects], subjects)


def measure_lengths(subjects: Sequence[Subject]) -> Measure | None:
    """Return the characters of all models' answers over the prompts, None where some model has none."""
    if not all(subject.answers for subject in subjects):
        return None
    lengths = [{row: mean_characters(answer) for row, answer in subject.answers.items()} for subject in subjects]
    return measure_prompts("answer_characters", "characters of a prompt's answers", lengths, subjects)


def mean_characters(answer: Answer) -> float:
    """Return the mean length of the answers to one prompt."""
    return sum(map(len, answer.responses)) / len(answer.responses)


def measure_prompts(
    what: str, detail: str, values: Sequence[Mapping[str, float]], subjects: Sequence[Subject]
) -> Measure:
    """Return the means over the same prompts, rows of one prompt averaged first; refuse unlike prompts."""
    rows = sorted(values[0])
    for subject, own in zip(subjects, values, strict=True):
        if own.keys() != values[0].keys():
            unlike = len(own.keys() ^ values[0].keys())
            raise ValueError(
                f"{what}: the prompts must be the same; {unlike} are of only one of {subjects[0].name} and {subject.name}; generate and "
                "score both from the same rows, with answers.max_prompt_tokens that no prompt is too long for"
            )
    answers = subjects[0].answers  # a prompt set has each prompt once
    prompts = [answers[row].prompt if row in answers else row for row in rows]
    table = [statistics.average_clusters([own[row] for row in rows], prompts) for own in values]
    differences = [
        describe_difference(what, subject.name, own, table[0])
        for subject, own in zip(subjects[1:], table[1:], strict=True)
    ]
    return Measure(
        what=what,
        detail=detail,
        unit="prompts",
        n=len(table[0]),
        levels=tuple(map(mean_level, table)),
        differences=tuple(differences),
    )


def mean_level(values_N: Scores) -> Level:
    """Return a mean over prompts with Student's interval; of one prompt the mean alone."""
    if len(values_N) < 2:
        return Level(value=float(values_N[0]), low=float(values_N[0]), high=float(values_N[0]))
    test = statistics.paired_t(values_N, alpha=(1 - CONFIDENCE) / 2)
    return Level(value=test.mean, low=test.low, high=test.high)


def describe_difference(
    what: str, subject: str, own_N: Scores, reference_N: Scores, *, strata: Sequence[str] = ()
) -> Difference:
    """Return own minus reference: Tango's interval and mid-p McNemar where all scores are 0 or 1, else paired t; within `strata`
    (n,), such as a benchmark's tasks, where there are several: beside Tango's, which knows none."""
    d_N = own_N - reference_N
    n, won, lost = len(d_N), int((d_N > 0).sum()), int((d_N < 0).sum())
    alpha, within = (1 - CONFIDENCE) / 2, None
    if len(set(strata)) > 1:
        within = statistics.stratified_t(d_N, strata, alpha=alpha)
    if np.isin(own_N, (0, 1)).all() and np.isin(reference_N, (0, 1)).all():
        low, high = statistics.tango_interval(won, lost, n=n, confidence=CONFIDENCE)
        one_sided = statistics.mcnemar_midp(won, lost)
        detectable: float | None = statistics.detectable_difference(n, discordance=max(won + lost, 1) / n, alpha=0.05)
        method = "Tango score interval, mid-p McNemar"
    else:
        if n < 2:
            raise ValueError(f"{what}: got {n} pair, expected at least 2 for an interval; measure more")
        test = within or statistics.paired_t(d_N, alpha=alpha)
        low, high, one_sided, method = test.low, test.high, test.p_value, "t within tasks" if within else "paired t"
        detectable = statistics.detectable_mean(n, sd=test.sd, alpha=0.05) if test.sd > 0 else None
        if test.sd == 0:
            one_sided = 0.5  # without spread nothing is estimated
    return Difference(
        what=what, subject=subject, n=n, difference=float(d_N.mean()), low=low, high=high, won=won, lost=lost,
        p_value=min(1.0, 2 * min(one_sided, 1 - one_sided)), p_adjusted=1.0, detectable=detectable, method=method,
        stratified_low=within.low if within else None, stratified_high=within.high if within else None,
    )  # fmt: skip


def adjust(measures: list[Measure]) -> list[Measure]:
    """Return the measures with p-values adjusted by Holm over all their differences."""
    p_values = [difference.p_value for measure in measures for difference in measure.differences]
    if not p_values:
        return measures
    adjusted = iter(statistics.adjust_holm(p_values))
    return [
        measure.model_copy(
            update={
                "differences": tuple(
                    d.model_copy(update={"p_adjusted": float(next(adjusted))}) for d in measure.differences
                )
            }
        )
        for measure in measures
    ]


def find_flips(benchmark: str, subjects: Sequence[Subject]) -> list[Flip]:
    """Return the items on which a model and the reference do not score alike, won ones first, in the order of the items."""
    first, flips = subjects[0], []
    for subject in subjects[1:]:
        ours, theirs = subject.results[benchmark].items, first.results[benchmark].items
        for key in sorted(theirs):
            if ours[key] == theirs[key]:
                continue
            own, reference = subject.texts[benchmark][key], first.texts[benchmark][key]
            flips.append(
                Flip(
                    benchmark=benchmark,
                    task=key[0],
                    doc_id=key[1],
                    subject=subject.name,
                    won=ours[key] > theirs[key],
                    prompt=reference.prompt,
                    target=reference.target,
                    reference_answer=reference.answer,
                    answer=own.answer,
                )
            )
    return sorted(flips, key=lambda flip: (subject_order(subjects, flip.subject), not flip.won))


def subject_order(subjects: Sequence[Subject], name: str) -> int:
    """Return the place of a model."""
    return [subject.name for subject in subjects].index(name)


def choose_rows(rows: Iterable[str], first: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    """Return the held-out rows whose reward moved most from the first model to the last, up and down; rows without one where none has."""
    ordered = sorted(rows)
    if rewarded := [row for row in ordered if row in first and row in last]:
        ordered = rewarded
        ordered.sort(key=lambda row: last[row] - first[row])
    half = SAMPLES // 2
    return ordered[::-1] if len(ordered) <= SAMPLES else [*reversed(ordered[-half:]), *ordered[:half]]


def choose_samples(subjects: Sequence[Subject]) -> tuple[Sample, ...]:
    """Return the chosen held-out prompts with all answers, coloured."""
    return tuple(
        Sample(
            prompt=subjects[0].answers[row].prompt,
            answers=colour_answers(row, subjects),
            rewards=tuple(subject.rewards.get(row) for subject in subjects),
        )
        for row in choose_rows(subjects[0].answers, subjects[0].rewards, subjects[-1].rewards)
    )


def colour_answers(row: str, subjects: Sequence[Subject]) -> tuple[tuple[Span, ...], ...]:
    """Return each answer in pieces: tokens, where both models were asked about them, else words. The reference's are held against
    the second model."""
    words = colour([subject.answers[row].responses[0] for subject in subjects])
    pairs = [subject.tokens.get(row) for subject in subjects[1:]]
    tokens = [pairs[0].reference if pairs[0] else None, *(pair.own if pair else None for pair in pairs)]
    return tuple(
        own if scored is None else tuple(Span(text=text, logp_reference=a, logp=b) for text, a, b in scored)
        for own, scored in zip(words, tokens, strict=True)
    )


def colour(texts: Sequence[str]) -> tuple[tuple[Span, ...], ...]:
    """Return each text in pieces, marked where the other text has no such words in that place: the first against the second,
    every other against the first."""
    words = [WORDS.findall(text) for text in texts]
    return tuple(mark(own, words[1] if place == 0 else words[0]) for place, own in enumerate(words))


def mark(own: list[str], other: list[str]) -> tuple[Span, ...]:
    """Return words joined into spans, marked where `other` has none like them in that place; white space makes no difference."""
    theirs, ours = [word.strip() for word in other], [word.strip() for word in own]
    matcher = difflib.SequenceMatcher(None, theirs, ours, autojunk=False)
    spans = [
        (tag != "equal", "".join(own[start:end])) for tag, _, _, start, end in matcher.get_opcodes() if end > start
    ]
    return tuple(Span(text=text, own=is_own) for is_own, text in spans)


def truncated_share(subject: Subject) -> float:
    """Return the share of held-out answers that the cap cut."""
    cut = [flag for answer in subject.answers.values() for flag in answer.truncated]
    return sum(cut) / len(cut)


def shared(subjects: Sequence[Subject], get: Any) -> list[str]:
    """Return the names that every model has, in the order of the first."""
    return [name for name in get(subjects[0]) if all(name in get(subject) for subject in subjects)]


def list_absent(subjects: Sequence[Subject]) -> list[str]:
    """Return a sentence for each thing that some model has and another has not."""
    said = []
    everything = [{**subject.results, **subject.verdicts, **subject.sets} for subject in subjects]
    names = dict.fromkeys(name for own in everything for name in own)
    held = [(name, [s.name for s, own in zip(subjects, everything, strict=True) if name in own]) for name in names]
    held += [
        ("held-out answers", [s.name for s in subjects if s.answers]),
        ("held-out rewards", [s.name for s in subjects if s.rewards]),
    ]
    for name, who in held:
        if len(who) < len(subjects):
            whose = f"only of {', '.join(who)}" if who else "of none of them"
            said.append(f"{name}: {whose}, so not compared")
    return said


def rows_of(columns: Sequence[Mapping[str, Any]]) -> tuple[FieldRow, ...]:
    """Return one row for each name that any model has."""
    names = dict.fromkeys(name for column in columns for name in column)
    return tuple(FieldRow(name=name, values=tuple(column.get(name) for column in columns)) for name in names)


def differing(columns: Sequence[Mapping[str, Any]]) -> tuple[FieldRow, ...]:
    """Return the rows whose values are not all the same; a model without any setting, which nothing here made, is left out of that."""
    made = [place for place, column in enumerate(columns) if column]
    return tuple(row for row in rows_of(columns) if len({repr(row.values[place]) for place in made}) > 1)


def overlap(first: Subject, other: Subject) -> Overlap:
    """Return how many training rows two models share."""
    return Overlap(
        subject=other.name,
        both=len(first.rows & other.rows),
        only_reference=len(first.rows - other.rows),
        only_subject=len(other.rows - first.rows),
    )
