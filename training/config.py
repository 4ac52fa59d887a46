"""What a training-side job is, in closed configs without torch, so that anything can check one at once.

Every class here is identity: each field is hashed into the fingerprint of the step that takes it. The one exception is
`Runtime`, which says how the work is done and never what the result means, and is never hashed.
"""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of every configuration: frozen, closed, defaults only here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def show_as_choice(schema: dict[str, Any]) -> None:
    """Make the Prefect form draw a discriminated union as a choice: of `anyOf` it makes tabs, of `oneOf` a field of raw JSON.

    Both say the same here, where each member's tag excludes the others. The union's default is left out, since the form
    would put one member's values into whichever is chosen; each member shows its own.
    """
    schema["anyOf"] = schema.pop("oneOf")
    del schema["discriminator"]
    schema.pop("default", None)


class Precision(StrEnum):
    """Number format of matrix products; of the weights too where nothing is trained. A training keeps weights, gradients and optimiser in float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class ResponseRegime(StrEnum):
    """How the responses of a data set came to be; it decides the score s_k of VAR (docs/var.md)."""

    support = "support"
    from_reference = "from_reference"
    from_behaviour = "from_behaviour"


class SourceFormat(StrEnum):
    """Shape of a source row. `auto` looks at the keys of the first readable row."""

    auto = "auto"
    hh_rlhf = "hh_rlhf"  # {"chosen", "rejected"}: dialogues with "\n\nHuman:" and "\n\nAssistant:" turns
    pairs = "pairs"  # {"prompt", "chosen", "rejected"}: text, or lists of {"role", "content"} messages
    responses = "responses"  # {"prompt", "responses": [K >= 2 texts], "preferred": index}


class IngestConfig(Config):
    """Source rows -> one row schema, split by prompt, the unusable ones quarantined with reasons."""

    schema_version: Literal[3] = Field(3, title="Row schema", description="Version of the rows that are written.")
    format: SourceFormat = Field(
        SourceFormat.auto, title="Source format", description="Shape of a source row; auto looks at the first row."
    )
    responses: ResponseRegime = Field(
        title="Response regime",
        description="How the responses were made: support (a fixed set, human or several models), from_reference (sampled from the reference), from_behaviour (sampled from another policy, with `logq`, its log-probability of each response in nats).",
    )
    temperature: float | None = Field(
        None,
        ge=0,
        title="Temperature of the samples",
        description="At which sampled responses were drawn; must be stated for from_reference, empty for a fixed set.",
    )
    top_p: float | None = Field(
        None, gt=0, le=1, title="Top-p of the samples", description="Likewise; 1 where it was switched off."
    )
    top_k: int | None = Field(
        None,
        ge=0,
        title="Top-k of the samples",
        description="Likewise; 0 where it was switched off. Transformers' own default is 50.",
    )
    heldout_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        title="Held-out fraction",
        description="Share of prompts kept out of training, between 0 and 1 (exclusive). Chosen by a hash of the prompt, so equal prompts never straddle.",
    )
    limit: int | None = Field(
        None, ge=1, title="Row limit", description="Take only the first rows of the source; at least 1, empty for all."
    )
    max_invalid_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        title="Largest invalid fraction",
        description="Share of quarantined rows, from 0 to 1, above which ingestion refuses the source.",
    )
    min_response_chars: int = Field(
        1,
        ge=1,
        title="Shortest response",
        description="Of a fixed set: responses with fewer characters are quarantined; at least 1. Samples are kept whatever their length.",
    )
    max_row_chars: int = Field(
        20_000,
        ge=1,
        title="Longest row",
        description="Rows whose prompt and longest response exceed this many characters are quarantined; at least 1.",
    )

    @model_validator(mode="after")
    def _check(self) -> "IngestConfig":
        stated = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = [name for name, value in stated.items() if value is not None]
        if self.responses == ResponseRegime.support and given:
            raise ValueError(
                f"responses support: got {', '.join(given)}, but a fixed set was not sampled; leave them empty, or set "
                "responses to from_reference or from_behaviour"
            )
        if self.responses != ResponseRegime.support and self.min_response_chars > 1:
            raise ValueError(
                f"min_response_chars: got {self.min_response_chars} for responses {self.responses}, expected 1: what is left of samples "
                "without the short ones are samples of another policy; leave it out"
            )
        if self.responses == ResponseRegime.from_reference and len(given) < len(stated):
            missing = ", ".join(name for name in stated if name not in given)
            raise ValueError(
                f"responses from_reference: {missing} not stated; expected how the responses were sampled, since only "
                "temperature 1, top_p 1 and top_k 0 sample the reference itself"
            )
        return self


class RewardRender(StrEnum):
    """How prompt and response become the ids a reward model reads."""

    text_pair = "text_pair"  # tokenizer(prompt, response): encoders such as MiniLM
    chat_template = "chat_template"  # the model's own chat template: decoders


class RewardModelConfig(Config):
    """Bradley-Terry training of a sequence-classification reward model on the train split."""

    objective: Literal["bradley_terry"] = Field(
        "bradley_terry", title="Objective", description="Preferred responses score higher than the others."
    )
    render: RewardRender = Field(
        RewardRender.text_pair, title="Rendering", description="text_pair for encoders, chat_template for decoders."
    )
    learning_rate: float = Field(5e-5, gt=0, title="Learning rate", description="Peak AdamW learning rate, above 0.")
    weight_decay: float = Field(0.01, ge=0, title="Weight decay", description="AdamW weight decay, at least 0.")
    warmup_fraction: float = Field(
        0.1, ge=0, le=1, title="Warm-up", description="Share of steps with rising learning rate, from 0 to 1."
    )
    epochs: int = Field(2, ge=1, title="Epochs", description="Passes over the train split, at least 1.")
    batch_prompts: int = Field(16, ge=1, title="Global batch", description="Prompts per optimiser step, at least 1.")
    max_tokens: int = Field(
        256,
        ge=8,
        title="Longest sequence",
        description="Tokens of prompt and response together; the prompt is cut from the left, at least 8.",
    )
    max_grad_norm: float = Field(1.0, gt=0, title="Gradient clipping", description="Largest gradient norm, above 0.")
    precision: Precision = Precision.float32
    seed: int = Field(0, ge=0, lt=2**63, title="Seed", description="Order of the rows and the new head; at least 0.")
    min_accuracy: float = Field(
        0.0,
        ge=0,
        le=1,
        title="Accuracy floor",
        description="Held-out pairwise accuracy, from 0 to 1, below which the run stops.",
    )


class RewardScoreConfig(Config):
    """Reward of every response under a sequence-classification model."""

    render: RewardRender = Field(
        RewardRender.text_pair, title="Rendering", description="text_pair for encoders, chat_template for decoders."
    )
    max_tokens: int = Field(
        256,
        ge=8,
        title="Longest sequence",
        description="Tokens of prompt and response together; the prompt is cut from the left, at least 8.",
    )
    precision: Precision = Precision.float32


class ReferenceScoreConfig(Config):
    """Summed log-probability of every response's trained tokens under the reference."""

    max_tokens: int = Field(
        1024,
        ge=8,
        title="Longest sequence",
        description="Rows whose prompt and longest response exceed this many tokens are dropped and counted; at least 8.",
    )
    precision: Precision = Precision.float32


