"""Generation: the policy's own distribution, the same answers in any batch, resumed after a kill, nothing dropped silently."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.architectures import CONFIGS, make_model
from training import cache, generate, reference
from training.config import Device, GenerateConfig, Precision, ResponseRegime
from training.data.examples import load_examples, read_scores
from training.data.manifest import read_rows_manifest
from training.data.schema import SCHEMA
from training.data.selection import select_all
from training.job import Interrupted, Job
from training.model import digest_model, load_policy, resolve_device
from training.render import Renderer, render_prompt
from training.sampling import InverseCdf, cut_at_stop, draw_noise, find_stop_ids, generate_batch


def go_on() -> None:
    """Never stop."""


CONFIG = {"split": "heldout", "max_new_tokens": 24, "max_prompt_tokens": 100}


@pytest.fixture
def rows(tmp_path: Path, make_row: Callable[..., dict[str, Any]], write_rows: Callable[..., Path]) -> Path:
    """Write 16 held-out prompts of many lengths between others."""
    made = [make_row(f"{'why ' * (n % 9)}{n}?", ["A", "B"], split="train" if n % 2 else "heldout") for n in range(32)]
    return write_rows(tmp_path / "rows", made)


def run(
    make_job: Callable[..., Job], folder: str, *, inputs: dict[str, Path], tokens: int = 2048, **changes: Any
) -> Job:
    job = make_job("generate", folder, config=CONFIG | changes, inputs=inputs, microbatch_tokens=tokens)
    generate.run(job)
    return job


def read(job: Job) -> list[dict[str, Any]]:
    return pq.read_table(job.output / "responses.parquet").to_pylist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_does_not_change_an_answer(tiny_policy: Path, temperature: float) -> None:
    """Greedy or sampled, token by token: alone, two together, eight together."""
    config = GenerateConfig(max_new_tokens=32, temperature=temperature, seed=3)
    model, tokenizer = load_policy(tiny_policy, precision=Precision.float32, device=resolve_device(Device.cpu))
    stop_ids = find_stop_ids(model, tokenizer)
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": "why " * n + "?"}]) for n in range(8)]
    noise_BS = np.stack([draw_noise(f"{n:032x}", 0, config=config) for n in range(8)])

    def answer(size: int) -> list[list[int]]:
        spans = [slice(begin, begin + size) for begin in range(0, 8, size)]
        batches = [
            generate_batch(model, prompts[s], noise_BS=noise_BS[s], stop_ids=stop_ids, config=config, check_stop=go_on)
            for s in spans
        ]
        return [tokens for batch in batches for tokens in batch]

    assert answer(1) == answer(2) == answer(8)
    assert len({tuple(tokens) for tokens in answer(8)}) > 1


@pytest.mark.parametrize("family", CONFIGS)
def test_a_prompt_of_several_samples_is_read_once(family: str) -> None:
    """And every sample is what it is alone. Layers with windows do not keep every token: there each row is read."""
    model = make_model(family)
    config = GenerateConfig(max_new_tokens=8, temperature=1.0, seed=5)
    prompts = [[3, 5, 7, 11, 13, 17, 19], [2, 4, 8]]
    items = [(n, sample) for n in (0, 1) for sample in range(4)]
    noise_BS = np.stack([draw_noise(f"{n:032x}", sample, config=config) for n, sample in items])

    def answer(members: slice) -> list[list[int]]:
        ids = [prompts[n] for n, _ in items[members]]
        return generate_batch(model, ids, noise_BS=noise_BS[members], stop_ids=[0], config=config, check_stop=go_on)

    alone = [answer(slice(place, place + 1))[0] for place in range(len(items))]
    read: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(tuple(args[0].shape)))
    assert answer(slice(None)) == alone
    assert len({tuple(tokens) for tokens in alone}) > 2
    windows = family in ("mistral", "gemma2", "gemma3")
    assert read[:2] == ([(8, 7), (8, 1)] if windows else [(2, 6), (8, 1)])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_row_that_has_ended_leaves_its_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no answer is another for it: not of those that stay, whose keys and values are copied, and not of those that left."""
    monkeypatch.setattr(cache, "ROOM", 8)  # made anew on the way
    model = make_model(family)
    config = GenerateConfig(max_new_tokens=48, temperature=1.0, seed=5)
    prompts = [[3, 5, 7, 11, 13, 17, 19], [2, 4, 8]]
    items = [(n, sample) for n in (0, 1) for sample in range(8)]
    noise_BS = np.stack([draw_noise(f"{n:032x}", sample, config=config) for n, sample in items])
    stops = [0, 1]

    def answer(members: slice, **options: Any) -> list[list[int]]:
        ids = [prompts[n] for n, _ in items[members]]
        return generate_batch(
            model, ids, noise_BS=noise_BS[members], stop_ids=stops, config=config, check_stop=go_on, **options
        )

    alone = [answer(slice(place, place + 1))[0] for place in range(len(items))]
    lengths = sorted(map(len, alone))
    assert lengths[0] < lengths[8] < lengths[-1]
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(len(args[0])))
    assert answer(slice(None)) == alone
    decoding = read[-lengths[-1] :]  # a pass for every token of the longest
    for step, rows in enumerate(decoding):
        there = sum(length > step for length in lengths)
        assert there <= rows <= there + max(1, rows // 8), "an eighth of a batch may wait for others to leave with"
    read.clear()
    assert answer(slice(None), to_the_end=True) == alone
    assert read[-config.max_new_tokens + 1 :] == [16] * (config.max_new_tokens - 1), "ranks take the same passes"


def test_greedy_is_the_argmax_of_the_plain_model(tiny_policy: Path) -> None:
    config = GenerateConfig(max_new_tokens=12, temperature=0)
    model, tokenizer = load_policy(tiny_policy, precision=Precision.float32, device=resolve_device(Device.cpu))
    plain = LlamaForCausalLM.from_pretrained(tiny_policy)
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "Please explain"}])
    longer = render_prompt(tokenizer, [{"role": "user", "content": "Please explain why the sky is blue."}])
    stop_ids = find_stop_ids(model, tokenizer)
    got, _ = generate_batch(
        model, [prompt, longer], noise_BS=np.zeros((2, 12)), stop_ids=stop_ids, config=config, check_stop=go_on
    )
    ids = list(prompt)
    with torch.no_grad():
        for token in got:
            assert plain(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)


