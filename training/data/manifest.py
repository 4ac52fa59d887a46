"""What a folder of rows or scores says of itself, and whether training may believe its numbers to be of this model.

`manifest.json` lies beside the rows and the reference scores. A summary is to be looked at; a manifest is what a later step must know.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.config import ResponseRegime
from training.model import ModelDigests, digest_rendering

PARTS = {"weights_sha256": "weights", "template_sha256": "chat template", "tokenizer_sha256": "tokenizer"}
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
    sampler = read_digests(policy, path, remedy="sample again") if policy else None
    return RowsManifest(ResponseRegime(regime), sampling, sampler)


def read_digests(found: Mapping[str, str], path: Path, *, remedy: str) -> ModelDigests:
    """Return the digests that a manifest states; ValueError where one is missing, as from before it was taken."""
    if missing := [name for name in PARTS if name not in found]:
        raise ValueError(
            f"{path}: no {', '.join(missing)} of the model; got {sorted(found)}, expected {list(PARTS)}; {remedy}"
        )
    return ModelDigests(**found)


def check_tokens(rows: Path, manifest: RowsManifest, tokenizer: Any) -> None:
    """Raise ValueError where responses that were sampled here, and so are kept as tokens, are those of another tokenizer or template."""
    if manifest.policy is not None:
        check_same(
            asdict(manifest.policy),
            digest_rendering(tokenizer),
            what=f"rows folder {rows}: the responses are tokens",
            remedy="sample with this model, or ingest the rows, which keeps the text of the responses alone",
        )


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
        check_same(asdict(manifest.policy), asdict(base), what=f"rows folder {rows}: the samples", remedy=remedy)


def check_reference(scores: Path, base: ModelDigests) -> None:
    """Raise ValueError unless stored reference log-probabilities are of the base's own weights, chat template and tokenizer."""
    path = scores / "manifest.json"
    if not path.is_file():
        raise ValueError(f"reference folder {scores}: no manifest.json; expected one; score the rows again")
    remedy = "score the rows with this base as reference"
    scored = read_digests(json.loads(path.read_text())["model"], path, remedy=remedy)
    check_same(asdict(scored), asdict(base), what=f"reference folder {scores}: logp_ref", remedy=remedy)


def check_same(got: Mapping[str, str], expected: Mapping[str, str], *, what: str, remedy: str) -> None:
    """Raise ValueError naming which of the expected digests is another: of weights, chat template or tokenizer."""
    for name, ours in expected.items():
        if got[name] != ours:
            raise ValueError(
                f"{what} of a model with other {PARTS[name]} (sha256 {got[name][:12]}, here it is {ours[:12]}); {remedy}"
            )
