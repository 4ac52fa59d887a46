"""Profiles: which benchmarks, each with every setting that its number depends on. A part of a benchmark is named as one.

The benchmarks of a profile are separate calls: one number of shots for all would change MMLU and BBH.
"""

import math
from collections.abc import Mapping
from typing import Any

from evaluation.config import (
    PART,
    AlignmentConfig,
    Backend,
    BenchmarkConfig,
    Endpoint,
    PairSetConfig,
    PromptSetConfig,
    SuiteConfig,
)
from training.config import Precision

TYPICAL_PROMPT_TOKENS = 256  # the default budget of 2,048 tokens makes batches of 8
WHOLE = ("paper", "paper_chat", "standard")  # profiles of whole benchmarks, which have a mean


def paper() -> SuiteConfig:
    """The four benchmarks of the VAR paper (arXiv 2502.11026) in full, by the stock tasks of lm-eval.

    GSM8K is decided by `strict-match`, the answer after "####" that its four examples show; `flexible-extract`, the last
    number of the text, is logged beside it. BBH brings its own three worked examples and its own answer cap of 1,024 tokens.
    """
    return SuiteConfig(
        benchmarks=(
            BenchmarkConfig(name="mmlu", tasks=("mmlu",), num_fewshot=0, metric="acc", max_length=4096),
            BenchmarkConfig(
                name="gsm8k",
                tasks=("gsm8k",),
                num_fewshot=4,
                seed=1234,
                metric="exact_match",
                filter="strict-match",
                max_gen_toks=256,
                max_length=4096,
            ),
            BenchmarkConfig(
                name="humaneval",
                tasks=("humaneval",),
                num_fewshot=0,
                metric="pass@1",
                filter="create_test",
                max_length=4096,
            ),
            BenchmarkConfig(
                name="bbh",
                tasks=("bbh_cot_fewshot",),
                metric="exact_match",
                filter="get-answer",
                max_length=4096,
            ),
        )
    )


def paper_chat() -> SuiteConfig:
    """The profile `paper` for a chat model: prompts in its template, and HumanEval as an instruction."""

    def as_chat(benchmark: BenchmarkConfig) -> BenchmarkConfig:
        tasks = ("humaneval_instruct",) if benchmark.name == "humaneval" else benchmark.tasks
        return benchmark.model_copy(update={"chat_template": True, "tasks": tasks})

    return SuiteConfig(benchmarks=tuple(as_chat(benchmark) for benchmark in paper().benchmarks))


def standard() -> SuiteConfig:
    """What the community reports most: MMLU with 5 shots, GSM8K with 5 shots by its last number, HumanEval and BBH as in `paper`."""
    changes: dict[str, dict[str, Any]] = {
        "mmlu": {"num_fewshot": 5},
        "gsm8k": {"num_fewshot": 5, "filter": "flexible-extract"},
    }
    return SuiteConfig(
        benchmarks=tuple(
            benchmark.model_copy(update=changes.get(benchmark.name, {})) for benchmark in paper().benchmarks
        )
    )


def demo() -> SuiteConfig:
    """A little of each benchmark on the files that varflow ships: about a minute and a half for 135M parameters on two cores."""
    return SuiteConfig(
        benchmarks=(
            BenchmarkConfig(
                name="mmlu_part",
                tasks=("mmlu_elementary_mathematics", "mmlu_high_school_geography", "mmlu_miscellaneous"),
                num_fewshot=0,
                metric="acc",
            ),
            BenchmarkConfig(
                name="gsm8k_part",
                tasks=("gsm8k",),
                num_fewshot=4,
                metric="exact_match",
                filter="strict-match",
                limit=8,
                max_gen_toks=48,
            ),
            BenchmarkConfig(
                name="humaneval_part",
                tasks=("humaneval",),
                num_fewshot=0,
                metric="pass@1",
                filter="create_test",
                max_gen_toks=64,
            ),
            BenchmarkConfig(
                name="bbh_part",
                tasks=("bbh_cot_fewshot_boolean_expressions", "bbh_cot_fewshot_navigate"),
                metric="exact_match",
                filter="get-answer",
                limit=3,
                max_gen_toks=128,  # shorter ones end before the answer
            ),
        )
    )


def smoke() -> SuiteConfig:
    """One multiple-choice and one generated benchmark, two items each, for a random model of two layers. It measures nothing."""
    return SuiteConfig(
        benchmarks=(
            BenchmarkConfig(
                name="mmlu_part",
                tasks=("mmlu_elementary_mathematics",),
                num_fewshot=0,
                metric="acc",
                limit=2,
                max_length=1024,
            ),
            BenchmarkConfig(
                name="gsm8k_part",
                tasks=("gsm8k",),
                num_fewshot=1,
                metric="exact_match",
                filter="strict-match",
                limit=2,
                max_gen_toks=8,
                max_length=1024,
            ),
        )
    )


