"""How answers are judged, in closed configs without torch. All but the runtime is identity."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from evaluation.suites import PART
from training.config import Config, Precision, Runtime, show_as_choice

Judging = Literal["arena_hard", "evalbiasbench", "llmbar", "heldout"]


class EndpointJudge(Config):
    """A model behind an OpenAI-compatible chat endpoint. Where it is and its key are settings, VARFLOW_JUDGE_URL and _API_KEY."""

    model_config = ConfigDict(title="an endpoint")

    kind: Literal["endpoint"] = Field("endpoint", title="Kind")
    model: str = Field(min_length=1, title="Name", description="The model's name, as the endpoint takes it.")
    revision: str = Field(
        min_length=1,
        title="Revision",
        description="What the name stands for: a date, a commit or a digest. Change it when the endpoint serves other weights.",
    )
    temperature: float = Field(0.0, ge=0, title="Temperature", description="0 asks for the likeliest answer.")


class LocalJudge(Config):
    """A chat model of this machine, greedy. Which one is an input, and enters by its content."""

    model_config = ConfigDict(title="a local model")

    kind: Literal["local"] = Field("local", title="Kind")
    precision: Precision = Precision.float32


AnyJudge = Annotated[EndpointJudge | LocalJudge, Field(discriminator="kind", json_schema_extra=show_as_choice)]


class JudgeConfig(Config):
    """Two answers to each of many prompts, and a judge that says which is better. Two scores compare only when all of this agrees."""

    benchmark: Judging = Field(
        title="Benchmark",
        description="arena_hard: a model against a baseline's answers. evalbiasbench, llmbar: the judge itself. heldout: two models' held-out answers.",
    )
    judge: AnyJudge = Field(title="Judge", description="An endpoint, or a local chat model.")
    prompt_version: Literal[1] = Field(
        1, title="Prompt", description="Of varflow's own prompt; arena_hard brings its own with its files."
    )
    order: Literal["both"] = Field("both", title="Order", description="Each pair is shown in both orders.")
    repeats: int = Field(
        1,
        ge=1,
        le=10,
        title="Repeats",
        description="How often each order is asked, from 1 to 10; only of a judge that draws.",
    )
    format_retries: int = Field(
        2,
        ge=0,
        le=5,
        title="Retries",
        description="How often a judge is asked again that gave no verdict, from 0 to 5.",
    )
    max_answer_tokens: int = Field(
        2048, ge=1, title="Answer cap", description="Longest answer of the judge in tokens, at least 1."
    )
    limit: int | None = Field(
        None,
        ge=1,
        title="Item limit",
        description="First items, of each group where there are groups; at least 1, empty for all. A part is named as one.",
    )
    baseline: str = Field(
        "gpt-4-0314",
        pattern=r"^[\w.-]+$",
        title="Baseline",
        description="Whose answers arena_hard's model is held against: a name among its files.",
    )

    prompts: str = Field(
        "heldout",
        pattern=r"^[a-z][a-z0-9_]*$",
        title="Prompts",
        description="What the prompts of heldout are called in tables: heldout, or the prompt set that was answered, such as hha_helpful, which a plan sees from the answers.",
    )

    @property
    def name(self) -> str:
        """The benchmark's name in tables; a part never carries the whole one's."""
        if self.benchmark == "heldout":
            return self.prompts
        return self.benchmark + (PART if self.limit is not None else "")

    @model_validator(mode="after")
    def _repeats_differ(self) -> "JudgeConfig":
        if self.repeats > 1 and (isinstance(self.judge, LocalJudge) or self.judge.temperature == 0):
            raise ValueError(
                f"repeats: got {self.repeats} of a judge that does not draw, so each says the same; expected 1, or an endpoint "
                "with a temperature above 0"
            )
        return self


class JudgeRuntime(Runtime):
    """How judging is done. Never part of a fingerprint."""

    concurrency: int = Field(
        8,
        ge=1,
        le=256,
        title="Concurrency",
        description="Calls to an endpoint that are under way at once, from 1 to 256.",
    )
    cap_parameter: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens",
        title="Parameter of the cap",
        description="Under which name an endpoint takes the answer cap: max_completion_tokens for OpenAI's reasoning models, which count their reasoning in it.",
    )
    patience_seconds: float = Field(
        120.0,
        gt=0,
        title="Patience",
        description="How long one call is tried again, in seconds above 0, while the endpoint is down, busy or failing.",
    )
    max_calls: int | None = Field(
        None, ge=1, title="Most calls", description="Calls this evaluation may take, at least 1; empty for no bound."
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        title="Most tokens",
        description="Tokens read and written that this evaluation may take, at least 1; calls under way may exceed it. Empty for no bound.",
    )
