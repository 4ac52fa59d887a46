"""What an evaluation is, in closed configs without torch. Everything here is identity."""

import importlib.metadata
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from training.config import Config, GenerateConfig, Precision

WHOLE = {  # a score under one of these names is of all its items: of one of these lm-eval tasks, without a limit
    "mmlu": ("mmlu",),
    "gsm8k": ("gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot", "gsm8k_cot_llama"),
    "humaneval": ("humaneval", "humaneval_instruct"),
    "bbh": ("bbh", "bbh_fewshot", "bbh_zeroshot", "bbh_cot_fewshot", "bbh_cot_zeroshot"),
}
PART = "_part"  # ends the name of what is limited
HARNESS_VERSION = importlib.metadata.version("lm_eval")


class Backend(StrEnum):
    """What computes a model's answers."""

    transformers = "transformers"  # in processes of ours
    vllm = "vllm"  # likewise, on GPUs
    openai = "openai"  # a server with OpenAI's completions


class Endpoint(Config):
    """A served model. What is behind a name cannot be proven, so nothing is promoted on its scores."""

    url: str = Field(
        pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$",
        title="URL",
        description="Base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; its key is VARFLOW_ENDPOINT_KEY.",
    )
    model: str = Field(min_length=1, title="Model", description="The name under which it is served.")
    revision: str = Field(
        "",
        title="Revision",
        description="Your name for what is served now. Scores on record are taken for those of the same name: change it when the served weights change.",
    )


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
    backend: Backend = Field(
        Backend.transformers,
        title="Backend",
        description="What computes the answers: transformers and vllm in processes of varflow, openai behind an endpoint.",
    )
    endpoint: Endpoint | None = Field(
        None, title="Endpoint", description="Of the backend openai alone, which needs one."
    )
    sandbox_seconds: float = Field(
        5.0, gt=0, title="Sandbox limit", description="Wall seconds for each model-written program, above 0."
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        title="Batch size",
        description="Prompts that go through the model together, at least 1; empty: as many as the runtime's token budget allows. Not empty, it is part of what a score means.",
    )
    harness: str = Field(
        HARNESS_VERSION,
        title="lm-eval",
        description="Version of lm-eval, the one that is installed; leave it as it is.",
    )

    @model_validator(mode="after")
    def _named_as_a_part(self) -> "BenchmarkConfig":
        wrong = None
        if self.limit is not None and not self.name.endswith(PART):
            wrong = f"the item limit {self.limit}"
        elif self.name in WHOLE and (len(self.tasks) > 1 or self.tasks[0] not in WHOLE[self.name]):
            wrong = f"the tasks {', '.join(self.tasks)} and not one of {', '.join(WHOLE[self.name])}"
        if wrong:
            raise ValueError(f"benchmark {self.name}: has {wrong}, so it is no {self.name}; name it {self.name}{PART}")
        return self

    @model_validator(mode="after")
    def _endpoint_of_its_backend(self) -> "BenchmarkConfig":
        if (self.backend == Backend.openai) != (self.endpoint is not None):
            raise ValueError(
                f"benchmark {self.name}: got the backend {self.backend.value} with {'an' if self.endpoint else 'no'} endpoint; expected an "
                "endpoint for openai and none for the others; set both, or neither"
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


class VariedConfig(BenchmarkConfig):
    """A benchmark run again for the noise floor. Where processes are what is varied, their number is identity."""

    workers: int | None = Field(
        None, ge=1, title="Workers", description="In place of the runtime's, at least 1; empty keeps the runtime's."
    )

    @property
    def benchmark(self) -> BenchmarkConfig:
        """What was asked, without how."""
        return BenchmarkConfig.model_validate(self.model_dump(exclude={"workers"}))


class EvalSetConfig(Config):
    """A set that a reward model scores."""

    name: str
    limit: int | None = Field(None, ge=1)

    @property
    def title(self) -> str:
        """The name that its scores have."""
        return self.name + (PART if self.limit else "")


class PromptSetConfig(EvalSetConfig):
    """Prompts that policies answer and a reward model scores, or a judge."""

    name: Literal["hha_helpful", "hha_harmless", "offsetbias", "arena_hard"] = Field(
        title="Prompt set",
        description="hha_helpful and hha_harmless: HH-RLHF's helpful-base and harmless-base test splits. offsetbias: the instructions of OffsetBias. arena_hard: Arena-Hard's questions.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        title="Prompt limit",
        description="Take only the first prompts, by row id; at least 1, empty for all. A limited set is named as a part.",
    )


class PairSetConfig(EvalSetConfig):
    """Pairs of answers, the better one known, that test a reward model."""

    name: Literal["evalbiasbench", "llmbar"] = Field(
        title="Pair set", description="evalbiasbench: six biases of judges. llmbar: five subsets."
    )
    limit: int | None = Field(
        None,
        ge=1,
        title="Pair limit",
        description="Take only the first pairs of each bias or subset; at least 1, empty for all. A limited set is named as a part.",
    )


class AlignmentConfig(Config):
    """What a reward model says of policies, and what is known of the reward model. Empty: nothing is run."""

    prompt_sets: tuple[PromptSetConfig, ...] = Field(
        (), title="Prompt sets", description="Answered by both models; rewards, gain and win rate are reported."
    )
    answers: GenerateConfig = Field(
        GenerateConfig(temperature=0.0, max_new_tokens=256),
        title="Answers",
        description="How the prompt sets are answered; split heldout, and no limit here, since each set has its own.",
    )
    pair_sets: tuple[PairSetConfig, ...] = Field(
        (), title="Pair sets", description="On which the reward model itself is tested."
    )

    @model_validator(mode="after")
    def _check(self) -> "AlignmentConfig":
        if self.answers.split != "heldout" or self.answers.limit is not None:
            raise ValueError(
                f"answers: got split {self.answers.split} and limit {self.answers.limit}, expected heldout and none; "
                "limit the prompt sets instead"
            )
        sets: tuple[EvalSetConfig, ...] = (*self.prompt_sets, *self.pair_sets)
        titles = [each.title for each in sets]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise ValueError(f"alignment: {', '.join(twice)} is there twice; name each set once")
        return self


class SuiteConfig(Config):
    """Benchmarks that are run and judged together, and what a reward model says beside them."""

    benchmarks: tuple[BenchmarkConfig, ...] = Field(title="Benchmarks", description="Each with its own settings.")
    alignment: AlignmentConfig = Field(
        AlignmentConfig(), title="Alignment", description="Evaluations by reward model, and tests of it."
    )

    @property
    def is_empty(self) -> bool:
        """Whether nothing would be run."""
        return not (self.benchmarks or self.alignment.prompt_sets or self.alignment.pair_sets)

    @model_validator(mode="after")
    def _named_once(self) -> "SuiteConfig":
        names = [benchmark.name for benchmark in self.benchmarks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"suite: {', '.join(twice)} is there twice, and one would stand in for the other; name each benchmark once"
            )
        return self


class NoiseConfig(Config):
    """What is varied to see how far a score moves when no model does. A greedy rerun that varies nothing moves by 0."""

    seeds: int = Field(
        0,
        ge=0,
        le=10,
        title="Few-shot seeds",
        description="How many more few-shot seeds, from 0 to 10; only where worked examples are drawn.",
    )
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), title="Batch sizes", description="Other batch sizes, each at least 1, such as 1: every prompt alone."
    )
    workers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), title="Workers", description="Other numbers of runtime.workers, each at least 1, such as 2."
    )


