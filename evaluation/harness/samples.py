"""What lm-eval returns, in our own words: score rows, and one line for each item. No import of it: plain dictionaries.

Its scores are keyed "metric,filter" and "metric_stderr,filter"; its samples hold, for each item, the requests sent
(`arguments`: prompt, and a choice or the generation settings), the raw answers (`resps`) and what a filter made of them.
"""

import json
import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from evaluation.config import BenchmarkConfig
from evaluation.harness.sandbox import Outcome
from training.job import write_whole

PROMPT_TAIL_CHARS, ANSWER_CHARS, TARGET_CHARS = 500, 2000, 500
UNEXTRACTED = "[invalid]"  # what a filter says when it finds no answer

Row = dict[str, Any]


def score_rows(results: Row, *, config: BenchmarkConfig, harness_version: str) -> list[Row]:
    """Return one row for each task, metric and filter, then, for several tasks, the same pooled by number of items."""
    names = list(results["n-samples"])
    rows = []
    for name in names:
        measured = results["results"][name]
        for key in measured:
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            stderr = measured[f"{metric}_stderr,{filter_name}"]
            rows.append(
                {
                    "benchmark": config.name,
                    "task": name,
                    "metric": metric,
                    "filter": filter_name,
                    "value": float(measured[key]),
                    "stderr": None if stderr == "N/A" else float(stderr),  # a single item has none
                    "n": results["n-samples"][name]["effective"],
                    "task_version": results["versions"][name],
                    "num_fewshot": results["n-shot"][name],
                    "harness_version": harness_version,
                }
            )
    if len(names) > 1:
        rows += pool_rows(rows, config=config)
    deciding = (config.name if len(names) > 1 else names[0], config.metric, config.filter)
    return [{**row, "decides": (row["task"], row["metric"], row["filter"]) == deciding} for row in rows]


def pool_rows(rows: list[Row], *, config: BenchmarkConfig) -> list[Row]:
    """Return a row for each metric and filter over all tasks, weighted by items, as lm-eval's groups are."""
    pooled = []
    for metric, filter_name in dict.fromkeys((r["metric"], r["filter"]) for r in rows):
        parts = [r for r in rows if (r["metric"], r["filter"]) == (metric, filter_name)]
        sizes, stderrs = [r["n"] for r in parts], [r["stderr"] for r in parts]
        versions, shots = {r["task_version"] for r in parts}, {r["num_fewshot"] for r in parts}
        pooled.append(
            {
                **parts[0],
                "task": config.name,
                "value": sum(r["value"] * r["n"] for r in parts) / sum(sizes),
                "stderr": None if None in stderrs else pool_stderrs(stderrs, sizes=sizes),
                "n": sum(sizes),
                "task_version": versions.pop() if len(versions) == 1 else None,
                "num_fewshot": shots.pop() if len(shots) == 1 else None,
            }
        )
    return pooled


def pool_stderrs(stderrs: list[float], *, sizes: list[int]) -> float:
    """Return the standard error of the mean over all items: the pooled within-task variance over their number.

    lm-eval's formula (`pooled_sample_stderr`): sqrt(sum((n - 1) n se^2) / (N - k) / N) for k tasks of n items, N together.
    """
    variance = sum((n - 1) * stderr**2 * n for stderr, n in zip(stderrs, sizes, strict=True)) / (
        sum(sizes) - len(sizes)
    )
    return math.sqrt(variance / sum(sizes))


def write_samples(
    samples: dict[str, list[Row]],
    path: Path,
    *,
    config: BenchmarkConfig,
    cut: Container[str],
    outcomes: Mapping[tuple[str, str], Outcome],
    question: Callable[[str, Row], str],
) -> None:
    """Write one line an item under the deciding metric and filter, texts cut to a bound; the file is whole or absent.

    `cut` holds the prompts whose answers the token limit ended, `outcomes` how programs ended by program and test (of a benchmark that
    runs programs, every item's is there), `question` gives what a task's item asks, which is kept whole.
    """
    with write_whole(path) as out:
        for task, items in samples.items():
            found = {item["doc_id"] for item in items if item["filtered_resps"][0] != UNEXTRACTED}  # by some filter
            for item in (item for item in items if item["filter"] == config.filter):
                line = {"task": task, "doc_id": item["doc_id"], **describe_item(item, metric=config.metric)}
                line |= {"cut": item["arguments"][0][0] in cut, "question": question(task, item["doc"])}
                line["extracted_by_any"] = item["doc_id"] in found
                if outcomes:
                    outcome = outcomes[item["filtered_resps"][0][0], item["target"]]
                    line |= {"ending": outcome.ending, "reason": outcome.reason}
                out.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def describe_item(item: Row, *, metric: str) -> Row:
    """Return what the report shows of one item. `choices` is null where the answer was free text; of those that are `tied` the first
    counts as the answer."""
    prompts, seconds = zip(*item["arguments"], strict=True)
    tied = False
    if isinstance(seconds[0], str) and len(seconds) == 1:  # a continuation that greedy search would say, or not
        answer, choices, extracted = seconds[0] if item["resps"][0][0][1] else f"(not {seconds[0].strip()})", None, True
    elif isinstance(seconds[0], str):  # one request for each choice, answered by (log-probability, greedy)
        logps = [response[0][0] for response in item["resps"]]
        answer, choices, extracted = seconds[logps.index(max(logps))].strip(), len(seconds), True
        tied = not max(logps) > min(logps)  # NaN is neither
    else:
        answer, choices = item["resps"][0][0], None
        extracted = item["filtered_resps"][0] != UNEXTRACTED
    return {
        "correct": float(item[metric]),
        "prompt": prompts[0][-PROMPT_TAIL_CHARS:],
        "answer": answer[:ANSWER_CHARS],
        "target": str(item["target"])[:TARGET_CHARS],
        "extracted": extracted,
        "choices": choices,
        "tied": tied,
    }