def test_the_models_own_settings_do_not_leak_in(tiny_policy: Path) -> None:
    """Folders of published models carry such settings; every one of them changes the distribution."""
    config = GenerateConfig(max_new_tokens=16, temperature=1.0)
    model, tokenizer = load_policy(tiny_policy, precision=Precision.float32, device=resolve_device(Device.cpu))
    prompt = [render_prompt(tokenizer, [{"role": "user", "content": "Hi"}])]
    noise_BS = draw_noise("ab" * 16, 0, config=config)[None]
    stop_ids = find_stop_ids(model, tokenizer)
    clean = generate_batch(model, prompt, noise_BS=noise_BS, stop_ids=stop_ids, config=config, check_stop=go_on)
    for name, value in {
        "do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 5.0, "min_new_tokens": 16,
        "no_repeat_ngram_size": 1, "num_beams": 3,
    }.items():  # fmt: skip
        setattr(model.generation_config, name, value)
    assert generate_batch(model, prompt, noise_BS=noise_BS, stop_ids=stop_ids, config=config, check_stop=go_on) == clean


def draw(scores: list[float], uniforms: np.ndarray, **changes: Any) -> np.ndarray:
    """Return the tokens drawn at these places of one distribution."""
    config = GenerateConfig(max_new_tokens=1, **changes)
    noise_BS = torch.from_numpy(uniforms)[:, None]
    scores_BV = torch.tensor([scores] * len(uniforms))
    return InverseCdf(noise_BS, config=config)(scores_BV, list(range(len(uniforms))), 0).numpy()


def test_a_token_is_drawn_where_the_number_falls() -> None:
    scores = np.log([0.5, 0.25, 0.125, 0.125]).tolist()
    places = np.array([0.0, 0.49, 0.51, 0.74, 0.76, 0.86, 0.88, 1 - 2**-53])
    assert draw(scores, places).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert draw(scores, places, top_k=2).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]  # 2/3 and 1/3
    assert draw(scores, places, top_p=0.5).tolist() == [0] * 8
    # temperature 1/2 squares the odds: 16 : 4 : 1 : 1
    assert draw(scores, places, temperature=0.5).tolist() == [0, 0, 0, 1, 1, 1, 1, 3]
    assert draw([-np.inf, 0.0, -np.inf], np.array([0.0, 0.5, 1 - 2**-53])).tolist() == [1, 1, 1]


