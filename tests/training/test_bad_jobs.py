"""Bad input through the real job, as its parent sees it: exit status 2 and one message that says what, where, got, expected and next,
or a rule that is counted; never a model in its place."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.ranks import Ranks
from training.__main__ import JOBS
from training.config import Precision
from training.data.rows import RowsWriter
from training.distributed import World
from training.job import EXIT_USER_ERROR, Job, run_job
from training.sharding import load_sharded_policy

VAR = {"objective": "var", "reference_factor": "mean", "batch_prompts": 4, "max_tokens": 128, "learning_rate": 1e-3}
SFT = {"objective": "sft", "responses": "all", "batch_prompts": 4, "max_tokens": 128}


@pytest.fixture
def end(tmp_path: Path) -> Callable[..., tuple[int, str, Path]]:
    """Return a function that runs a job file to its end: (exit status, message of error.json, output); equal names share folders."""

    def run(name: str, job: str, config: dict[str, Any], inputs: dict[str, Path], **runtime: Any) -> Any:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        raw = {
            "job": job, "config": config, "runtime": {"device": "cpu", "threads": 1} | runtime,
            "inputs": {key: str(path) for key, path in inputs.items()},
            "output": str(folder / "output"), "work": str(folder / "work"),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(raw))
        (folder / "work" / "error.json").unlink(missing_ok=True)
        status = run_job(JOBS, Job.read(folder / "job.json"))
        error = folder / "work" / "error.json"
        return status, json.loads(error.read_text())["message"] if error.exists() else "", folder / "output"

    return run


@pytest.fixture
def inputs(
    tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any, write_rewards: Any, end: Any
) -> dict[str, Path]:
    """Eight prompts with their rewards and the reference column of the very policy."""
    made = [make_row(f"Question {i}?", [f"Answer {'very ' * (i % 4)}long", "No"]) for i in range(8)]
    rows = write_rows(tmp_path / "rows", made)
    rewards = write_rewards(tmp_path / "rewards", {r["row_id"]: [float(i), 0.5] for i, r in enumerate(made)})
    folders = {"rows": rows, "reference": tiny_policy}
    status, told, reference = end("reference", "score_reference", {"max_tokens": 128}, folders)
    assert status == 0, told
    return {"rows": rows, "base": tiny_policy, "rewards": rewards, "reference": reference}


@pytest.fixture
def refuse(inputs: dict[str, Path], end: Any) -> Callable[..., str]:
    """Return a function that holds a training to being refused, with nothing left that looks like a model; it gives the message."""

    def run(config: dict[str, Any] | None = None, **changed: Path | None) -> str:
        given = {name: path for name, path in (inputs | changed).items() if path is not None}
        settings = {name: value for name, value in (VAR | (config or {})).items() if value is not None}
        status, told, output = end("refused", "train", settings, given)
        assert status == EXIT_USER_ERROR, told
        assert not [path for path in output.iterdir() if path.suffix == ".safetensors" or path.name == "summary.json"]
        return str(told)

    return run


def rewrite(folder: Path, target: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
    """Copy a folder of scores with other rows in it."""
    shutil.copytree(folder, target)
    table = pq.read_table(folder / "scores.parquet")
    with RowsWriter(target / "scores.parquet", table.schema) as out:
        out.write(change(table.to_pylist()))
    return target


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_lambda_that_is_none(value: float, refuse: Callable[..., str]) -> None:
    told = refuse({"lambda_": value})
    assert "lambda_" in told and ("greater than 0" in told or "finite number" in told)


def test_a_group_of_one_under_per_prompt(
    refuse: Callable[..., str], inputs: dict[str, Path], end: Any, make_row: Any, write_rows: Any, write_rewards: Any
) -> None:
    """Among samples of the reference it is an error that names the rows; of a fixed set it is dropped, and counted."""
    base = inputs["rows"].parent
    made = [make_row(f"Question {i}?", ["Yes", "No"][: 1 if i == 3 else 2]) for i in range(6)]
    rewards = write_rewards(base / "some", {r["row_id"]: [1.0, 0.0][: len(r["responses"])] for r in made})
    config = {"reference_factor": "none"}
    sampled = write_rows(base / "sampled", made, regime="from_reference")
    told = refuse(config, rows=sampled, rewards=rewards, reference=None)
    assert f"rows have a single response (first: {made[3]['row_id']})" in told
    fixed = write_rows(base / "fixed", made)
    status, told, output = end(
        "kept", "train", VAR | config, {"rows": fixed, "rewards": rewards, "base": inputs["base"]}
    )
    assert status == 0, told
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows"], summary["dropped_too_few_responses"]) == (5, 1)


def test_rewards_that_are_missing_or_no_numbers(
    refuse: Callable[..., str], inputs: dict[str, Path], tmp_path: Path
) -> None:
    def change(name: str, edit: Callable[[dict[str, Any]], dict[str, Any]], *, rows: int) -> Path:
        return rewrite(
            inputs["rewards"], tmp_path / name, lambda all_rows: [edit(r) for r in all_rows[:rows]] + all_rows[rows:]
        )

    for value in (math.nan, math.inf, None):
        other = change(f"with-{value}", lambda row, value=value: {**row, "reward": [1.0, value]}, rows=2)
        assert "values are NaN or infinite" in (told := refuse(rewards=other)) and "first: " in told, value
    row_id = pq.read_table(inputs["rewards"] / "scores.parquet").column("row_id")[0].as_py()
    for value, count in ((None, "no"), ([1.0], "1")):
        other = change(f"with-{count}", lambda row, value=value: {**row, "reward": value}, rows=1)
        words = f"row {row_id}: reward has {count} values, the row 2 responses; expected one each; score the rows again"
        assert refuse(rewards=other) == words
    fewer = rewrite(inputs["rewards"], tmp_path / "fewer", lambda rows: rows[2:])
    told = refuse(rewards=fewer)
    assert "2 rows of the train split have no reward" in told and str(inputs["rows"]) in told and "score again" in told


@pytest.mark.parametrize("column", ["rewards", "reference"])
def test_a_row_with_two_scores(
    column: str, refuse: Callable[..., str], inputs: dict[str, Path], tmp_path: Path
) -> None:
    twice = rewrite(inputs[column], tmp_path / "twice", lambda rows: [*rows, rows[3]])
    told = refuse(**{column: twice})
    assert f"folder {twice}: 1 rows are there more than once (first: " in told and "score the rows again" in told


def test_samples_that_were_not_drawn_from_the_reference_as_it_is(
    refuse: Callable[..., str], inputs: dict[str, Path], tmp_path: Path
) -> None:
    for sampling, words in (
        ({"temperature": 0.7}, "were sampled with temperature 0.7"),
        ({"top_k": 50}, "were sampled with top_k 50"),
        ({"top_p": 0.9}, "were sampled with top_p 0.9"),
        ({"temperature": None}, "does not state temperature"),
    ):
        rows = shutil.copytree(inputs["rows"], tmp_path / "drawn", dirs_exist_ok=True)
        stated = {"regime": "from_reference", "temperature": 1.0, "top_p": 1.0, "top_k": 0} | sampling
        (rows / "manifest.json").write_text(json.dumps(stated))
        assert words in (told := refuse({"reference_factor": "none"}, rows=rows)) and str(rows) in told


def test_rows_that_may_be_longer_than_the_models_context(refuse: Callable[..., str]) -> None:
    assert (
        refuse({"max_tokens": 4096})
        == "max_tokens: got 4096, the model llama has a context of 1024 tokens; set max_tokens to 1024 or less"
    )


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings(
    refuse: Callable[..., str], inputs: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(inputs["base"], tmp_path / "short")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(100)
    model.save_pretrained(base)
    told = refuse(base=base)
    assert f"model {base}: the tokenizer's largest id is" in told and "the embedding has 100 rows" in told


def test_a_reference_that_was_scored_with_another_vocabulary(
    refuse: Callable[..., str], inputs: dict[str, Path], end: Any, tmp_path: Path
) -> None:
    """The same weights and template, as many tokens, other ids: of those the tokenizer's digest tells."""
    other = shutil.copytree(inputs["base"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["z"] = vocabulary["z"], vocabulary["e"]
    vocabulary["o"], vocabulary["q"] = vocabulary["q"], vocabulary["o"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    folders = {"rows": inputs["rows"], "reference": other}
    status, told, reference = end("scored", "score_reference", {"max_tokens": 128}, folders)
    assert status == 0, told
    told = refuse(reference=reference)
    assert f"reference folder {reference}: logp_ref of a model with other tokenizer (sha256 " in told
    assert "score the rows with this base as reference" in told


def test_a_base_whose_weights_are_no_numbers(
    refuse: Callable[..., str], inputs: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(inputs["base"], tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan  # <|im_start|>, in every prompt
    model.save_pretrained(base)
    told = refuse({"objective": "sft", "responses": "all", "reference_factor": None}, base=base)
    assert "nothing was trained" in told and "output_head: model type llama: got NaN or infinite logits" in told


def test_a_checkpoint_that_was_cut_short(inputs: dict[str, Path], end: Any) -> None:
    """It is named, and deleting it starts over: the same weights as without it."""
    runtime = {"checkpoint_every_steps": 1}
    status, told, output = end("whole", "train", SFT, inputs, **runtime)
    assert status == 0, told
    expected = (output / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "summary.json"):
        (output / name).unlink()
    (checkpoint,) = (output.parent / "work" / "checkpoints").glob("step-*")
    (shard,) = (checkpoint / "tensors").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1000])
    status, told, _ = end("whole", "train", SFT, inputs, **runtime)
    assert status == EXIT_USER_ERROR and not (output / "model.safetensors").exists()
    assert f"checkpoint {checkpoint}: damaged" in told and "delete it to start over" in told
    shutil.rmtree(checkpoint)
    assert end("whole", "train", SFT, inputs, **runtime)[0] == 0
    assert (output / "model.safetensors").read_bytes() == expected


def copy_base(inputs: dict[str, Path], name: str) -> Path:
    """Copy the policy's folder, to break it."""
    folder = inputs["rows"].parent / name
    shutil.copytree(inputs["base"], folder)
    return folder


def test_weights_that_the_last_steps_left_without_numbers(refuse: Callable[..., str], inputs: dict[str, Path]) -> None:
    """No loss has looked at them any more."""
    told = refuse({"learning_rate": 1e38, "batch_prompts": 8})
    assert "after the last step" in told and "tensors hold NaN or infinite numbers" in told and "learning rate" in told


def test_a_base_with_weights_that_its_configuration_has_no_place_for(
    refuse: Callable[..., str], inputs: dict[str, Path], ranks: Ranks
) -> None:
    base = copy_base(inputs, "fewer")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    words = "its files hold 9 tensors that its config.json has no place for (first: model.layers.1."
    assert words in refuse(base=base, reference=None)
    with pytest.raises(AssertionError, match=re.escape(words)):
        ranks.run(open_base, size=2, folder=base)


def test_a_trunk_alone_with_layers_that_its_configuration_has_no_place_for(
    refuse: Callable[..., str], inputs: dict[str, Path], ranks: Ranks, end: Any, tiny_reward_model: Path
) -> None:
    """Its files leave out the prefix of the trunk, as AutoModel and many encoders of a hub have it."""
    policy, encoder = copy_base(inputs, "trunk"), shutil.copytree(tiny_reward_model, inputs["rows"].parent / "encoder")
    for folder, prefix in ((policy, "model."), (encoder, "bert.")):
        state = load_file(folder / "model.safetensors")
        trunk = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        save_file(trunk, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        # An embedding that is the output head too, or there were nothing to take for that one.
        config |= {"num_hidden_layers": 1, "tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
    words = "its files hold 9 tensors that its config.json has no place for (first: layers.1."
    assert words in refuse(base=policy, reference=None)
    with pytest.raises(AssertionError, match=re.escape(words)):
        ranks.run(open_base, size=2, folder=policy)
    status, told, _ = end("encoder-run", "reward_model", {}, {"rows": inputs["rows"], "base": encoder})
    assert status == EXIT_USER_ERROR
    assert "its files hold 16 tensors that its config.json has no place for (first: encoder.layer.1." in told


@pytest.mark.parametrize("job", ["train", "reward_model"])
def test_a_quantised_base_is_not_trained(job: str, inputs: dict[str, Path], end: Any, tiny_reward_model: Path) -> None:
    """transformers unpacks it where the device cannot compute so, and would pack the export by the scales of the base."""
    base = shutil.copytree(inputs["base"] if job == "train" else tiny_reward_model, inputs["rows"].parent / "packed")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    settings = SFT if job == "train" else {}
    status, told, output = end("packed-run", job, settings, {"rows": inputs["rows"], "base": base})
    assert status == EXIT_USER_ERROR and not list(output.iterdir())
    assert "got weights quantised by fp8, expected plain ones" in told and "save_original_format=False" in told


def test_a_number_that_json_has_none_for_in_a_configuration(inputs: dict[str, Path], end: Any) -> None:
    """Older programs wrote `[0.0, Infinity]` for Mamba 2; scores and checkpoints say of which configuration they are."""
    base = copy_base(inputs, "endless")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, math.inf]}))
    given = {"rows": inputs["rows"], "base": base}
    status, told, _ = end(
        "endless-reference", "score_reference", {"max_tokens": 128}, {"rows": inputs["rows"], "reference": base}
    )
    assert status == 0, told
    status, told, output = end("endless-run", "train", SFT, given, checkpoint_every_steps=1)
    assert status == 0, told
    state = json.loads(next((output.parent / "work").glob("checkpoints/step-*/state.json")).read_text())
    assert state["identity"]["base_config"]["time_step_limit"] == [0.0, "Infinity"]


def test_a_reference_without_a_summary_is_held_to_the_run_s_own_precision(inputs: dict[str, Path], end: Any) -> None:
    reference = shutil.copytree(inputs["reference"], inputs["rows"].parent / "bare")
    (reference / "summary.json").unlink()
    status, told, output = end("bare-run", "train", VAR, inputs | {"reference": reference})
    assert status == 0, told
    checks = json.loads((output / "preflight.json").read_text())["checks"]
    assert {check["name"]: check["outcome"] for check in checks}["reference"] == "passed"


def test_what_older_programs_stored_of_positions_is_no_weight(inputs: dict[str, Path], ranks: Ranks, end: Any) -> None:
    base = copy_base(inputs, "older")
    state = load_file(base / "model.safetensors") | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    ranks.run(open_base, size=2, folder=base)
    status, told, _ = end("older-run", "train", SFT, {"rows": inputs["rows"], "base": base})
    assert status == 0, told


def open_base(world: World, folder: Path) -> None:
    load_sharded_policy(folder, world, precision=Precision.float32)


def test_a_base_beside_other_weights_of_the_same_names(inputs: dict[str, Path], ranks: Ranks) -> None:
    """torch reads either, and transformers the first alone."""
    base = copy_base(inputs, "twice")
    shutil.copy(base / "model.safetensors", base / "model.fp16.safetensors")
    with pytest.raises(AssertionError, match=r"model.fp16.safetensors and model.safetensors both hold the tensor"):
        ranks.run(open_base, size=2, folder=base)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.safetensors", lambda data: data[:-2000], "a file of it cannot be read"),
        ("tokenizer.json", lambda data: b"{", "a file of it cannot be read"),
        ("config.json", lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": 64'), "other sizes than its config.json"),
        ("adapter_config.json", lambda data: b"{}", "merge it into the weights first"),
    ],
)  # fmt: skip
def test_a_base_whose_files_are_no_model(
    name: str, change: Callable[[bytes], bytes], words: str, refuse: Callable[..., str], inputs: dict[str, Path]
) -> None:
    base = copy_base(inputs, "broken")
    path = base / name
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    told = refuse(base=base, reference=None)
    assert f"model {base}" in told and words in told


