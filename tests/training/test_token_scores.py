"""The job score_tokens: its tokens add up to the answer's own log-probability, and its pieces to the answer's text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import generate, reference, token_scores
from training.job import HARDWARE_FILE, Job
from training.token_scores import cut_text

TEXTS = ("Paris is the capital — naïve, 東京!", "No", "  two\n\nlines")


@pytest.fixture
def moved(tiny_policy: Path, tmp_path: Path) -> Path:
    """Save the tiny policy with other weights: a policy after training."""
    folder = shutil.copytree(tiny_policy, tmp_path / "moved")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path, make_row: Callable[..., dict[str, Any]], write_rows: Callable[..., Path]) -> Path:
    made = [make_row(f"Question {k}?", [text, "another"], truncated=[k == 1, False]) for k, text in enumerate(TEXTS)]
    made.append(make_row("Marker?", ["Yes <|im_end|>", "No"]))
    return write_rows(tmp_path / "rows", made)


def score(job: Job) -> dict[tuple[str, str], list[dict[str, Any]]]:
    token_scores.run(job)
    told = json.loads((job.output / "tokens.json").read_text())
    return {(answer["whose"], answer["row_id"]): answer["tokens"] for answer in told}


def test_tokens_add_up_to_the_answer_under_both_models_and_to_its_text(
    rows: Path, tiny_policy: Path, moved: Path, make_job: Callable[..., Job]
) -> None:
    by_id = {row["row_id"]: row for row in pq.read_table(rows / "rows.parquet").to_pylist()}
    inputs = {"reference": tiny_policy, "policy": moved, "reference_answers": rows, "policy_answers": rows}
    job = make_job("score_tokens", "t", config={"row_ids": sorted(by_id), "max_tokens": 96}, inputs=inputs)
    found = score(job)
    sums = {}
    for who, model in (("reference", tiny_policy), ("policy", moved)):
        plain = make_job("score_reference", who, config={"max_tokens": 96}, inputs={"rows": rows, "reference": model})
        reference.run(plain)
        scored = pq.read_table(plain.output / "scores.parquet").to_pylist()
        sums[who] = {row["row_id"]: row["logp"][0] for row in scored}
    assert found.keys() == {(whose, row) for whose in ("reference", "policy") for row in sums["policy"]}
    for (_, row), tokens in found.items():
        for who in ("reference", "policy"):
            assert sum(token[who] for token in tokens) == pytest.approx(sums[who][row], abs=2e-4)
        text = "".join(token["text"] for token in tokens)
        assert text == by_id[row]["responses"][0] + ("" if by_id[row]["truncated"][0] else "<|im_end|>")
    assert sums["policy"] != sums["reference"]
    summary = json.loads((job.output / "summary.json").read_text())
    assert (summary["answers"], summary["left_out"]) == (6, 2)  # a marker within an answer cannot be rendered
    assert json.loads((job.work / HARDWARE_FILE).read_text()) == {"device": "cpu", "devices": 1}


def test_only_the_named_rows_and_no_answer_that_is_read_differently(
    rows: Path, tiny_policy: Path, moved: Path, make_job: Callable[..., Job]
) -> None:
    first = pq.read_table(rows / "rows.parquet").to_pylist()[0]["row_id"]
    inputs = {"reference": tiny_policy, "policy": moved, "reference_answers": rows, "policy_answers": rows}
    config = {"row_ids": [first], "max_tokens": 96}
    assert score(make_job("score_tokens", "one", config=config, inputs=inputs)).keys() == {
        ("reference", first),
        ("policy", first),
    }
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:4]  # the same ids, cut otherwise
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert score(make_job("score_tokens", "two", config=config, inputs=inputs)) == {}


def test_sampled_answers_are_the_tokens_that_were_drawn(
    rows: Path, tiny_policy: Path, moved: Path, make_job: Callable[..., Job]
) -> None:
    """Read from its text again, an answer that was cut within a character would be one that nobody drew."""
    settings = {"split": "train", "samples_per_prompt": 1, "max_new_tokens": 7, "limit": 3}
    drawn = make_job("generate", "drawn", config=settings, inputs={"rows": rows, "policy": tiny_policy})
    generate.run(drawn)
    answers = {row["row_id"]: row for row in pq.read_table(drawn.output / "responses.parquet").to_pylist()}
    inputs = {"reference": tiny_policy, "policy": moved, "reference_answers": drawn.output, "policy_answers": rows}
    config = {"row_ids": sorted(answers), "max_tokens": 96}
    found = score(make_job("score_tokens", "drawn-tokens", config=config, inputs=inputs))
    scored = make_job(
        "score_reference", "of-drawn", config={"max_tokens": 96}, inputs={"rows": drawn.output, "reference": moved}
    )
    reference.run(scored)
    logps = {row["row_id"]: row["logp"][0] for row in pq.read_table(scored.output / "scores.parquet").to_pylist()}
    for row_id, row in answers.items():
        tokens = found["reference", row_id]
        assert len(tokens) == len(row["response_ids"][0])
        assert sum(token["policy"] for token in tokens) == pytest.approx(logps[row_id], abs=2e-4)


def test_a_character_of_several_tokens_is_the_last_ones(tiny_policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    ids = tuple(tokenizer("東 a", add_special_tokens=False).input_ids)
    texts = cut_text(tokenizer, ids)
    assert texts[:3] == ["", "", "東"] and "".join(texts) == "東 a"
    assert cut_text(tokenizer, ids[:2])[-1].endswith("�"), "what was cut within a character shows"
