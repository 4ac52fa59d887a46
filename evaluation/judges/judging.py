"""The job `judge`: pairs of answers of one benchmark, a judge's verdicts on them, and what they say of models and judge."""

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from evaluation.answers import read_prompt_ids
from evaluation.eval_sets import check_limit
from evaluation.judges import arena_hard
from evaluation.judges.config import EndpointJudge, JudgeConfig, JudgeRuntime
from evaluation.judges.endpoint import JudgeEndpoint
from evaluation.judges.judge import Backend, Caller, Judgement, Pair, count_served, judge_pairs
from evaluation.judges.prompt import PAIRWISE, JudgePrompt
from evaluation.judges.scores import (
    STRONG_WEIGHT,
    Judged,
    accuracies,
    describe_judge,
    describe_lengths,
    gather,
    show_lost,
    take_repeats,
    win_rate,
)
from evaluation.judges.sets import JudgeItem, read_evalbiasbench, read_llmbar
from evaluation.responses import Responses
from evaluation.statistics import measure_noise
from training.data.rows import find_rows_file
from training.job import METRICS_FILE, Job, write_json
from training.metrics import MetricsWriter

CALLS_FILE = "calls.jsonl"  # every answer of the judge, by the digest of what was asked
PROTOCOL = "varflow judge 2"
JUDGE_SETS = {"evalbiasbench": read_evalbiasbench, "llmbar": read_llmbar}
SAMPLES_SHOWN, SHOWN_CHARS, ANSWER_CHARS = 5, 200, 2000
MOST_LOST, MOST_POSITION_BIAS, MOST_EMPTY, MOST_CUT = 0.05, 0.2, 0.2, 0.2  # shares, above which a score is flagged
FEW_QUESTIONS = 30  # below which a win rate is flagged
STYLE_CONTROL = "unavailable: the score is not adjusted for length or markdown"

