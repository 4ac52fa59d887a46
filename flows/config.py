"""The parameters of the flows, as the Prefect form shows them and `--set` reaches them. No torch here."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from evaluation.config import GatePolicy, NoiseConfig, SuiteConfig
from evaluation.gate.policy import check_names, check_proven
from evaluation.judges.config import AnyJudge, JudgeConfig, JudgeRuntime
from training.config import (
    Config,
    GenerateConfig,
    IngestConfig,
    ReferenceScoreConfig,
    RewardModelConfig,
    RewardScoreConfig,
    Runtime,
    show_as_choice,
)
from training.objectives.registry import AnyTrainConfig

REFERENCE_FORMS = "A folder, embedded:NAME, hub:ORG/NAME@COMMIT, mirror:ORG/NAME@COMMIT, champion:MODEL, or STEP/FINGERPRINT of the store."


class TrainedReward(Config):
    """A reward model trained on the train split before it scores anything."""

    model_config = ConfigDict(title="train one")

    kind: Literal["trained"] = Field("trained", title="Kind")
    base: str = Field("embedded:minilm-l6-v2", title="Base model", description=REFERENCE_FORMS)
    training: RewardModelConfig = Field(RewardModelConfig(), title="Training")
    scoring: RewardScoreConfig = Field(RewardScoreConfig(), title="Scoring")

    @model_validator(mode="after")
    def _is_asked_as_it_was_trained(self) -> "TrainedReward":
        if self.training.render != self.scoring.render:
            raise ValueError(
                f"reward: got training.render {self.training.render} and scoring.render {self.scoring.render}, expected one: "
                "a reward model means nothing on inputs it was not trained on; set both"
            )
        return self


class GivenReward(Config):
    """A reward model taken as it is: a sequence-classification model with one label."""

    model_config = ConfigDict(title="take one as it is")

    kind: Literal["given"] = Field("given", title="Kind")
    model: str = Field(title="Reward model", description=REFERENCE_FORMS)
    scoring: RewardScoreConfig = Field(RewardScoreConfig(), title="Scoring")


AnyReward = Annotated[TrainedReward | GivenReward, Field(discriminator="kind", json_schema_extra=show_as_choice)]


class HeldoutJudge(Config):
    """A judge of both models' held-out answers: the win rate stands on the report and decides nothing."""

    model_config = ConfigDict(title="a judge")

    judge: AnyJudge = Field(title="Judge", description="An endpoint, or a local chat model.")
    model: str = Field(
        "", title="Local judge", description="The model that judges, where it is no endpoint. " + REFERENCE_FORMS
    )
    runtime: JudgeRuntime = Field(
        JudgeRuntime(), title="Runtime", description="How judging is done; never part of a fingerprint."
    )