HELDOUT_REWARD = "heldout_reward"  # the one target and floor that is no benchmark


class GatePolicy(Config):
    """What a challenger must show. PROMOTE: every guard non-inferior, the target superior, floors and bounds shown to hold.
    REJECT: a guard shown worse than its margin, or a level shown below its floor. HOLD: anything else."""

    margins: dict[str, float] = Field(
        title="Margins",
        description='JSON: for each guarded benchmark the largest loss that is still acceptable, in score above 0 and below 1, such as {"mmlu": 0.01}.',
    )
    targets: dict[str, float] = Field(
        {HELDOUT_REWARD: 0.0},
        title="Targets",
        description="JSON: what must be better with confidence, heldout_reward or a benchmark, and the gain that it must exceed, at least 0. Of several, one is enough, with Holm's adjustment.",
    )
    floors: dict[str, float] = Field(
        {},
        title="Floors",
        description='JSON: the lowest level of the challenger, whatever the champion has: a benchmark\'s score above 0 and below 1, such as {"humaneval": 0.2}, or any heldout_reward.',
    )
    max_length_growth: float | None = Field(
        0.5,
        ge=0,
        title="Free growth of answers",
        description="How much longer held-out answers may get on the mean before a reward gain counts only as far as it is there at equal length; 0.5 is half as long again. Empty: not looked at.",
    )
    max_cost_growth: float | None = Field(
        None,
        ge=0,
        title="Growth of cost",
        description="How much more an answer may cost on the mean, as parameters times characters written; 0.2 is a fifth more. Empty: not bounded.",
    )
    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        title="Alpha",
        description="One-sided error rate of each test, between 0 and 0.5; where looks are planned, of all looks of a year together.",
    )
    planned_looks: int | None = Field(
        None,
        ge=1,
        title="Planned looks",
        description="How often a year this gate will be asked, at least 1: each look has alpha divided by it, and none is left once planned looks have spent alpha. Empty: each look has all of alpha, and is flagged from the second on.",
    )
    planned_discordance: float = Field(
        0.1,
        gt=0,
        le=1,
        title="Planned discordance",
        description="Share of items, above 0 and at most 1, on which the models are expected to differ; what margins are checked with before anything is measured.",
    )
    audit_share: float = Field(
        0.0,
        ge=0,
        le=0.5,
        title="Audit split",
        description="Share of items and prompts, from 0 to 0.5, that never decides and is reported beside.",
    )

    @property
    def alpha_of_a_look(self) -> float:
        """The one-sided error rate of each test of one look."""
        return self.alpha / (self.planned_looks or 1)

    @field_validator("margins")
    @classmethod
    def _margins_are_losses(cls, margins: dict[str, float]) -> dict[str, float]:
        bad = {name: margin for name, margin in margins.items() if not 0 < margin < 1}
        if bad:
            raise ValueError(
                f"gate: a margin is a loss in score, above 0 and below 1; got {bad}; 0.02 means two points"
            )
        return margins

    @field_validator("targets")
    @classmethod
    def _targets_are_gains(cls, targets: dict[str, float]) -> dict[str, float]:
        if not targets:
            raise ValueError('gate: no target, so nothing could ever be promoted; name one, as {"heldout_reward": 0}')
        bad = {name: gain for name, gain in targets.items() if gain < 0 or (name != HELDOUT_REWARD and gain >= 1)}
        if bad:
            raise ValueError(
                f"gate: a target is the gain to exceed, at least 0 and, of a score, below 1; got {bad}; 0 asks for any gain"
            )
        return targets

    @field_validator("floors")
    @classmethod
    def _floors_are_scores(cls, floors: dict[str, float]) -> dict[str, float]:
        bad = {name: floor for name, floor in floors.items() if name != HELDOUT_REWARD and not 0 < floor < 1}
        if bad:
            raise ValueError(
                f"gate: a floor of a benchmark is a score above 0 and below 1; got {bad}; 0.2 means 20 points"
            )
        return floors


class Look(Config):
    """One time that the gate was asked."""

    alpha: float = Field(gt=0, lt=0.5, title="Alpha", description="One-sided error rate of each of its tests.")
    planned: bool = Field(title="Planned", description="Whether its policy planned looks.")


class GateConfig(Config):
    """A policy at one look."""

    policy: GatePolicy
    looks: tuple[Look, ...] = Field((), title="Looks", description="Those of this year before this one.")
