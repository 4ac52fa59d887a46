"""What an interrupted scorer left: taken by the same job alone, never by one of another model, other rows or another config."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from training import cross, generate, reference
from training.job import Job
from training.reward import score

CASES: dict[str, tuple[Callable[[Job], None], dict[str, Any], str, str]] = {
    "score_rewards": (score.run, {"max_tokens": 96}, "scorer", "scores.parquet"),
    "score_reference": (reference.run, {"max_tokens": 96}, "reference", "scores.parquet"),
    "score_cross": (cross.run, {"batch_prompts": 4, "epochs": 1, "seed": 0, "max_tokens": 96, "reward": {"max_tokens": 96}}, "scorer", "scores.parquet"),
    "generate": (generate.run, {"split": "train", "max_new_tokens": 4, "max_prompt_tokens": 64}, "policy", "responses.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parts_of_another_model_are_not_taken(
    name: str, tiny_policy: Path, tiny_reward_model: Path, tmp_path: Path, make_job: Callable[..., Job], make_row: Any,
    write_rows: Any, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The same work folder with a base whose weights changed: what comes out is what it gives where nothing was left."""
    run, config, changed, file = CASES[name]
    made = [make_row(f"Question {n}?", [f"Yes {n}", "No, never"], split="train") for n in range(8)]
    rows = write_rows(tmp_path / "rows", made)
    folders = {"rows": rows, "scorer": tiny_reward_model}
    folders |= {role: tiny_policy for role in ("base", "reference", "policy")}
    other = shutil.copytree(folders[changed], tmp_path / "other")
    weights = {key: -tensor.flip(0) for key, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})

    def read(folder: str, *, model: Path) -> Any:
        job = make_job(name, folder, config=config, inputs=folders | {changed: model})
        run(job)
        return pq.read_table(job.output / file).to_pylist()

    first, fresh = read("left", model=folders[changed]), read("fresh", model=other)
    assert caplog.messages == []
    assert read("left", model=folders[changed]) == first != fresh
    assert caplog.messages == [], "the same job takes what is there"
    assert read("left", model=other) == fresh
    assert len(caplog.messages) == 1 and f"was made of another {changed}; begun anew" in caplog.messages[0]
    described = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 0.5, "layer_norm_eps": 0.5}
    (other / "config.json").write_text(json.dumps(described))
    assert read("left", model=other) == read("config", model=other) != fresh
    assert len(caplog.messages) == 2
    (tmp_path / "left" / "work" / "parts.json").write_text("")
    read("left", model=other)
    assert len(caplog.messages) == 3 and "is of nobody knows what; begun anew" in caplog.messages[2]