class AlignConfig(Config):
    """One alignment, from preference data to a verdict. Whatever is changed here, but Runtime, is computed anew."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_]{0,40}$",
        title="Recipe",
        description="Name of the MLflow experiment; lower case, digits, underscore.",
    )
    model_name: str = Field(
        "policy",
        pattern=r"^[a-z][a-z0-9_-]{0,40}$",
        title="Model name",
        description="The registered model whose champion may change.",
    )
    policy: str = Field(title="Policy", description="The model to align; it is the reference too. " + REFERENCE_FORMS)
    preferences: str = Field(
        title="Preferences",
        description="A file or folder, demo:preferences, hub: or mirror:datasets/ORG/NAME@COMMIT (with /PATH, a part of it), or batches:DIGEST.",
    )
    ingest: IngestConfig = Field(title="Ingestion")
    reward: AnyReward = Field(
        TrainedReward(),
        title="Reward model",
        description="What scores the responses: trained first, or taken as it is.",
    )
    reference: ReferenceScoreConfig = Field(ReferenceScoreConfig(), title="Reference log-probabilities")
    train: AnyTrainConfig = Field(
        title="Training", description="The objective with its numbers: VAR, or SFT or DPO as a baseline."
    )
    heldout: GenerateConfig = Field(
        GenerateConfig(),
        title="Held-out responses",
        description="Sampled from champion and challenger, scored by the reward.",
    )
    benchmarks: str = Field(
        "demo:benchmarks",
        title="Benchmark files",
        description="A folder of benchmark files in their upstream formats or of mirrored data sets, benchmarks:ORG/NAME@COMMIT,..., or demo:benchmarks.",
    )
    suite: SuiteConfig = Field(title="Suite")
    gate: GatePolicy = Field(title="Gate")
    champion: str = Field(
        "current",
        title="Champion",
        description="base: the policy as given. current: the promoted model, the base while there is none. Or STEP/FINGERPRINT.",
    )
    judge: HeldoutJudge | None = Field(
        None,
        title="Judge",
        description="Says which model's held-out answer is better, for the win rate on the report; empty: nobody is asked.",
    )
    noise: NoiseConfig = Field(
        NoiseConfig(),
        title="Noise floor",
        description="What the champion is measured under besides; nothing if left alone.",
    )
    approval: bool = Field(
        False,
        title="Approval",
        description="Before a promotion the run pauses on Prefect's page, with the report, until a person says yes or no.",
    )
    runtime: Runtime = Field(
        Runtime(), title="Runtime", description="How the work is done; never part of a fingerprint."
    )

    @model_validator(mode="after")
    def _policy_names_what_is_run(self) -> "AlignConfig":
        check_names(self.gate, self.suite)
        check_proven(self.suite)
        return self


class BenchmarkFlowConfig(Config):
    """Benchmarks of one model, without training anything."""

    name: str = Field(
        "benchmark", pattern=r"^[a-z][a-z0-9_]{0,40}$", title="Name", description="Name of the MLflow experiment."
    )
    model: str = Field(title="Model", description=REFERENCE_FORMS)
    benchmarks: str = Field(
        "demo:benchmarks",
        title="Benchmark files",
        description="A folder of benchmark files in their upstream formats or of mirrored data sets, benchmarks:ORG/NAME@COMMIT,..., or demo:benchmarks.",
    )
    suite: SuiteConfig = Field(title="Suite")
    noise: NoiseConfig = Field(
        NoiseConfig(),
        title="Noise floor",
        description="What the model is measured under besides; nothing if left alone.",
    )
    reward: str = Field(
        "",
        title="Reward model",
        description="Scores the answers to prompt sets; may be empty for a suite without any. Of a suite of pair sets alone the model itself is tested. "
        + REFERENCE_FORMS,
    )
    scoring: RewardScoreConfig = Field(
        RewardScoreConfig(), title="Scoring", description="How the reward model is asked."
    )
    baseline: str = Field(
        "",
        title="Baseline",
        description="Also answers the prompt sets, for gain and win rate against it; may be empty. " + REFERENCE_FORMS,
    )
    runtime: Runtime = Field(
        Runtime(), title="Runtime", description="How the work is done; never part of a fingerprint."
    )

    @property
    def scorer(self) -> str:
        """The reward model: the named one, or the model that is tested as one; empty for benchmarks alone."""
        return self.reward or (self.model if self.suite.alignment.pair_sets else "")


class JudgeFlowConfig(Config):
    """A judge on pairs of answers."""

    name: str = Field(
        "judge", pattern=r"^[a-z][a-z0-9_]{0,40}$", title="Name", description="Name of the MLflow experiment."
    )
    judging: JudgeConfig = Field(title="Judging")
    judge_model: str = Field(
        "", title="Local judge", description="The model that judges, where it is no endpoint. " + REFERENCE_FORMS
    )
    model: str = Field(
        "",
        title="Model",
        description="Answers arena_hard's questions. Of heldout: its answers, generate/FINGERPRINT. Empty where the judge itself is tested.",
    )
    against: str = Field(
        "",
        title="Against",
        description="Of heldout: the other model's answers to the same prompts, generate/FINGERPRINT.",
    )
    files: str = Field(
        "",
        title="Benchmark files",
        description="The folder that holds arena-hard-v0.1, evalbiasbench or llmbar; none for heldout.",
    )
    answers: GenerateConfig = Field(
        GenerateConfig(temperature=0.0, max_new_tokens=2048, max_prompt_tokens=4096),
        title="Answers",
        description="How arena_hard's questions are answered; how many follows from the item limit.",
    )
    runtime: JudgeRuntime = Field(
        JudgeRuntime(), title="Runtime", description="How the work is done; never part of a fingerprint."
    )

    @model_validator(mode="after")
    def _names_what_is_read(self) -> "JudgeFlowConfig":
        benchmark = self.judging.benchmark
        needed = {
            "model": benchmark in {"arena_hard", "heldout"},
            "against": benchmark == "heldout",
            "files": benchmark != "heldout",
            "judge_model": self.judging.judge.kind == "local",
        }
        wrong = [
            f"{name} is {'missing' if wanted else 'of no use'}"
            for name, wanted in needed.items()
            if bool(getattr(self, name)) != wanted
        ]
        if wrong:
            raise ValueError(
                f"judge {benchmark}, {self.judging.judge.kind}: {', '.join(wrong)}; name what is judged, and no more"
            )
        return self


class CompareConfig(Config):
    """Models side by side, on everything on record that was measured of all of them alike."""

    name: str = Field(
        "compare", pattern=r"^[a-z][a-z0-9_]{0,40}$", title="Name", description="Name of the MLflow experiment."
    )
    models: tuple[str, ...] = Field(
        min_length=2,
        title="Models",
        description="At least two, the reference first: champion, a run's id, or a model. " + REFERENCE_FORMS,
    )
    model_name: str = Field(
        "",
        pattern=r"^([a-z][a-z0-9_-]{0,40})?$",
        title="Model name",
        description="The registered model whose champion is meant; may be empty while there is only one.",
    )
    tokens: bool = Field(
        True,
        title="Tokens",
        description="Load the models and colour the tokens of a few answers by what both say of them. Off: no model is loaded.",
    )


class RetrainConfig(Config):
    """When new preferences are enough to train on, and what to run then."""

    recipe: AlignConfig = Field(
        title="Recipe", description="What to run; its preferences are replaced by the pushed batches."
    )
    min_new_bytes: int = Field(
        1,
        ge=1,
        title="Least new data",
        description="Bytes of batches not yet trained on, below which nothing is run; at least 1.",
    )
