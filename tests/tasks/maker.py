"""Records of artifacts, committed to a real store without running anything, so that each part can be chosen or forged."""

import json
import uuid
from pathlib import Path
from typing import Any

from infra import records
from infra.fingerprint import fingerprint
from infra.records import Given, Record
from infra.store import Store

BASE = Given(name="base", digest="ba5e" * 16)


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
        evaluated = self.make("evaluate", {"model": model}, {"scores.json": "[]"})
        answers = answers or self.make("generate", {"policy": model}, {"responses.parquet": ""})
        rewards = self.make("score_rewards", {"rows": answers}, {"scores.parquet": ""})
        inputs = {
            "challenger": model,
            "champion": over,
            "challenger_eval_mmlu": evaluated,
            "challenger_rewards": rewards,
        }
        summary = {"verdict": decision, "reasons": ["because"]}
        return self.make("gate", inputs, {"verdict.json": json.dumps({"decision": decision})}, summary=summary, **more)


def given_of(record: Record) -> Given:
    return Given(name=f"{record.step}/{record.fingerprint}", digest=records.digest_files(record))
