"""The job score_tokens: what two models say of every token of a few answers, so that a page can show where they part.

The models are loaded one after the other, and an answer goes through alone: there are only a few.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from training.config import Runtime, TokenScoreConfig
from training.data.batch import collate
from training.data.rows import find_rows_file
from training.job import Job, write_json
from training.logprobs import as_policy, check_head, trained_logps
from training.model import check_context, digest_rendering, load_policy, load_tokenizer, start_torch
from training.render import Renderer, UnusableRow

# T tokens of an answer, the one that stops it included

WHO = ("reference", "policy")
COLUMNS = ["row_id", "prompt", "responses", "truncated", "response_ids"]


@dataclass(frozen=True)
class ScoredAnswer:
    """The tokens of an answer as one tokenizer reads it, the text of each, and their log-probabilities in nats."""

    ids_T: tuple[int, ...]
    text_T: tuple[str, ...]  # empty where a character goes on in the next token
    logp_T: tuple[float, ...]


def run(job: Job) -> None:
    """Score the first answers of both models to the named rows under both models: `tokens.json`, `summary.json` in `output`.

    An answer that the two tokenizers read differently, or that cannot be rendered, is left out.
    """
    config = TokenScoreConfig.model_validate(job.config)
    device = start_torch(Runtime.model_validate(job.runtime))
    started = time.monotonic()
    answers = read_answers(job, row_ids=config.row_ids)
    scored = [score_answers(job, who, answers, config=config, device=device) for who in WHO]
    told = []
    for (whose, row), reference, policy in zip(answers, *scored, strict=True):
        if reference and policy and reference.ids_T == policy.ids_T:
            columns = zip(reference.text_T, reference.logp_T, policy.logp_T, strict=True)
            pieces = [{"text": text, "reference": ours, "policy": theirs} for text, ours, theirs in columns]
            told.append({"row_id": row["row_id"], "whose": whose, "tokens": pieces})
    write_json(job.output / "tokens.json", told)
    tokens = sum(len(answer["tokens"]) for answer in told)
    summary = {"answers": len(told), "left_out": len(answers) - len(told), "scored_tokens": tokens}
    job.write_summary(summary | {"wall_seconds": round(time.monotonic() - started, 3)})


def read_answers(job: Job, *, row_ids: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Return whose answers to the named rows there are: as tokens where they were drawn as those of both models' tokenizer and template, else
    as text alone."""
    renderings = [digest_rendering(load_tokenizer(job.inputs[who])) for who in WHO]
    answers: list[tuple[str, dict[str, Any]]] = []
    for whose in WHO:
        folder = job.inputs[f"{whose}_answers"]
        drawn = read_sampler(folder).items()
        as_drawn = all(rendering.items() <= drawn for rendering in renderings)
        chosen = read_chosen(folder, row_ids=row_ids)
        answers += [(whose, row if as_drawn else row | {"response_ids": None}) for row in chosen]
    return answers


def read_sampler(folder: Path) -> dict[str, str]:
    """Return the digests of the policy that drew a folder's answers; nothing where it does not say."""
    manifest = folder / "manifest.json"
    return (json.loads(manifest.read_text()).get("policy") if manifest.is_file() else None) or {}


def read_chosen(folder: Path, *, row_ids: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the named rows of a folder of answers."""
    found = pq.read_table(find_rows_file(folder), columns=COLUMNS, filters=[("row_id", "in", row_ids)])
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows


def score_answers(
    job: Job, who: str, answers: list[tuple[str, dict[str, Any]]], *, config: TokenScoreConfig, device: torch.device
) -> list[ScoredAnswer | None]:
    """Return what one model says of each answer; None for one that it cannot be asked about."""
    model, tokenizer = load_policy(job.inputs[who], precision=config.precision, device=device)
    check_head(model)
    check_context(model, config.max_tokens)
    renderer, policy = Renderer(tokenizer, max_tokens=config.max_tokens), as_policy(model)
    scored: list[ScoredAnswer | None] = []
    for _, row in answers:
        job.check_stop()
        try:
            (sample,) = renderer.stored(row, [0])
        except UnusableRow:
            scored.append(None)
            continue
        with torch.inference_mode():
            logp_T = policy(trained_logps, collate([sample], device=device))
        ids_T = tuple(sample.ids_T[sample.start :].tolist())
        scored.append(ScoredAnswer(ids_T, tuple(cut_text(tokenizer, ids_T)), tuple(logp_T.tolist())))
    return scored


def cut_text(tokenizer: Any, ids_T: tuple[int, ...]) -> list[str]:
    """Return the text that each token adds, special tokens by their names; a character of several tokens is the last one's."""
    texts, done = [], ""
    for end in range(1, len(ids_T) + 1):
        whole = tokenizer.decode(ids_T[:end], clean_up_tokenization_spaces=False)
        if whole.endswith("�") and end < len(ids_T):
            texts.append("")
            continue
        texts.append(whole[len(done) :])
        done = whole
    return texts
