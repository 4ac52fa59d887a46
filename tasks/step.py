"""Steps: a function from (config, input artifacts) to one artifact, planned before anything runs.

Calling a step makes an inert `Planned`: nothing is read, nothing runs, yet its fingerprint is known, because a fingerprint
needs only the config, the step's version and the fingerprints of the inputs. `tasks.execute` runs a plan.
"""

import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from infra.fingerprint import fingerprint
from infra.records import Record
from training.config import Config, Runtime


@dataclass(frozen=True)
class Source:
    """A file or folder from outside, entered by the digest of its content. Where it lies is no identity."""

    name: str
    path: Path
    digest: str
    content: str = ""  # digest of the bytes where `digest` is a fingerprint: of an artifact of the store

    @property
    def fingerprint(self) -> str:
        return self.digest


class Attempt(Protocol):
    """What a step's function works with: local folders, and the supervised child."""

    inputs: Mapping[str, Path]
    output: Path

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """What the inputs are: fingerprint of a step's artifact, or digest of a source, by name."""

    def run_child(self, package: str, job: str) -> dict[str, Any]:
        """Run `python -m <package>` on a job with this step's config, inputs and output; return its summary."""

    def check_weights(self, name: str, read: str) -> None:
        """Raise InputChanged unless the weights that the child read, by its digest of them, are those of the input `name`."""


Metrics = dict[str, float]
Work = Callable[[Any, Attempt], Metrics]


@dataclass(frozen=True)
class Step:
    """A kind of step. `version` is part of every fingerprint: raise it when the same config means another result."""

    name: str
    version: int
    work: Work
    description: str

    def __call__(
        self, config: Config, inputs: "Mapping[str, Given]", *, runtime: Runtime, label: str = ""
    ) -> "Planned":
        """Plan this step. `label` tells two of a kind apart on the screen and is no identity, nor is `runtime`."""
        return Planned(self, label, config, runtime, inputs)


def step(*, version: int) -> Callable[[Work], Step]:
    """Make a function `(config, attempt) -> metrics` a step of its name."""

    def declare(work: Work) -> Step:
        return Step(work.__name__, version, work, inspect.getdoc(work) or "")

    return declare


@dataclass(frozen=True)
class Planned:
    """One step of a plan, not run yet."""

    step: Step
    label: str
    config: Config
    runtime: Runtime
    inputs: "Mapping[str, Given]" = field(hash=False)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The payload that is hashed."""
        return {
            "step": self.step.name,
            "version": self.step.version,
            "config": self.config.model_dump(mode="json"),
            "inputs": {name: given.fingerprint for name, given in self.inputs.items()},
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @property
    def title(self) -> str:
        return f"{self.step.name} · {self.label}" if self.label else self.step.name

    @property
    def key(self) -> str:
        """The title in the characters that MLflow allows in names."""
        return self.title.replace(" · ", "/").replace(" ", "_")


Given = Planned | Source
"""What a step takes: another step's artifact, or something from outside."""


@dataclass(frozen=True)
class ArtifactRef:
    """A finished step's artifact: what tasks hand on, never rows or weights. A large one may still be on its way up."""

    step: str
    fingerprint: str
    cached: bool
    seconds: float
    commit: Future[Record]

    @property
    def record(self) -> Record:
        """The record, waited for while the files are on their way; raises what the commit failed with."""
        return self.commit.result()

    @property
    def name(self) -> str:
        """`step/fingerprint`, as the command line takes it."""
        return f"{self.step}/{self.fingerprint}"


def found(record: Record, *, seconds: float) -> ArtifactRef:
    """Return the artifact of a record that was there already, `seconds` after it was looked for."""
    commit: Future[Record] = Future()
    commit.set_result(record)
    return ArtifactRef(record.step, record.fingerprint, True, seconds, commit)
