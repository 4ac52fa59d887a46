"""What a run is before its first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.config import Precision, Runtime
from training.data.examples import Example
from training.distributed import World
from training.job import Job
from training.logprobs import Policy
from training.model import DTYPES
from training.objectives.objective import Objective
from training.steps import Forward, Steps


@dataclass(frozen=True)
class Ready:
    """All that a training run starts with."""

    job: Job
    runtime: Runtime
    world: World
    precision: Precision
    policy: Policy
    tokenizer: Any
    examples: Sequence[Example]
    objective: Objective
    forward: Forward
    steps: Steps
    # what a run must have in common with the one that it goes on from; whole on the first rank
    identity: dict[str, Any]
    # trained with the dropout of its base, without which all checks but that of memory are made
    is_reward_model: bool = False

    @property
    def model(self) -> Any:
        """The language model of the policy, or the reward model."""
        return self.policy.model

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.world.device

    @property
    def layers_dtype(self) -> torch.dtype:
        """What layers compute in without autocast: sharded ones are gathered in the precision of the matrix products."""
        return torch.float32 if self.world.size == 1 else DTYPES[self.precision]