class TokenScoreConfig(Config):
    """Log-probabilities of the single tokens of a few answers under two models."""

    row_ids: tuple[str, ...] = Field(min_length=1, title="Rows", description="Whose first answers are looked at.")
    max_tokens: int = Field(
        ge=8,
        title="Longest sequence",
        description="Tokens of a prompt and its answer, at least 8; longer ones are left out.",
    )
    precision: Precision = Precision.float32


class CrossScoreConfig(Config):
    """Rewards and reference log-probabilities of a batch's responses under each of its prompts. It follows from a training's
    config: the batches are that training's."""

    batch_prompts: int = Field(ge=1, title="Global batch", description="Prompts per optimiser step, at least 1.")
    epochs: int = Field(ge=1, title="Epochs", description="Passes over the train split, at least 1.")
    max_tokens: int = Field(
        ge=8,
        title="Longest sequence",
        description="Tokens of any prompt of a batch with any response of it; at least 8.",
    )
    seed: int = Field(ge=0, title="Seed", description="Order of the rows; at least 0.")
    reward: RewardScoreConfig = Field(title="Reward scoring")
    precision: Precision = Precision.float32


class GenerateConfig(Config):
    """Responses sampled from a policy for the prompts of one split."""

    split: Literal["train", "heldout"] = Field(
        "heldout", title="Split", description="Whose prompts: those trained on, or those kept out."
    )
    limit: int | None = Field(
        None,
        ge=1,
        title="Prompt limit",
        description="Take only the first prompts of the split, by row id; at least 1, empty for all.",
    )
    samples_per_prompt: int = Field(
        1, ge=1, title="Samples per prompt", description="Responses drawn for each prompt, at least 1."
    )
    temperature: float = Field(
        1.0, ge=0, title="Temperature", description="0 is greedy; 1 with no top-k and top-p samples the policy itself."
    )
    top_p: float = Field(1.0, gt=0, le=1, title="Top-p", description="Above 0, up to 1; 1 switches it off.")
    top_k: int = Field(0, ge=0, title="Top-k", description="At least 0; 0 switches it off.")
    max_new_tokens: int = Field(
        64,
        ge=1,
        title="Answer cap",
        description="Longest response in tokens, at least 1; longer ones are marked truncated.",
    )
    max_prompt_tokens: int = Field(
        768, ge=8, title="Longest prompt", description="Prompts with more tokens are dropped and counted; at least 8."
    )
    precision: Precision = Precision.float32
    seed: int = Field(0, ge=0, lt=2**63, title="Seed", description="Noise of the sampling; at least 0.")


