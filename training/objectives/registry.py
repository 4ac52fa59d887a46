"""The objectives that a policy is trained with. Adding one is a file beside this one and its config in the line below."""

from typing import Annotated

from pydantic import Field

from training.config import show_as_choice
from training.objectives.dpo import DpoConfig
from training.objectives.sft import SftConfig
from training.objectives.var import VarConfig

AnyTrainConfig = Annotated[
    VarConfig | SftConfig | DpoConfig, Field(discriminator="objective", json_schema_extra=show_as_choice)
]