Row = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A row that a policy answered: its prompt as text, the answers, and which of them the token limit ended."""

    prompt: str
    texts: list[str]
    cut: list[bool]


def run(job: Job) -> None:
    """Judge the pairs of `config.benchmark` and write `scores.json`, `samples.jsonl`, `profile.json`, `calls.jsonl`, `summary.json`.

    Inputs: `benchmark`, the files of arena_hard, evalbiasbench or llmbar; `answers` of arena_hard's model; `challenger_answers` and
    `champion_answers` of heldout; `judge`, the folder of a local one. Key and address of an endpoint are two lines of the standard
    input. A run that was stopped, killed or cut off by an endpoint goes on from the answers in `calls.jsonl`.
    """
    config = JudgeConfig.model_validate(job.config)
    runtime = JudgeRuntime.model_validate(job.runtime)
    pairs, prompt = read_pairs(config, job.inputs)
    with open_backend(job, config, runtime) as backend:
        identity = {"judge": backend.identity, "prompt": prompt.sha256}
        calls = Responses(job.output / CALLS_FILE, identity=identity)
        total = 2 * config.repeats * len(pairs)
        with contextlib.closing(calls), MetricsWriter(job.output / METRICS_FILE, total=total) as metrics:
            caller = Caller(backend, calls=calls, runtime=runtime, metrics=metrics, total=total)
            judgements = judge_pairs(pairs, prompt=prompt, config=config, caller=caller)
            calls.drop_unasked()
    judged = gather(judgements)
    rows = score_rows(judged, config=config, judge=backend.name, prompt=prompt)
    summary = summarise(judged, judgements, rows, config=config, caller=caller)
    if config.repeats > 1:
        summary |= measure_draws(judged, config=config, judge=backend.name, prompt=prompt)
    write_samples(judged, job.output / "samples.jsonl")
    write_json(
        job.output / "profile.json",
        {"config": config.model_dump(mode="json"), "protocol": PROTOCOL, "prompt": prompt.name} | identity,
    )
    write_json(
        job.output / "scores.json", [row | ({"flag": summary["flag"]} if row["decides"] else {}) for row in rows]
    )
    job.write_summary(summary)


@contextlib.contextmanager
def open_backend(job: Job, config: JudgeConfig, runtime: JudgeRuntime) -> Iterator[Backend]:
    """Give the judge of a config."""
    if isinstance(config.judge, EndpointJudge):
        key, url = (sys.stdin.readline().strip() for _ in range(2))
        if not url:
            raise ValueError(
                "judge: got no address; expected the endpoint's key, or an empty line, and its address on the standard input"
            )
        endpoint = JudgeEndpoint(
            config.judge, url=url, key=key, config=config, runtime=runtime, check_stop=job.check_stop
        )
        with contextlib.closing(endpoint):
            yield endpoint
    else:
        from evaluation.harness.offline import closed_sockets
        from evaluation.judges.local import LocalModel  # torch takes seconds, and an endpoint needs none

        with closed_sockets():
            folder = job.inputs["judge"].resolve()
            yield LocalModel(config.judge, folder, config=config, runtime=runtime, check_stop=job.check_stop)


def read_pairs(config: JudgeConfig, inputs: dict[str, Path]) -> tuple[list[Pair], JudgePrompt]:
    """Return what is to be judged, and by which prompt."""
    if config.benchmark == "arena_hard":
        return pair_arena_hard(inputs["benchmark"], inputs["answers"], config=config), arena_hard.read_prompt(
            inputs["benchmark"]
        )
    if config.benchmark == "heldout":
        return pair_heldout(inputs["challenger_answers"], inputs["champion_answers"], config=config), PAIRWISE
    items = JUDGE_SETS[config.benchmark](inputs["benchmark"])
    check_items(config, max(Counter(item.group for item in items).values()), "items of a group")
    return [pair_item(item) for item in first_of_each_group(items, config.limit)], PAIRWISE


def check_items(config: JudgeConfig, available: int, what: str) -> None:
    """Raise ValueError for an item limit beyond the data."""
    if config.limit is not None:
        check_limit(config.limit, available, what=f"{config.benchmark}: {what}")


def first_of_each_group(items: list[JudgeItem], limit: int | None) -> list[JudgeItem]:
    """Return the first items of each group, all where there is no limit."""
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.group] += 1
        if limit is None or seen[item.group] <= limit:
            kept.append(item)
    return kept


def pair_item(item: JudgeItem) -> Pair:
    """Return an item of a set that tests judges; ours is the better answer."""
    return Pair(item.id, item.group, item.id, item.instruction, ours=item.chosen, theirs=item.rejected)


def pair_arena_hard(folder: Path, answers: Path, *, config: JudgeConfig) -> list[Pair]:
    """Return Arena-Hard's questions with a model's answer and the baseline's. Each question has both, or nothing is judged."""
    questions = arena_hard.read_questions(folder)
    check_items(config, len(questions), "questions")
    asked = list(questions)[: config.limit]
    baseline = arena_hard.read_stored_answers(folder, config.baseline)
    given = read_answers(answers)
    for whose, found in ((f"baseline {config.baseline}", baseline.keys()), ("model", given.keys())):
        missing = [uid for uid in asked if uid not in found]
        if missing:
            raise ValueError(
                f"arena_hard: {len(missing)} of {len(asked)} questions have no answer of the {whose} (first: {missing[0]}); a score of "
                "the rest would be another benchmark's; give every question an answer, by a larger answers.max_prompt_tokens"
            )
    return [
        Pair(uid, "arena_hard", uid, questions[uid], given[uid].texts[0], baseline[uid], ours_cut=given[uid].cut[0])
        for uid in asked
    ]


def pair_heldout(challenger: Path, champion: Path, *, config: JudgeConfig) -> list[Pair]:
    """Return the held-out prompts that both models answered, sample by sample."""
    ours, theirs, prompts = read_answers(challenger), read_answers(champion), read_prompt_ids(challenger)
    unlike = sorted(ours.keys() ^ theirs.keys())
    if unlike:
        raise ValueError(
            f"heldout: {len(unlike)} prompts have an answer of one model only (first: row {unlike[0]}); expected the same prompts; "
            "generate both from the same rows with the same settings"
        )
    check_items(config, len(ours), "prompts")
    pairs = []
    for row_id in sorted(ours)[: config.limit]:
        mine, other = ours[row_id], theirs[row_id]
        check_alike(row_id, mine, other)
        pairs += [
            Pair(
                f"{row_id}/{k}",
                "heldout",
                prompts[row_id],
                mine.prompt,
                text,
                other.texts[k],
                mine.cut[k],
                other.cut[k],
            )
            for k, text in enumerate(mine.texts)
        ]
    return pairs