class Schedule(StrEnum):
    """Learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class StoredColumn(StrEnum):
    """A column of numbers for the stored responses, by the name of the input that brings it to training."""

    rewards = "rewards"
    reference = "reference"
    cross = "cross"


class LoraConfig(Config):
    """Low-rank matrices beside every linear layer but the output head, trained instead of the weights."""

    model_config = ConfigDict(title="Low-rank adapter")

    rank: int = Field(
        0, ge=0, title="Rank", description="Inner size of the matrices, such as 16; 0 trains the weights themselves."
    )
    alpha: int = Field(
        32, ge=1, title="Alpha", description="What is added is alpha / rank times their product; at least 1."
    )


class Device(StrEnum):
    """Where tensors live; auto takes an accelerator where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Layout(StrEnum):
    """How prompts and responses lie in a forward pass; the numbers are the same."""

    tree = "tree"
    rows = "rows"


class Runtime(Config):
    """How the work is done. Never part of a fingerprint."""

    device: Device = Field(Device.auto, title="Device", description="auto takes an accelerator where there is one.")
    microbatch_tokens: int = Field(
        2048,
        ge=1,
        title="Micro-batch",
        description="Token budget of one forward pass, padding included; at least 1. A GPU wants a step whole: 32,768, say; what has no room is halved.",
    )
    layout: Layout = Field(
        Layout.tree,
        title="Layout",
        description="tree: a policy reads each prompt once, with its responses behind it. rows: separate sequences, for a model whose attention cannot be shared.",
    )
    activation_checkpointing: bool = Field(
        False,
        title="Activation checkpointing",
        description="Keep only what enters each layer and compute the rest again in the backward pass: the same gradients in far less memory, for about a third more computing.",
    )
    compile: bool = Field(
        False,
        title="Compile",
        description="Train a policy's layers as code that torch.compile makes of them: faster steps after a first one that waits for the compiler. On a CPU it takes a C++ compiler.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=4096,
        title="Threads",
        description="CPU threads of a child process; at least 1, empty for all cores.",
    )
    heldout_every_steps: int = Field(
        10,
        ge=0,
        title="Held-out cadence",
        description="Optimiser steps between two looks at the loss of held-out rows; the last step always has one; 0 never looks.",
    )
    samples_every_steps: int = Field(
        50,
        ge=0,
        title="Sample cadence",
        description="Optimiser steps between two greedy answers to a few held-out prompts, shown as a table; one before the first step and one after the last always; 0 never.",
    )
    checkpoint_every_steps: int = Field(
        20,
        ge=0,
        title="Checkpoint cadence",
        description="Optimiser steps between checkpoints; 0 saves only when told to stop.",
    )
    stored_checkpoints: int = Field(
        0,
        ge=0,
        title="Checkpoints in the store",
        description="How many of the newest checkpoints are kept in the store while a training goes on, so that another machine can go on from there; 0 keeps them on this machine alone.",
    )
    ranks: int = Field(
        1,
        ge=1,
        title="Ranks",
        description="Processes of a machine, each with its own device, that train a model together, its weights sharded over them; at least 1. Jobs that train nothing take one.",
    )
    workers: int = Field(
        1,
        ge=1,
        title="Workers",
        description="Processes that answer a benchmark together, each with the whole model on its own device; CPU threads are divided among them. Of the backend vllm: the GPUs that hold the model. Of openai: requests under way at once. At least 1.",
    )
    nodes: int = Field(
        1,
        ge=1,
        title="Machines",
        description="Machines that train together, each with as many ranks; at least 1. Every one runs the same job with its own number.",
    )
    node_rank: int = Field(
        0,
        ge=0,
        title="Number of this machine",
        description="From 0, below the number of machines; 0 is the one that others meet at.",
    )
    rendezvous: str | None = Field(
        None,
        pattern=r"^[^\s:]+:[0-9]{1,5}$",
        title="Rendezvous",
        description="host:port of the machine with number 0, a free port that the others reach; for several machines alone.",
    )
    replicas: int = Field(
        1,
        ge=1,
        title="Replicas",
        description="Groups of ranks that hold a whole sharded model each, for several machines; a divisor of all ranks, at least 1.",
    )

    @property
    def world_size(self) -> int:
        """The ranks of all machines."""
        return self.nodes * self.ranks

    @model_validator(mode="after")
    def _check_nodes(self) -> "Runtime":
        if self.node_rank >= self.nodes:
            raise ValueError(
                f"node_rank: got {self.node_rank} of {self.nodes} machines, expected 0 to {self.nodes - 1}; number them from 0"
            )
        if (self.nodes > 1) != (self.rendezvous is not None):
            raise ValueError(
                f"rendezvous: got {self.rendezvous} for {self.nodes} machines; expected host:port where there are several, and "
                "nothing for one; set both nodes and rendezvous, or neither"
            )
        return self
