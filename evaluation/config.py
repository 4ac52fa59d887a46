"""What an evaluation is, in closed configs without torch. Everything here is identity."""

import importlib.metadata
from typing import Literal

from pydantic import Field, field_validator, model_validator

from training.config import Config, Precision

WHOLE_NAMES = ("mmlu", "gsm8k", "humaneval", "bbh")  # a score under one of these is of all its items
HARNESS_VERSION = importlib.metadata.version("lm_eval")


class BenchmarkConfig(Config):
    """One lm-eval task as we run it. Two scores are comparable only when all of this agrees."""

    name: str = Field(
        title="Name",
        description="The benchmark's name in tables, such as mmlu; a part of a suite never carries the suite's name.",
    )
    tasks: tuple[str, ...] = Field(
        min_length=1, title="Tasks", description="lm-eval task names; several are pooled by their number of items."
    )
    num_fewshot: int | None = Field(
        None, ge=0, title="Shots", description="Worked examples in the prompt, at least 0; empty keeps the task's own."
    )
    metric: str = Field(title="Metric", description="lm-eval metric that decides, such as acc, exact_match or pass@1.")
    filter: str = Field(
        "none",
        title="Filter",
        description="lm-eval filter of the deciding metric, such as strict-match; the others are logged.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        title="Item limit",
        description="Items per task, at least 1; empty for all. A limited score is never taken for a full one.",
    )
    max_gen_toks: int | None = Field(
        None, ge=1, title="Answer cap", description="Longest answer in tokens, at least 1; empty keeps the task's own."
    )
    max_length: int = Field(
        2048, ge=64, title="Context", description="Longest prompt and answer in tokens, at least 64."
    )
    chat_template: bool = Field(False, title="Chat template", description="Wrap prompts in the model's chat template.")
    system_prompt: str | None = Field(None, title="System prompt", description="Only with the chat template.")
    precision: Precision = Precision.float32
    seed: int = Field(1234, ge=0, title="Few-shot seed", description="Draws the worked examples, at least 0.")
    sandbox_seconds: float = Field(
        5.0, gt=0, title="Sandbox limit", description="Wall seconds for each model-written program, above 0."
    )
    harness: str = Field(
        HARNESS_VERSION,
        title="lm-eval",
        description="Version of lm-eval, the one that is installed; leave it as it is.",
    )

    @model_validator(mode="after")
    def _named_as_a_part(self) -> "BenchmarkConfig":
        if self.limit is not None and self.name in WHOLE_NAMES:
            raise ValueError(
                f"benchmark {self.name}: has the item limit {self.limit}, so it is no {self.name}; name it {self.name}_part"
            )
        return self

    @field_validator("harness")
    @classmethod
    def _installed(cls, value: str) -> str:
        if value != HARNESS_VERSION:
            raise ValueError(
                f"harness: got {value}, installed is lm-eval {HARNESS_VERSION}; numbers of one version are never taken for "
                "another's; leave the field out to evaluate with the installed one, the champion first"
            )
        return value


class SuiteConfig(Config):
    """Benchmarks that are run and judged together."""

    benchmarks: tuple[BenchmarkConfig, ...] = Field(title="Benchmarks", description="Each with its own settings.")


class GatePolicy(Config):
    """What a challenger must show. PROMOTE: every guard non-inferior and the target superior. REJECT: a guard shown worse
    than its margin. HOLD: anything else."""

    margins: dict[str, float] = Field(
        title="Margins",
        description='JSON: for each guarded benchmark the largest loss that is still acceptable, in score from 0 to 1, such as {"mmlu": 0.01}.',
    )
    target: Literal["heldout_reward"] = Field(
        "heldout_reward", title="Target", description="What must be better with confidence."
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, title="Alpha", description="One-sided error rate of each test, between 0 and 0.5."
    )
    min_target_gain: float = Field(
        0.0, ge=0, title="Smallest gain", description="The target's gain must exceed this with confidence; at least 0."
    )