def check_alike(row_id: str, mine: Answered, other: Answered) -> None:
    """Raise ValueError unless both models were asked the same as often."""
    if mine.prompt != other.prompt:
        raise ValueError(
            f"heldout: row {row_id} is {mine.prompt[:80]!r} for the challenger and {other.prompt[:80]!r} for the champion; expected "
            "one prompt; generate both from the same rows"
        )
    if len(mine.texts) != len(other.texts):
        raise ValueError(
            f"heldout: row {row_id} has {len(mine.texts)} answers of the challenger and {len(other.texts)} of the champion; expected "
            "as many; generate both with the same samples_per_prompt"
        )


def read_answers(folder: Path) -> dict[str, Answered]:
    """Return each row that a policy answered, by row id; where nobody said whether an answer was cut, it was not."""
    table = pq.read_table(find_rows_file(folder), columns=["row_id", "prompt", "responses", "truncated"])
    return {
        row["row_id"]: Answered(
            show_prompt(row["prompt"]), row["responses"], row["truncated"] or [False] * len(row["responses"])
        )
        for row in table.to_pylist()
    }


def show_prompt(turns: Sequence[dict[str, str]]) -> str:
    """Return a conversation as text: a single user turn as it is, several with their roles."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def score_rows(judged: Judged, *, config: JudgeConfig, judge: str, prompt: JudgePrompt) -> list[Row]:
    """Return rows as evaluation.harness.result.ScoreRow has them, with an interval; the judge stands where a filter would."""
    same: Row = {
        "benchmark": config.name,
        "filter": f"judge {judge}",
        "task_version": f"{prompt.name} {prompt.sha256[:8]}",
        "num_fewshot": 0,
        "harness_version": PROTOCOL,
    }
    if config.benchmark in JUDGE_SETS:
        found = accuracies(judged)
        only = {"": found.pop("")} if len(found) > 1 else {}
        return [
            same | {"task": group or config.name, "metric": "accuracy", "decides": not group or not only} | figures
            for group, figures in (found | only).items()
        ]
    strong = STRONG_WEIGHT if config.benchmark == "arena_hard" else 1
    rate = win_rate(judged, strong_weight=strong)
    against = f"against {config.baseline}" if config.benchmark == "arena_hard" else "challenger against champion"
    figures = {"value": rate.value, "stderr": rate.stderr, "low": rate.low, "high": rate.high, "n": len(judged.counted)}
    return [same | {"task": against, "metric": "win_rate", "decides": True} | figures]


def measure_draws(judged: Judged, *, config: JudgeConfig, judge: str, prompt: JudgePrompt) -> Row:
    """Return the noise floor of a judge that draws: how many pairs it judges otherwise, and how far the score moves, from one repeat to
    another, each taken alone."""
    repeats = take_repeats(judged)
    floor = measure_noise([[pair.score for pair in repeat.counted] for repeat in repeats])
    rows = (row for repeat in repeats for row in score_rows(repeat, config=config, judge=judge, prompt=prompt))
    values = [row["value"] for row in rows if row["decides"]]
    return {"flip_rate": floor.flip_rate, "max_difference": max(values) - min(values)}


def summarise(
    judged: Judged, judgements: list[Judgement], rows: list[Row], *, config: JudgeConfig, caller: Caller
) -> Row:
    """Return the deciding score with its interval, what it took, how far the judge can be believed, and a flag where it cannot."""
    (deciding,) = (row for row in rows if row["decides"])
    served = count_served(judgements)
    summary: Row = {
        "benchmark": config.name,
        "judge": caller.backend.name,
        "metric": deciding["metric"],
        "value": deciding["value"],
        "low": deciding["low"],
        "high": deciding["high"],
        "stderr": deciding["stderr"],
        "items": deciding["n"],
        "questions": len({item.pair.cluster for item in judged.counted}),
        "served_as": ", ".join(sorted(served)),
        "calls": len(caller.used),
        "calls_now": caller.asked,
        "tokens": caller.tokens,
    }
    summary |= describe_judge(judged, judgements) | describe_lengths(judged)
    if config.benchmark in JUDGE_SETS:
        summary |= {f"accuracy_{row['task']}": row["value"] for row in rows if not row["decides"]}
        summary["consistent_accuracy"] = deciding["consistent"]
    else:
        summary["style_control"] = STYLE_CONTROL
    flags = [*find_flags(summary, tests_judge=config.benchmark in JUDGE_SETS), *find_cut_flags(summary, config)]
    summary["flag"] = "; ".join([*flags, *find_name_flags(list(served), config)]) or None
    for number, text in enumerate(show_lost(judged)[:SAMPLES_SHOWN], start=1):
        summary[f"flag_sample_{number}"] = f"no verdict: {text[-SHOWN_CHARS:]!r}"
    return summary


def find_flags(summary: Row, *, tests_judge: bool) -> Iterator[str]:
    """Yield why a score may not say what it seems to."""
    if summary["unparseable_pairs"] > MOST_LOST * summary["pairs"]:
        yield f"verdicts: {summary['unparseable_pairs']} of {summary['pairs']} pairs have none in some order and are left out"
    if summary["position_bias"] > MOST_POSITION_BIAS:
        yield f"position: in {summary['position_bias']:.0%} of the pairs the verdict follows the place of the answer"
    if summary["empty_answers"] > MOST_EMPTY * summary["items"]:
        yield f"empty: {summary['empty_answers']} of {summary['items']} answers have no text"
    if tests_judge and summary["low"] <= 0.5:
        yield f"chance: {summary['value']:.4f} is not shown to be above guessing, 0.5"
    if not tests_judge and summary["questions"] < FEW_QUESTIONS:
        yield f"few: {summary['questions']} questions say little; expected {FEW_QUESTIONS} or more"


def find_cut_flags(summary: Row, config: JudgeConfig) -> Iterator[str]:
    """Yield whose answers the judge has mostly not seen whole: their verdicts may be on the limit."""
    ours, theirs = ("challenger", "champion") if config.benchmark == "heldout" else ("model", "other side")
    for who, cut in ((ours, summary["cut_answers"]), (theirs, summary["cut_other_answers"])):
        if cut > MOST_CUT * summary["items"]:
            yield f"limit: {cut} of {summary['items']} answers of the {who} were ended by the token limit (max_new_tokens)"


def find_name_flags(served: Sequence[str], config: JudgeConfig) -> Iterator[str]:
    """Yield what speaks against it that an endpoint's judge answered, by the names that it gave; a local one is known by its weights.

    Expected are the judge's name, its revision, or one after the other, as in gpt-4o-2024-08-06.
    """
    if not isinstance(config.judge, EndpointJudge):
        return
    name, revision = config.judge.model, config.judge.revision
    shown = ", ".join(sorted(served))
    if len(served) > 1:
        yield f"judge: {len(served)} models answered under its name: {shown}"
    elif set(served) - {name, revision, *(f"{name}{between}{revision}" for between in "-@:")}:
        yield f"judge: {shown} answered, by its own word, asked was {name}, revision {revision}"


def write_samples(judged: Judged, path: Path) -> None:
    """Write a line for each pair, as evaluation.harness.result reads them, with every verdict as a margin of ours by order."""
    with path.open("w") as out:
        for item in judged.counted:
            pair = item.pair
            line = {
                "task": pair.group,
                "doc_id": pair.id,
                "correct": item.score,
                "prompt": pair.question[-ANSWER_CHARS:],
                "answer": pair.ours[:ANSWER_CHARS],
                "target": pair.theirs[:ANSWER_CHARS],
                "ours_first": [first.margin for first, _ in item.both],
                "theirs_first": [second.margin for _, second in item.both],
            }
            out.write(json.dumps(line) + "\n")
