"""What a folder of rows or scores says of itself, and whether training may believe its numbers to be of this model.

`manifest.json` lies beside the rows and the reference scores. A summary is to be looked at; a manifest is what a later step must know.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from training.config import ResponseRegime
from training.model import ModelDigests

EXACT = {"temperature": 1.0, "top_p": 1.0, "top_k": 0.0}  # the settings at which samples are those of the policy itself


@dataclass(frozen=True)
class RowsManifest:
    """How the responses of a rows folder came to be."""

    regime: ResponseRegime
    sampling: dict[str, float]  # temperature, top_p, top_k; what nobody stated is absent
    policy: ModelDigests | None  # what sampled them, where that was done here


def read_rows_manifest(rows: Path) -> RowsManifest:
    """Return the manifest of a rows folder; ValueError where it does not say how the responses were made."""
    path = rows / "manifest.json"
    if not path.is_file():
        raise ValueError(f"rows folder {rows}: no manifest.json; expected one with `regime`; ingest the rows again")
    found = json.loads(path.read_text())
    regime = found.get("regime")
    if regime not in list(ResponseRegime):
        raise ValueError(
            f"{path}: regime is {regime!r}, expected one of {[r.value for r in ResponseRegime]}; ingest the rows again"
        )
    sampling = {name: float(found[name]) for name in EXACT if found.get(name) is not None}
    policy = found.get("policy")
    return RowsManifest(ResponseRegime(regime), sampling, ModelDigests(**policy) if policy else None)


def check_samples(rows: Path, manifest: RowsManifest, base: ModelDigests) -> None:
    """Raise ValueError unless responses said to be samples of the reference are samples of this base, undistorted.

    exp(r / lambda) / Z is their importance weight at temperature 1 without top-k and top-p alone.
    """
    if manifest.regime != ResponseRegime.from_reference:
        return
    remedy = "sample again at temperature 1, top_p 1, top_k 0, or ingest them as from_behaviour with their logq"
    missing = [name for name in EXACT if name not in manifest.sampling]
    if missing:
        raise ValueError(
            f"rows folder {rows}: responses from_reference, and the manifest does not state {', '.join(missing)}; "
            "ingest the rows again and state how they were sampled"
        )
    wrong = [f"{name} {manifest.sampling[name]:g}" for name, value in EXACT.items() if manifest.sampling[name] != value]
    if wrong:
        raise ValueError(
            f"rows folder {rows}: responses from_reference were sampled with {', '.join(wrong)}, so they are of another "
            f"distribution than the reference; {remedy}"
        )
    if manifest.policy is not None:
        check_same_model(manifest.policy, base, what=f"rows folder {rows}: the samples", remedy=remedy)


def check_reference(scores: Path, base: ModelDigests) -> None:
    """Raise ValueError unless stored reference log-probabilities are of the base's own weights and chat template."""
    path = scores / "manifest.json"
    if not path.is_file():
        raise ValueError(f"reference folder {scores}: no manifest.json; expected one; score the rows again")
    scored = ModelDigests(**json.loads(path.read_text())["model"])
    check_same_model(
        scored, base, what=f"reference folder {scores}: logp_ref", remedy="score the rows with this base as reference"
    )


def check_same_model(got: ModelDigests, base: ModelDigests, *, what: str, remedy: str) -> None:
    """Raise ValueError naming whether weights or chat template differ."""
    for name, theirs, ours in (
        ("weights", got.weights_sha256, base.weights_sha256),
        ("chat template", got.template_sha256, base.template_sha256),
    ):
        if theirs != ours:
            raise ValueError(
                f"{what} of a model with other {name} (sha256 {theirs[:12]}, the base has {ours[:12]}); {remedy}"
            )