def hha() -> SuiteConfig:
    """Reward on HH-RLHF's helpful-base and harmless-base test prompts: the VAR paper's Base setting."""
    sets = (PromptSetConfig(name="hha_helpful"), PromptSetConfig(name="hha_harmless"))
    return SuiteConfig(benchmarks=(), alignment=AlignmentConfig(prompt_sets=sets))


def alignment() -> SuiteConfig:
    """`hha`, and reward on the instructions of OffsetBias."""
    sets = (*hha().alignment.prompt_sets, PromptSetConfig(name="offsetbias"))
    return SuiteConfig(benchmarks=(), alignment=AlignmentConfig(prompt_sets=sets))


def reward_bias() -> SuiteConfig:
    """EvalBiasBench and LLMBar, on a reward model: does it prefer the better answer where something speaks for the worse one?"""
    sets = (PairSetConfig(name="evalbiasbench"), PairSetConfig(name="llmbar"))
    return SuiteConfig(benchmarks=(), alignment=AlignmentConfig(pair_sets=sets))


SUITES = {suite.__name__: suite for suite in (demo, paper, paper_chat, standard, smoke, hha, alignment, reward_bias)}


def read_suite(name: str) -> SuiteConfig:
    """Return a profile by name. Raises ValueError naming those there are."""
    if name not in SUITES:
        raise ValueError(f"profile {name!r}: no such profile; expected one of {', '.join(SUITES)}")
    return SUITES[name]()


def limit_suite(suite: SuiteConfig, limit: int) -> SuiteConfig:
    """Return the first `limit` items of each task, prompts of each set and pairs of each group, all named as parts."""

    def cut(part: Any) -> dict[str, int]:
        return {"limit": min(limit, part.limit or limit)}

    alignment = suite.alignment
    return SuiteConfig(
        benchmarks=tuple(
            benchmark.model_copy(update=cut(benchmark) | {"name": benchmark.name.removesuffix(PART) + PART})
            for benchmark in suite.benchmarks
        ),
        alignment=alignment.model_copy(
            update={
                name: tuple(each.model_copy(update=cut(each)) for each in getattr(alignment, name))
                for name in ("prompt_sets", "pair_sets")
            }
        ),
    )


def place_suite(suite: SuiteConfig, *, backend: str | None, endpoint: str | None) -> SuiteConfig:
    """Return the suite with its benchmarks on a backend, of an endpoint `NAME@URL` where one is given; they are then those of no
    profile. What a reward model says of it stays.

    ValueError for a backend that does not exist, an endpoint of another form, and a suite without benchmarks on another backend.
    """
    if backend is None and endpoint is None:
        return suite
    if backend is not None and backend not in set(Backend):
        raise ValueError(f"backend {backend!r}: no such backend; expected one of {', '.join(Backend)}")
    name, separator, url = (endpoint or "").rpartition("@")
    if endpoint is not None and not separator:
        raise ValueError(
            f"endpoint {endpoint!r}: got no '@', expected NAME@URL, such as llama@http://127.0.0.1:8000/v1"
        )
    where = Backend(backend or Backend.openai)
    if not suite.benchmarks and where != Backend.transformers:
        raise ValueError(
            f"backend {where.value!r}: the suite has no benchmarks that it could answer, and prompt sets are answered by transformers "
            "alone; leave --backend and --endpoint out"
        )
    changes = {
        "backend": where,
        "endpoint": Endpoint(url=url, model=name) if endpoint is not None else None,
    }
    placed = [BenchmarkConfig.model_validate(benchmark.model_dump() | changes) for benchmark in suite.benchmarks]
    return suite.model_copy(update={"benchmarks": tuple(placed)})


def default_batch_size(microbatch_tokens: int) -> int:
    """Return how many prompts go through a model together where a benchmark does not say it."""
    return max(1, microbatch_tokens // TYPICAL_PROMPT_TOKENS)


def fix_batch_size(benchmark: BenchmarkConfig, *, microbatch_tokens: int) -> BenchmarkConfig:
    """Return the benchmark with the batch size of a runtime written down where scores depend on it: in half precision, in our processes.

    Stock lm-eval moves by up to 0.125 in log-probability between batch sizes there, so it has to be part of what a score means.
    """
    ours = benchmark.backend == Backend.transformers and benchmark.precision != Precision.float32
    if not ours or benchmark.batch_size is not None:
        return benchmark
    return benchmark.model_copy(update={"batch_size": default_batch_size(microbatch_tokens)})


def find_profile(suite: SuiteConfig) -> str | None:
    """Return the name of the profile whose benchmarks these are, all of them and with every setting; None for any part."""
    return next((name for name in WHOLE if SUITES[name]().benchmarks == suite.benchmarks), None)


def mean_score(suite: SuiteConfig, values: Mapping[str, float]) -> tuple[str, float] | None:
    """Return (profile, unweighted mean of its benchmarks' deciding scores), or None unless the suite is a whole profile."""
    name = find_profile(suite)
    if name is None:
        return None
    scores = [values[benchmark.name] for benchmark in suite.benchmarks]
    return name, math.fsum(scores) / len(scores)