def test_samples_have_the_policys_frequencies() -> None:
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    config = GenerateConfig(max_new_tokens=1)
    uniforms = np.array([draw_noise(f"{n:032x}", k, config=config)[0] for n in range(2000) for k in range(2)])
    counts = np.bincount(draw(np.log(probabilities).tolist(), uniforms), minlength=4)
    chi_squared = ((counts - 4000 * probabilities) ** 2 / (4000 * probabilities)).sum()
    assert chi_squared < 16.3  # the 99.9 % quantile with 3 degrees of freedom


def test_noise_belongs_to_seed_row_and_sample() -> None:
    config, other = GenerateConfig(seed=1), GenerateConfig(seed=2)
    base = draw_noise("0a" * 16, 0, config=config)
    assert np.array_equal(base, draw_noise("0a" * 16, 0, config=config))
    for changed in (
        draw_noise("0b" * 16, 0, config=config),
        draw_noise("0a" * 16, 1, config=config),
        draw_noise("0a" * 16, 0, config=other),
    ):
        assert not np.isclose(base, changed).any()


def test_rows_keep_their_ids_and_stand_in_the_schema(
    rows: Path, tiny_policy: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "WINDOW_PROMPTS", 5)
    job = run(make_job, "a", inputs={"rows": rows, "policy": tiny_policy}, samples_per_prompt=3, seed=5)
    source = [row for row in pq.read_table(rows / "rows.parquet").to_pylist() if row["split"] == "heldout"]
    assert pq.read_schema(job.output / "responses.parquet").equals(SCHEMA)
    got = read(job)
    for name in ("row_id", "split", "prompt", "line"):
        assert [row[name] for row in got] == [row[name] for row in source]
    assert {row["source"] for row in got} == {tiny_policy.name} and {row["preferred"] for row in got} == {None}
    assert all(len(row["responses"]) == len(row["truncated"]) == 3 for row in got)
    assert any(len(set(row["responses"])) > 1 for row in got)
    summary = json.loads((job.output / "summary.json").read_text())
    flags = [flag for row in got for flag in row["truncated"]]
    assert summary["prompts"] == 16 and summary["responses"] == 48 and summary["dropped"] == 0
    assert summary["truncated_share"] == pytest.approx(np.mean(flags))
    other = run(make_job, "b", inputs={"rows": rows, "policy": tiny_policy}, samples_per_prompt=3, seed=5, tokens=1)
    assert read(other) == got  # one at a time


def test_the_manifest_says_who_answered_and_how(rows: Path, tiny_policy: Path, make_job: Callable[..., Job]) -> None:
    job = run(make_job, "a", inputs={"rows": rows, "policy": tiny_policy}, temperature=0.5, top_k=7)
    manifest = read_rows_manifest(job.output)
    assert manifest.regime == ResponseRegime.from_reference
    assert manifest.sampling == {"temperature": 0.5, "top_p": 1.0, "top_k": 7.0}
    assert manifest.policy == digest_model(tiny_policy, AutoTokenizer.from_pretrained(tiny_policy))


def test_truncated_means_that_no_stop_token_came(rows: Path, tiny_policy: Path, make_job: Callable[..., Job]) -> None:
    job = run(make_job, "t", inputs={"rows": rows, "policy": tiny_policy}, samples_per_prompt=3, max_new_tokens=90)
    got = read(job)
    flags = [(cut, len(ids)) for row in got for cut, ids in zip(row["truncated"], row["response_ids"], strict=True)]
    assert {cut for cut, _ in flags} == {True, False}  # a random policy stops at one token in 384
    assert all(n == 90 for cut, n in flags if cut) and min(n for cut, n in flags if not cut) < 90
    assert not any("<|im_end|>" in response for row in got for response in row["responses"])


