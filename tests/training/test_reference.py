"""The job score_reference: equal to the plain log-softmax, batched = alone, killed and resumed, drops named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import reference
from training.job import Interrupted, Job
from training.model import load_policy

CONFIG = {"max_tokens": 96}


@pytest.fixture
def rows(tmp_path: Path, make_row: Callable[..., dict[str, Any]], write_rows: Callable[..., Path]) -> Path:
    made = [
        make_row(
            f"Question {i}?",
            [f"Answer {'very ' * (i % 7)}long {i}", f"No {i}"],
            split="heldout" if i % 5 == 0 else "train",
        )
        for i in range(20)
    ]
    made.append(make_row("Too long?", ["Yes", "word " * 200]))
    made.append(make_row("Marker?", ["Yes <|im_end|>", "No"]))
    return write_rows(tmp_path / "rows", made)


def read(job: Job) -> dict[str, dict[str, Any]]:
    return {row["row_id"]: row for row in pq.read_table(job.output / "scores.parquet").to_pylist()}


def test_scores_equal_plain_log_softmax(rows: Path, tiny_policy: Path, make_job: Callable[..., Job]) -> None:
    job = make_job("score_reference", "a", config=CONFIG, inputs={"rows": rows, "reference": tiny_policy})
    reference.run(job)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_policy), AutoTokenizer.from_pretrained(tiny_policy)
    scores, by_id = read(job), {r["row_id"]: r for r in pq.read_table(rows / "rows.parquet").to_pylist()}
    assert len(scores) == 20
    for row_id, score in scores.items():
        row = by_id[row_id]
        for response, logp, num_tokens in zip(row["responses"], score["logp"], score["num_tokens"], strict=True):
            text = f"<s><|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
            start = len(tokenizer(text, add_special_tokens=False).input_ids)
            ids = tokenizer(f"{text}{response}<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                all_logp = model(ids).logits.double().log_softmax(-1)[0]
            expected = sum(all_logp[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
            assert num_tokens == ids.shape[1] - start
            assert logp == pytest.approx(expected, abs=2e-4)


def test_dropped_rows_are_named_and_counted(rows: Path, tiny_policy: Path, make_job: Callable[..., Job]) -> None:
    job = make_job("score_reference", "a", config=CONFIG, inputs={"rows": rows, "reference": tiny_policy})
    reference.run(job)
    dropped = [json.loads(line) for line in (job.output / "dropped.jsonl").read_text().splitlines()]
    assert sorted(d["reason"] for d in dropped) == ["marker_in_response", "too_long"]
    summary = json.loads((job.output / "summary.json").read_text())
    assert (summary["rows"], summary["dropped"], summary["dropped_too_long"], summary["responses"]) == (20, 2, 1, 40)
    assert sorted(p.name for p in job.output.iterdir()) == [
        "dropped.jsonl",
        "manifest.json",
        "metrics.jsonl",
        "scores.parquet",
        "summary.json",
    ]


def test_batch_size_changes_nothing_but_rounding(rows: Path, tiny_policy: Path, make_job: Callable[..., Job]) -> None:
    inputs = {"rows": rows, "reference": tiny_policy}
    alone = make_job("score_reference", "alone", config=CONFIG, inputs=inputs, microbatch_tokens=1)
    together = make_job("score_reference", "together", config=CONFIG, inputs=inputs, microbatch_tokens=4096)
    reference.run(alone)
    reference.run(together)
    for row_id, row in read(alone).items():
        assert row["logp"] == pytest.approx(read(together)[row_id]["logp"], abs=1e-4)


def test_a_batch_that_the_device_has_no_room_for_is_scored_in_parts(
    rows: Path, tiny_policy: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"rows": rows, "reference": tiny_policy}
    roomy, narrow = (make_job("score_reference", name, config=CONFIG, inputs=inputs) for name in ("roomy", "narrow"))
    reference.run(roomy)
    sum_logps, sizes = reference.sum_logps, []

    def sum_few(model: Any, micro: Any) -> torch.Tensor:
        sizes.append(len(micro.trained))
        if len(micro.trained) > 3:
            raise torch.OutOfMemoryError("no room")
        return sum_logps(model, micro)

    monkeypatch.setattr(reference, "sum_logps", sum_few)
    reference.run(narrow)
    assert max(sizes) > 3
    for row_id, row in read(narrow).items():
        assert row["logp"] == pytest.approx(read(roomy)[row_id]["logp"], abs=1e-4)


def test_stopped_job_goes_on_from_its_windows(
    rows: Path, tiny_policy: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "WINDOW_ROWS", 4)
    inputs = {"rows": rows, "reference": tiny_policy}
    whole = make_job("score_reference", "whole", config=CONFIG, inputs=inputs)
    reference.run(whole)
    job = make_job("score_reference", "cut", config=CONFIG, inputs=inputs)
    score_window, scored = reference.score_window, []

    def stop_after_three(scorer: Any, rows: list[dict[str, Any]], part: Path) -> int:
        scored.append(part.name)
        tokens = score_window(scorer, rows, part)
        if len(scored) == 3:
            job.stop.set()
        return tokens

    monkeypatch.setattr(reference, "score_window", stop_after_three)
    with pytest.raises(Interrupted):
        reference.run(job)
    assert not (job.output / "scores.parquet").exists()
    job.stop.clear()
    reference.run(job)
    assert scored == [f"part-{i:06d}.parquet" for i in range(6)]  # 22 rows in windows of 4, none scored twice
    for name in ("scores.parquet", "dropped.jsonl"):
        assert (job.output / name).read_bytes() == (whole.output / name).read_bytes()


def test_parts_of_other_rows_are_not_taken(
    rows: Path, tiny_policy: Path, tmp_path: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any
) -> None:
    job = make_job("score_reference", "a", config=CONFIG, inputs={"rows": rows, "reference": tiny_policy})
    reference.run(job)
    others = write_rows(tmp_path / "others", [make_row("Another?", ["One", "Two"])])
    again = make_job("score_reference", "a", config=CONFIG, inputs={"rows": others, "reference": tiny_policy})
    reference.run(again)
    assert list(read(again)) == [make_row("Another?", ["One", "Two"])["row_id"]]


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_a_long_row_that_changes_those_beside_it_is_refused_in_whichever_window_it_comes(
    layout: str,
    tiny_policy: Path,
    tmp_path: Path,
    make_job: Callable[..., Job],
    make_row: Any,
    write_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LongRoPE has other frequencies for all rows of a pass with one beyond its first length, here 64 tokens."""
    monkeypatch.setattr(reference, "WINDOW_ROWS", 2)
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 16.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    (policy / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    made = [make_row(f"Question {i}?", [f"Answer {i}", "word " * 30 if i == 5 else "No"]) for i in range(8)]

    def score(name: str, rows: list[dict[str, Any]], max_tokens: int) -> dict[str, dict[str, Any]]:
        folders = {"rows": write_rows(tmp_path / name, rows), "reference": policy}
        job = make_job("score_reference", name, config={"max_tokens": max_tokens}, inputs=folders, layout=layout)
        reference.run(job)
        return read(job)

    with pytest.raises(ValueError, match=rf"model type llama, layout {layout}, float32: log-probabilities differ by"):
        score("mixed", made, 256)
    assert len(score("short", made, 64)) == 7  # as the message of separate rows says: none is that long then


def test_all_rows_dropped_is_an_error(tiny_policy: Path, rows: Path, make_job: Callable[..., Job]) -> None:
    job = make_job("score_reference", "a", config={"max_tokens": 8}, inputs={"rows": rows, "reference": tiny_policy})
    with pytest.raises(ValueError, match=r"all 22 rows were dropped \(1 marker_in_response, 21 too_long\)"):
        reference.run(job)
    long = make_job(
        "score_reference", "b", config={"max_tokens": 4096}, inputs={"rows": rows, "reference": tiny_policy}
    )
    with pytest.raises(ValueError, match="max_tokens: got 4096, the model llama has a context of 1024"):
        reference.run(long)


def test_a_row_without_a_number_is_named_before_anything_is_written(
    tiny_policy: Path, tmp_path: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any
) -> None:
    folder = shutil.copytree(tiny_policy, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder).encode("z", add_special_tokens=False)[0]
    weights["model.embed_tokens.weight"][token] = float("nan")
    if "lm_head.weight" not in weights:  # a head of its own: tied to the embedding it would give NaN for every row
        weights["lm_head.weight"] = load_file(tiny_policy / "model.safetensors")["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    bad = make_row("Question", ["Yes", "z z z"])
    rows = write_rows(tmp_path / "rows", [make_row("Question", ["Yes", "No"]), bad])
    job = make_job("score_reference", "nan", config=CONFIG, inputs={"rows": rows, "reference": folder})
    with pytest.raises(ValueError, match=rf"NaN or infinite log-probabilities for 1 of 2 rows \({bad['row_id']}\)"):
        reference.run(job)
    assert not list(job.output.glob("*.parquet")) and not list((job.work / "parts").iterdir())


def test_the_longest_rows_of_the_whole_file_are_looked_at_before_any_is_scored(
    longrope_policy: Path, tmp_path: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any
) -> None:
    """Beyond 64 tokens this model computes otherwise; the first two windows have no row that long."""
    short = [make_row(f"Question {i}?", ["Yes", f"No {i}"]) for i in range(2 * reference.WINDOW_ROWS)]
    long = [make_row(f"Question {i}?", ["Yes", f"{'very ' * 40}{i}"]) for i in range(2)]
    for layout in ("rows", "tree"):
        for name, made in (("short", short), ("long", [*short, *long])):
            rows = write_rows(tmp_path / name, made)
            job = make_job(
                "score_reference",
                f"{name}-{layout}",
                config={"max_tokens": 400},
                inputs={"rows": rows, "reference": longrope_policy},
                layout=layout,
            )
            if name == "short":
                reference.run(job)
                continue
            with pytest.raises(ValueError, match=rf"llama, layout {layout}, float32: log-probabilities differ"):
                reference.run(job)
            assert not list(job.work.rglob("*.parquet"))


def test_the_manifest_names_weights_template_and_tokenizer(
    rows: Path, tiny_policy: Path, other_tokenizer: Path, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    """Any other weights, template or tokenizer have another digest; where the folder lies, how its files are written and what else is in it does not count."""

    def digests(name: str, change: Callable[[Path], None]) -> dict[str, str]:
        folder = tmp_path / name / "model"
        shutil.copytree(tiny_policy, folder)
        change(folder)
        job = make_job("score_reference", name, config=CONFIG, inputs={"rows": rows, "reference": folder})
        reference.run(job)
        manifest = json.loads((job.output / "manifest.json").read_text())
        assert manifest["max_tokens"] == CONFIG["max_tokens"]
        found: dict[str, str] = manifest["model"]
        return found

    def nudge(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3
        model.save_pretrained(folder)

    def speak(folder: Path) -> None:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("user", "human") + "{# other #}")

    def read_otherwise(folder: Path) -> None:
        shutil.copy(other_tokenizer / "tokenizer.json", folder)

    def write_otherwise(folder: Path) -> None:
        (folder / "README.md").write_text("hello")
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))

    same = digests("same", write_otherwise)
    weights, template, tokenizer = (
        digests("weights", nudge),
        digests("template", speak),
        digests("tokenizer", read_otherwise),
    )
    assert tokenizer == same | {"tokenizer_sha256": tokenizer["tokenizer_sha256"]} != same
    assert weights["weights_sha256"] != same["weights_sha256"] == template["weights_sha256"]
    assert template["template_sha256"] != same["template_sha256"] == weights["template_sha256"]
    direct = digests("direct", lambda folder: None)
    assert direct == same


def test_broken_model_folders_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    def copy(name: str, *, without: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in tiny_policy.iterdir():
            if not path.match(without):
                (folder / path.name).write_bytes(path.read_bytes())
        return folder

    def load(folder: Path) -> None:
        load_policy(folder, precision=reference.ReferenceScoreConfig().precision, device=torch.device("cpu"))

    for without, message in (
        ("config.json", "no config.json"),
        ("*.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
        ("chat_template.jinja", "no chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            load(copy(f"no-{without.replace('*', 'x')}", without=without))
    headless = copy("headless", without="nothing")
    state = load_file(headless / "model.safetensors")
    state["head.weight"] = state.pop("lm_head.weight")
    save_file(state, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 1 tensors \(first: lm_head.weight\), expected all of them"):
        load(headless)
    grown = copy("grown", without="tokenizer*")
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(grown)
    with pytest.raises(ValueError, match=r"largest id is \d+, the embedding has"):
        load(grown)