def test_a_base_with_code_of_its_own(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Nor where somebody says yes to transformers at a terminal."""
    base = copy_base(inputs, "coded")
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own"},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    job = {
        "job": "train", "config": SFT, "runtime": {"device": "cpu", "threads": 1}, "inputs": {"rows": str(inputs["rows"]), "base": str(base)},
        "output": str(tmp_path / "output"), "work": str(tmp_path / "work"),
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "training", str(tmp_path / "job.json")]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, timeout=300)
    assert done.returncode == EXIT_USER_ERROR and "trust_remote_code" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_preference_for_no_response(
    refuse: Callable[..., str], inputs: dict[str, Path], make_row: Any, write_rows: Any
) -> None:
    rows = write_rows(
        inputs["rows"].parent / "wrong", [make_row(f"Question {i}?", ["Yes", "No"], preferred=-1) for i in range(4)]
    )
    told = refuse(SFT | {"reference_factor": None}, rows=rows)
    assert "preferred is -1, expected the place of one of its 2 responses" in told


def test_a_cause_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(job: Job) -> None:
        shutil.rmtree(job.work)
        raise ValueError("got 3, expected 4")

    job = Job("fail", {}, {}, {}, output=tmp_path / "output", work=tmp_path / "work")
    job.work.mkdir()
    assert run_job({"fail": fail}, job) == EXIT_USER_ERROR  # and not that of a full disk
    assert "ValueError: got 3, expected 4" in capsys.readouterr().err