def test_what_is_scored_and_trained_are_the_tokens_that_were_drawn(
    rows: Path, tiny_policy: Path, make_job: Callable[..., Job]
) -> None:
    """A random policy writes special tokens, broken characters and odd pieces: most of its texts are other tokens when read again."""
    job = run(
        make_job,
        "t",
        inputs={"rows": rows, "policy": tiny_policy},
        split="train",
        samples_per_prompt=3,
        max_new_tokens=40,
    )
    scored = make_job(
        "score_reference", "scored", config={"max_tokens": 160}, inputs={"rows": job.output, "reference": tiny_policy}
    )
    reference.run(scored)
    model, tokenizer = load_policy(tiny_policy, precision=Precision.float32, device=resolve_device(Device.cpu))
    plain, renderer = LlamaForCausalLM.from_pretrained(tiny_policy), Renderer(tokenizer, max_tokens=160)
    logps = read_scores(scored.output, "logp")
    examples, dropped = load_examples(
        job.output, renderer, select=select_all, reference=read_scores(scored.output, "logp", columns=["num_tokens"])
    )
    assert not dropped and len(examples) == 16
    changed = 0
    for example, row in zip(examples, read(job), strict=True):
        prompt = render_prompt(tokenizer, row["prompt"])
        for sample, drawn, text, logp in zip(
            example.samples, row["response_ids"], row["responses"], logps[row["row_id"]]["logp"], strict=True
        ):
            assert sample.ids_T.tolist() == [*prompt, *drawn] and sample.start == len(prompt)
            with torch.no_grad():
                logp_TV = plain(torch.tensor([[*prompt, *drawn]])).logits[0].double().log_softmax(-1)
            assert logp == pytest.approx(
                sum(logp_TV[len(prompt) - 1 + t, token].item() for t, token in enumerate(drawn)), abs=1e-3
            )
            again = tokenizer.encode(text, add_special_tokens=False)
            changed += again != [token for token in drawn if token not in find_stop_ids(model, tokenizer)]
    assert changed > 24  # of 48


