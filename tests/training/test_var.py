"""Exactness through the real engine: rows, template, stop tokens, stored columns, the loop; compared to the closed form.

Single-token toys hide errors of shift, reduction and stop token. Here a set of 40 responses of zero to three words, ended by a trained
stop token, is all that can be said, and KL(pi* || pi_theta) is driven to its minimum.
"""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.toy_convergence import descend, draw_space, mean_gap, weigh
from training import generate, reference, train
from training.config import ResponseRegime
from training.data.rows import read_rows
from training.job import Job

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<answer>{{ message['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
TOKENS = ["<s>", "<end>", "<pad>", "<user>", "<answer>", "who", "why", "a", "b", "c"]
RESPONSES = [" ".join(words) for length in range(4) for words in product("abc", repeat=length)]
LAMBDA = 0.8
TRAIN: dict[str, Any] = {
    "objective": "var",
    "lambda_": LAMBDA,
    "lambda_unit": "reward",
    "epochs": 800,
    "batch_prompts": 2,
    "max_tokens": 16,
    "learning_rate": 1e-2,
    "warmup_fraction": 0.02,
}


@pytest.fixture(scope="module")
def word_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a one-layer random Llama over ten tokens, a word each."""
    folder = tmp_path_factory.mktemp("word_policy")
    backend = Tokenizer(models.WordLevel({token: n for n, token in enumerate(TOKENS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens=["<user>", "<answer>"],
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def read_logps(folder: Path) -> dict[str, np.ndarray]:
    return {row["row_id"]: np.array(row["logp"]) for row in pq.read_table(folder / "scores.parquet").to_pylist()}


def score(make_job: Callable[..., Job], name: str, rows: Path, model: Path) -> Path:
    job = make_job("score_reference", name, config={"max_tokens": 16}, inputs={"rows": rows, "reference": model})
    reference.run(job)
    return job.output


def test_trained_policy_is_the_closed_form_optimum(
    tmp_path: Path, word_policy: Path, make_row: Any, write_rows: Any, write_rewards: Any, make_job: Callable[..., Job]
) -> None:
    assert len(RESPONSES) == 40
    made = [make_row(prompt, RESPONSES) for prompt in ("who", "why")]
    rows = write_rows(tmp_path / "rows", made)
    rng = np.random.default_rng(0)
    rewards = {row["row_id"]: rng.normal(size=40) for row in made}
    reward_folder = write_rewards(tmp_path / "rewards", {row_id: r.tolist() for row_id, r in rewards.items()})
    reference_folder = score(make_job, "reference", rows, word_policy)
    config = TRAIN | {"reference_factor": "sum"}
    inputs = {"rows": rows, "base": word_policy, "rewards": reward_folder, "reference": reference_folder}
    job = make_job("train", "train", config=config, inputs=inputs, checkpoint_every_steps=0)
    train.run(job)
    before, after = read_logps(reference_folder), read_logps(score(make_job, "after", rows, job.output))
    for row_id, reward in rewards.items():
        tilted = np.exp(before[row_id] + reward / LAMBDA)
        optimum = tilted / tilted.sum()
        policy = np.exp(after[row_id])
        outside = 1 - policy.sum()  # what the policy says that no response of the set is
        assert outside > -1e-5
        assert 0.5 * (np.abs(policy - optimum).sum() + abs(outside)) < 1e-3
        start = np.exp(before[row_id])
        assert 0.5 * (np.abs(start - optimum).sum() + 1 - start.sum()) > 0.5  # it was far away


def test_samples_of_the_reference_are_trained_to_the_optimum_of_these_samples(
    tmp_path: Path, word_policy: Path, make_row: Any, write_rows: Any, write_rewards: Any, make_job: Callable[..., Job]
) -> None:
    """Up to two tokens as the policy draws them, with a stop token or cut. Of the 91 answers that there are, drawn ones weigh exp(r / lambda)
    each time they were drawn, and the others nothing."""
    asked = write_rows(tmp_path / "asked", [make_row(prompt, ["a", "b"]) for prompt in ("who", "why")])
    drawing = {"split": "train", "samples_per_prompt": 64, "max_new_tokens": 2, "max_prompt_tokens": 8}
    sampled = make_job("generate", "sampled", config=drawing, inputs={"rows": asked, "policy": word_policy})
    generate.run(sampled)
    rows = [row for batch in read_rows(sampled.output) for row in batch.to_pylist()]
    answers = {row["row_id"]: [tuple(ids) for ids in row["response_ids"]] for row in rows}
    rng = np.random.default_rng(0)
    reward_of = {ids: rng.normal() for ids in sorted(set().union(*answers.values()))}
    rewards = {row_id: [reward_of[ids] for ids in drawn] for row_id, drawn in answers.items()}
    reward_folder = write_rewards(tmp_path / "rewards", rewards, rows)
    inputs = {"rows": sampled.output, "base": word_policy, "rewards": reward_folder}
    job = make_job(
        "train", "train", config=TRAIN | {"reference_factor": "none"}, inputs=inputs, checkpoint_every_steps=0
    )
    train.run(job)
    before = read_logps(score(make_job, "before", sampled.output, word_policy))
    after = read_logps(score(make_job, "after", sampled.output, job.output))
    for row_id, drawn in answers.items():
        different = sorted(set(drawn))
        assert 20 < len(different) < len(drawn)
        weights = [drawn.count(ids) * math.exp(reward_of[ids] / LAMBDA) for ids in different]
        optimum = np.array(weights) / sum(weights)
        gaps = []
        for logps in (before[row_id], after[row_id]):
            probability_of = dict(zip(drawn, np.exp(logps), strict=True))
            policy = np.array([probability_of[ids] for ids in different])
            outside = 1 - policy.sum()  # what was not drawn
            assert outside > -1e-5
            gaps.append(0.5 * (np.abs(policy - optimum).sum() + abs(outside)))
        assert gaps[1] < 1e-3 < 0.4 < gaps[0]


def test_all_responses_come_to_the_optimum_and_samples_do_as_their_number_grows() -> None:
    """What docs/figures/toy_convergence.svg shows: the sum over tokens goes to pi*, each response by its own length elsewhere; samples of the
    reference go to it where they are scored as such, and stay away where they are scored as a set."""
    rng = np.random.default_rng(0)
    length_R, logp_R, reward_R, best_R = draw_space(rng)
    weight_R = weigh(ResponseRegime.support, logp_R, reward_R, length_R)
    gaps = descend(weight_R, logp_R, best_R)
    assert gaps[0] > 0.4 and gaps[-1] < 1e-3 < 0.1 < descend(weight_R / length_R, logp_R, best_R)[-1]
    space = (logp_R, reward_R, length_R, best_R, rng)
    few, many, more = (mean_gap(ResponseRegime.from_reference, size, *space) for size in (256, 4096, 65_536))
    assert few > 3 * many > 9 * more and more < 0.01
    assert mean_gap(ResponseRegime.support, 65_536, *space) > 0.1
