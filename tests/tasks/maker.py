"""Records of artifacts, committed to a real store without running anything, so that each part can be chosen or forged."""

import json
import uuid
from pathlib import Path
from typing import Any

from evaluation.config import GatePolicy
from evaluation.gate.decide import Evidence, decide
from evaluation.gate.verdict import Verdict
from infra import records
from infra.fingerprint import fingerprint
from infra.records import Given, Record
from infra.store import Store

BASE = Given(name="base", digest="ba5e" * 16)

SCORE = {
    "benchmark": "mmlu_part", "task": "mmlu_part", "metric": "acc", "filter": "none", "value": 0.75, "stderr": 0.25, "n": 4,
    "task_version": 1, "num_fewshot": 0, "decides": True, "harness_version": "0.4.13",
}  # fmt: skip
ITEMS = [
    {"task": "t", "doc_id": n, "correct": float(n > 0), "prompt": "?", "answer": "A", "target": "A"} for n in range(4)
]
RESULT = {
    "scores.json": json.dumps([SCORE]),
    "samples.jsonl": "\n".join(map(json.dumps, ITEMS)),
    "profile.json": "{}",
}


class Maker:
    """Commits records of artifacts with files of a few bytes."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder

    def make(self, step: str, inputs: dict[str, Record | Given], files: dict[str, str | bytes], **more: Any) -> Record:
        attempt = uuid.uuid4().hex
        output = self.folder / attempt
        output.mkdir()
        for name, text in files.items():
            (output / name).write_bytes(text.encode() if isinstance(text, str) else text)
        fingerprints = {n: g.digest if isinstance(g, Given) else g.fingerprint for n, g in inputs.items()}
        identity = {"step": step, "version": 1, "config": more.pop("config", {}), "inputs": fingerprints}
        record = Record(
            step=step, version=1, fingerprint=fingerprint(identity), identity=identity, inputs=fingerprints,
            given=more.pop("given", {n: g if isinstance(g, Given) else given_of(g) for n, g in inputs.items()}), attempt=attempt,
            prefix=f"attempts/{attempt}", files=tuple(self.store.upload_folder(output, f"attempts/{attempt}")),
            provenance={}, cost={}, created=more.pop("created", "2026-01-01T00:00:00+00:00"), mlflow_run="", prefect_run="",
            summary=more.pop("summary", {}),
        )  # fmt: skip
        return records.commit(self.store, record)

    def model(self, seed: int, *, weights: str = "weights") -> Record:
        return self.make(
            "train", {"base": BASE}, {"config.json": "{}", "model.safetensors": weights}, config={"seed": seed}
        )

    def judge(
        self,
        model: Record,
        *,
        over: Record | Given = BASE,
        decision: str = "PROMOTE",
        answers: Record | None = None,
        **more: Any,
    ) -> Record:
        """Make what stands between a model and its verdict, and the verdict."""
        evaluated = self.make("evaluate", {"model": model}, RESULT, config={"name": "mmlu_part"})
        answers = answers or self.make("generate", {"policy": model}, {"responses.parquet": ""})
        rewards = self.make("score_rewards", {"rows": answers}, {"scores.parquet": ""})
        inputs = {
            "challenger": model,
            "champion": over,
            "challenger_eval_mmlu": evaluated,
            "challenger_rewards": rewards,
        }
        sealed = decide_as(decision)
        summary = {"verdict": decision, "reasons": ["because"], "seal": sealed.seal}
        files = {"verdict.json": sealed.model_dump_json(), **more.pop("files", {})}
        return self.make("gate", inputs, files, summary=summary | more.pop("summary", {}), **more)


def decide_as(decision: str) -> Verdict:
    """Return what the gate says of a plain gain in reward: PROMOTE, or HOLD where both are one model."""
    rows = [f"row{k}" for k in range(8)]
    gained = {row: 1.0 + k / 8 for k, row in enumerate(rows)}
    verdict = decide(
        GatePolicy(margins={}, max_length_growth=None),
        challenger=Evidence(rewards=gained),
        champion=Evidence(rewards=dict.fromkeys(rows, 0.0)),
        same_model=decision == "HOLD",
    )
    assert verdict.decision == decision
    return verdict


def given_of(record: Record) -> Given:
    return Given(name=f"{record.step}/{record.fingerprint}", digest=records.digest_files(record))