def test_empty_answers_are_kept_and_counted(
    rows: Path, tiny_policy: Path, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    folder = tmp_path / "silent"
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits equal: greedy takes id 0, the BOS, which is no text
    model.save_pretrained(folder)
    job = run(make_job, "silent", inputs={"rows": rows, "policy": folder}, temperature=0, max_new_tokens=4)
    assert [row["responses"] for row in read(job)] == [[""]] * 16
    assert [row["truncated"] for row in read(job)] == [[True]] * 16
    assert json.loads((job.output / "summary.json").read_text())["empty_responses"] == 16


def test_an_answer_ends_with_its_first_stop_token() -> None:
    assert cut_at_stop([5, 6, 1, 2, 2], [1, 2]) == [5, 6, 1]
    assert cut_at_stop([1, 2], [1, 2]) == [1]
    assert cut_at_stop([5, 6], [1, 2]) == [5, 6]


def test_a_stop_is_heeded_within_a_batch(tiny_policy: Path) -> None:
    config = GenerateConfig(max_new_tokens=500, temperature=0)
    model, tokenizer = load_policy(tiny_policy, precision=Precision.float32, device=resolve_device(Device.cpu))
    prompt = [render_prompt(tokenizer, [{"role": "user", "content": "Hi"}])]
    asked = []

    def stop_at_third() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Interrupted("generate")

    with pytest.raises(Interrupted):
        generate_batch(
            model, prompt, noise_BS=np.zeros((1, 500)), stop_ids=[1], config=config, check_stop=stop_at_third
        )
    assert len(asked) == 3


def test_a_limit_takes_the_first_row_ids(rows: Path, tiny_policy: Path, make_job: Callable[..., Job]) -> None:
    job = run(make_job, "limit", inputs={"rows": rows, "policy": tiny_policy}, limit=3)
    ids = sorted(row["row_id"] for row in pq.read_table(rows / "rows.parquet").to_pylist() if row["split"] == "heldout")
    assert sorted(row["row_id"] for row in read(job)) == ids[:3]


def test_long_prompts_are_dropped_and_named(rows: Path, tiny_policy: Path, make_job: Callable[..., Job]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    source = [row for row in pq.read_table(rows / "rows.parquet").to_pylist() if row["split"] == "heldout"]
    lengths = {row["row_id"]: len(render_prompt(tokenizer, row["prompt"])) for row in source}
    cap = sorted(lengths.values())[len(lengths) // 2]
    job = run(make_job, "long", inputs={"rows": rows, "policy": tiny_policy}, max_prompt_tokens=cap)
    dropped = [json.loads(line)["row_id"] for line in (job.output / "dropped.jsonl").read_text().splitlines()]
    assert sorted(dropped) == sorted(row_id for row_id, length in lengths.items() if length > cap) != []
    assert sorted(dropped + [row["row_id"] for row in read(job)]) == sorted(lengths)
    assert json.loads((job.output / "summary.json").read_text())["dropped"] == len(dropped)
    with pytest.raises(
        ValueError,
        match=r"all 16 prompts of the heldout split were dropped \(16 too_long\); raise max_prompt_tokens, which is 8",
    ):
        run(make_job, "none", inputs={"rows": rows, "policy": tiny_policy}, max_prompt_tokens=8)
    with pytest.raises(
        ValueError, match=r"max_prompt_tokens \+ max_new_tokens: got \d+, the model llama has a context of 1024 tokens"
    ):
        run(make_job, "none", inputs={"rows": rows, "policy": tiny_policy}, max_prompt_tokens=1020)


def test_prompts_that_the_template_refuses_are_dropped_and_named(
    rows: Path, tiny_policy: Path, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_policy, tmp_path / "choosy")
    template = (folder / "chat_template.jinja").read_text()
    refuse = "{% if '7?' in messages[0].content %}{{ raise_exception('no sevens') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuse + template)
    job = run(make_job, "choosy", inputs={"rows": rows, "policy": folder}, split="train")
    source = {row["row_id"]: row for row in pq.read_table(rows / "rows.parquet").to_pylist() if row["split"] == "train"}
    refused = {row_id for row_id, row in source.items() if "7?" in row["prompt"][0]["content"]}
    dropped = [json.loads(line) for line in (job.output / "dropped.jsonl").read_text().splitlines()]
    assert {entry["row_id"] for entry in dropped} == refused and len(refused) == 3  # 7, 17, 27
    assert all(entry["reason"] == "template_refuses" and "(no sevens)" in entry["detail"] for entry in dropped)
    assert {row["row_id"] for row in read(job)} == source.keys() - refused


def test_an_empty_split_is_refused(
    tmp_path: Path, tiny_policy: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any
) -> None:
    train_only = write_rows(tmp_path / "train_only", [make_row("Hi", ["A", "B"])])
    with pytest.raises(ValueError, match="got no rows in the heldout split"):
        run(make_job, "empty", inputs={"rows": train_only, "policy": tiny_policy})


def test_a_killed_job_answers_only_the_rest(
    tmp_path: Path, tiny_policy: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any
) -> None:
    num_windows = 3
    count = num_windows * generate.WINDOW_PROMPTS
    # Every fifth prompt is too long: what a finished window dropped is not lost with the attempt.
    made = [
        make_row(f"{'why ' * (0 if n % 5 else 120)}Question {n}?", ["A", "B"], split="heldout") for n in range(count)
    ]
    inputs = {"rows": write_rows(tmp_path / "many", made), "policy": tiny_policy}
    config = CONFIG | {"seed": 7, "max_new_tokens": 60}
    job = make_job("generate", "killed", config=config, inputs=inputs)
    path = tmp_path / "job.json"
    paths = {"output": str(job.output), "work": str(job.work), "inputs": {k: str(v) for k, v in inputs.items()}}
    path.write_text(json.dumps({"job": "generate", "config": config, "runtime": job.runtime} | paths))
    process = subprocess.Popen([sys.executable, "-m", "training", str(path)], stderr=subprocess.PIPE, text=True)
    parts, deadline = job.work / "parts", time.monotonic() + 200
    while not list(parts.glob("*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.parquet")}
    assert 1 <= len(finished) < num_windows and not (job.output / "responses.parquet").exists()
    generate.run(job)
    assert {name: (parts / name).stat().st_mtime_ns for name in finished} == finished
    assert len((job.output / "metrics.jsonl").read_text().splitlines()) == num_windows - len(finished)
    whole = make_job("generate", "whole", config=config, inputs=inputs)
    generate.run(whole)
    assert read(job) == read(whole)
    dropped = [(folder.output / "dropped.jsonl").read_text() for folder in (job, whole)]
    assert dropped[0] == dropped[1] and dropped[0].count("too_long") == len(range(0, count, 5))
    assert len(read(job)) + len(range(0, count, 5)) == count
