"""The checks that need no model: weights, and the tokens of the first rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from training.data.examples import Example
from training.data.rows import find_rows_file
from training.objectives.objective import WeightedLikelihood
from training.preflight.findings import Failure, NotApplicable
from training.preflight.ready import Ready

ROWS_LOOKED_AT = 256
EXCERPT_CHARS = 120


def weights(ready: Ready) -> str:
    """Weights are finite and not negative; those of a weighted likelihood add up to the number of responses."""
    steps = ready.steps
    sums = isinstance(ready.objective, WeightedLikelihood)
    for step in range(steps.num_steps):
        weight_R = steps.weights(step)
        if not (np.isfinite(weight_R).all() and (weight_R >= 0).all()):
            raise Failure(
                f"step {step}: weights from {weight_R.min():.6g} to {weight_R.max():.6g}; expected finite ones, 0 or more; "
                "check rewards and lambda",
                steps.row_ids(step),
            )
        if sums and abs(weight_R.sum() - len(weight_R)) > 1e-6 * len(weight_R):
            raise Failure(
                f"step {step}: its weights add up to {weight_R.sum():.9g}; expected {len(weight_R)}, the number of its responses; "
                "the objective does not normalise over the global batch",
                steps.row_ids(step),
            )
    return f"{steps.num_steps} steps: finite, none negative" + (", each adding up to its responses" if sums else "")


def trained_tokens(ready: Ready) -> str:
    """No step is without a token that is trained."""
    steps = ready.steps
    for step in range(steps.num_steps):
        columns = steps.columns(step)
        if not columns.num_tokens_R[steps.weights(step) > 0].sum():
            raise Failure(
                f"step {step}: none of its {len(columns.num_tokens_R)} responses has a trained token and a weight above 0; "
                "expected at least one; drop these rows or raise batch_prompts",
                steps.row_ids(step),
            )
    return f"each of {steps.num_steps} steps has some"


def stop_tokens(ready: Ready) -> str:
    """The last trained token of a response that was not cut short is one that ends generation elsewhere too."""
    model, tokenizer = ready.model, ready.tokenizer
    own = model.generation_config.eos_token_id
    stop = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    examples = first_examples(ready)
    cut_short = {row["row_id"]: row["truncated"] for row in read_rows(ready, [e.row_id for e in examples])}
    looked_at, wrong = 0, {}
    for example in examples:
        flags = cut_short.get(example.row_id) or [False] * example.num_responses
        for place, sample in zip(example.places, example.samples, strict=True):
            if flags[place]:
                continue
            looked_at += 1
            if int(sample.ids_T[-1]) not in stop:
                wrong[example.row_id] = int(sample.ids_T[-1])
    if wrong:
        token = next(iter(wrong.values()))
        raise Failure(
            f"{len(wrong)} of {len(examples)} rows end with token {token} ({tokenizer.convert_ids_to_tokens(token)!r}); expected "
            f"one of {sorted(stop)}, at which the model's configuration stops: it would never learn to stop for others; set "
            "eos_token_id in generation_config.json or eos_token in tokenizer_config.json to the token the chat template ends with",
            list(wrong),
        )
    return f"{looked_at} responses that were not cut short end with one of {sorted(stop)}"


def bos(ready: Ready) -> str:
    """A conversation begins with as many BOS tokens as its template writes."""
    tokenizer = ready.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None:
        raise NotApplicable("the tokenizer has no BOS token")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    expected = 0
    while text.startswith(tokenizer.bos_token):
        text = text.removeprefix(tokenizer.bos_token)
        expected += 1
    examples = first_examples(ready)
    got = {e.row_id: count_leading(sample.ids_T, bos) for e in examples for sample in e.samples}
    wrong = [row_id for row_id, count in got.items() if count != expected]
    if wrong:
        raise Failure(
            f"{len(wrong)} of {len(examples)} rows begin with {got[wrong[0]]} BOS tokens ({tokenizer.bos_token!r}); expected "
            f"{expected}, as the chat template writes; mend the template",
            wrong,
        )
    plain = count_leading(np.asarray(tokenizer("a")["input_ids"]), bos)
    return f"{expected} at the start of each of {len(examples)} rows, as the template writes; plain text gets {plain}"


def first_examples(ready: Ready) -> list[Example]:
    """Return the first rows of the plan."""
    found: list[Example] = []
    for step in range(ready.steps.steps_per_epoch):
        found += ready.steps.rows(step)
        if len(found) >= ROWS_LOOKED_AT:
            break
    return found[:ROWS_LOOKED_AT]


def read_rows(ready: Ready, row_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return prompt and `truncated` of some rows."""
    path = find_rows_file(ready.job.inputs["rows"])
    columns = ["row_id", "prompt", "truncated"]
    rows: list[dict[str, Any]] = pq.read_table(
        path, columns=columns, filters=[("row_id", "in", list(row_ids))]
    ).to_pylist()
    return rows


def excerpt_rows(ready: Ready, row_ids: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows that show a failure, with the end of their prompts."""
    if not row_ids:
        return []
    texts = {row["row_id"]: row["prompt"][-1]["content"] for row in read_rows(ready, row_ids)}
    return [{"row_id": row_id, "excerpt": shorten(texts.get(row_id, ""))} for row_id in row_ids]


def count_leading(ids_T: np.ndarray, token: int) -> int:
    """Return how many times a token stands at the beginning."""
    return int((np.cumprod(ids_T == token)).sum())


def shorten(text: str) -> str:
    """Return the end of a text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT_CHARS else "…" + line[-EXCERPT_CHARS:]
