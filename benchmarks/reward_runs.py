"""Our side of the reward comparisons, each run in a process of `benchmarks.training`: rows, reward models, answers, VAR."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.children import say
from benchmarks.training import SHARED
from training import generate, reward_model, train
from training.checkpoint import Progress
from training.config import (
    Config,
    Device,
    GenerateConfig,
    IngestConfig,
    Precision,
    ResponseRegime,
    RewardModelConfig,
    RewardRender,
    RewardScoreConfig,
    Runtime,
    Schedule,
)
from training.data import ingest
from training.data.examples import read_scores
from training.data.rows import RowsWriter, iterate_rows
from training.data.schema import SCHEMA
from training.data.splits import choose_split
from training.distributed import ALONE
from training.job import Job, write_json
from training.logprobs import check_layout, choose_groups
from training.loop import Trainer, make_optimiser
from training.memory import keep_freed_memory
from training.model import load_policy, load_tokenizer
from training.objectives.lambdas import LambdaUnit, resolve_lambda
from training.objectives.objective import largest_of_sets
from training.objectives.var import ReferenceFactor, VarConfig
from training.objectives.weights import softmax_weights
from training.render import Renderer, UnusableRow, render_prompt
from training.reward import score
from training.reward.scorer import load_scorer
from training.sampling import find_stop_ids

# S seeds, P prompts, K responses of a prompt

HELDOUT_SHARE, JUDGE_SHARE = 0.3, 0.35  # of the prompts; the rest is `own`
REWARD_TOKENS = 128
FIRST_LOOK_SECONDS = 20.0
LOOK_RATIO = 1.25
WINDOW_PROMPTS = 64
CPU = torch.device("cpu")
RUNTIME = Runtime(device=Device.cpu, microbatch_tokens=SHARED["microbatch_tokens"], checkpoint_every_steps=0)


# --- rows and reward models ---


def measure_rows(spec: dict[str, Any]) -> dict[str, Any]:
    """Cut the source by prompt; return the folders `own`, `judge`, `pairs` (some of own's, short) and `heldout` (short prompts)."""
    folder = Path(spec["folder"])
    config = IngestConfig(responses=ResponseRegime.support, heldout_fraction=HELDOUT_SHARE, limit=spec["source_rows"], max_invalid_fraction=0.5)  # fmt: skip
    ingest.run(make_job("ingest", config, folder / "all", source=Path(spec["data"]) / "helpful-base"))
    rows = list(iterate_rows(folder / "all"))
    kept, trained = ([row for row in rows if row["split"] == split] for split in ("heldout", "train"))
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for row in trained:  # a larger share only moves prompts out of `train`
        parts[choose_split(row["prompt"], heldout_fraction=HELDOUT_SHARE + JUDGE_SHARE)].append(row)
    tokenizer = load_tokenizer(Path(spec["model"]))
    renderer = Renderer(tokenizer, max_tokens=spec["longest_pair"])
    short = [row for row in parts["train"] if fits(renderer, row)][: spec["pairs"]]
    written = {
        "own": parts["train"] + kept,
        "judge": parts["heldout"] + kept,
        "pairs": short,
        "heldout": [row for row in kept if is_short(tokenizer, row["prompt"], longest=spec["longest_prompt"])],
    }
    for name, chosen in written.items():
        write_rows(folder / name, chosen)
    return {name: str(folder / name) for name in written} | {f"num_{name}": len(rows) for name, rows in written.items()}


def is_short(tokenizer: Any, prompt: list[dict[str, str]], *, longest: int) -> bool:
    """Say whether a prompt can be rendered, in so many tokens at most."""
    try:
        return len(render_prompt(tokenizer, prompt)) <= longest
    except UnusableRow:
        return False


def fits(renderer: Renderer, row: dict[str, Any]) -> bool:
    """Say whether a row can be rendered within the renderer's limit."""
    try:
        renderer.row(row["prompt"], row["responses"], row["truncated"])
    except UnusableRow:
        return False
    return True


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write a rows folder of a fixed set."""
    folder.mkdir(exist_ok=True)
    with RowsWriter(folder / "rows.parquet", SCHEMA) as out:
        out.write(rows)
    write_json(folder / "manifest.json", {"regime": ResponseRegime.support})


def measure_reward_model(spec: dict[str, Any]) -> dict[str, Any]:
    """Train a reward model from the encoder; return its held-out accuracy."""
    folder = Path(spec["folder"])
    config = RewardModelConfig(learning_rate=1e-4, epochs=spec["epochs"], max_tokens=REWARD_TOKENS, seed=spec["seed"])
    started = time.monotonic()
    reward_model.run(make_job("reward_model", config, folder, base=Path(spec["encoder"]), rows=Path(spec["rows"])))
    return {"folder": str(folder), "seconds": time.monotonic() - started} | read_summary(folder, "accuracy", "rows")


# --- what a policy answers ---


class Meter:
    """Lets a policy answer held-out prompts and scores the answers. The noise is the prompt's own: two policies have the same."""

    def __init__(self, spec: dict[str, Any]) -> None:
        heldout = spec["heldout"]
        self._tokenizer = load_tokenizer(Path(spec["model"]))
        self.scorer = open_scorer(Path(heldout["scorer"]))
        self._config = GenerateConfig(temperature=heldout["temperature"], max_new_tokens=heldout["new_tokens"])
        self._job = make_job("generate", self._config, Path(spec["folder"]))
        rows = pick_rows(Path(heldout["rows"]), split="heldout", limit=heldout["end"])
        if len(rows) < heldout["end"]:
            raise ValueError(
                f"held-out prompts of {heldout['rows']}: got {len(rows)}, expected {heldout['end']}; lower heldout_prompts or "
                "final_prompts, or raise longest_pair or source_rows"
            )
        rows = rows[heldout["begin"] :]
        self._prompts = [generate.Prompt(row, render_prompt(self._tokenizer, row["prompt"])) for row in rows]

    def rewards(self, model: Any) -> np.ndarray:
        """Return the reward of one answer to each prompt. Layers that compute activations again keep no keys while they train, so the model
        does not meanwhile."""
        stop_ids = find_stop_ids(model, self._tokenizer)
        generator = generate.Generator(
            self._job, model, self._tokenizer, stop_ids, self._config, RUNTIME.microbatch_tokens, source=""
        )
        answers: list[list[int]] = []
        training = model.training
        model.eval()
        for begin in range(0, len(self._prompts), WINDOW_PROMPTS):
            answers += generator.answer([(prompt, 0) for prompt in self._prompts[begin : begin + WINDOW_PROMPTS]])
        model.train(training)
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        prompts = [prompt.row["prompt"] for prompt in self._prompts]
        return self.scorer.score(prompts, texts, budget=RUNTIME.microbatch_tokens)[0]


def measure_base(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the rewards of the base's answers."""
    model, _ = load_policy(Path(spec["model"]), precision=Precision.float32, device=CPU)
    return {"rewards": Meter(spec).rewards(model).tolist()}


class Curve:
    """A method's held-out mean reward over its own seconds, from where this is made; looking and what is set aside do not count. `spent` are
    the seconds of phases that came before."""

    def __init__(self, spec: dict[str, Any], *, spent: dict[str, float] | None = None) -> None:
        self._phases = dict(spent or {})
        self._spec, self._begun = spec, time.monotonic() - sum(self._phases.values())
        self._due = FIRST_LOOK_SECONDS
        self._points: list[list[float]] = []
        with self.aside():
            self.meter = Meter(spec)

    @property
    def seconds(self) -> float:
        """What counts, up to now."""
        return time.monotonic() - self._begun

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave what is done within out of the seconds."""
        started = time.monotonic()
        yield
        self._begun += time.monotonic() - started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done within under a name."""
        started = time.monotonic()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - started

    def look(self, model: Any, *, last: bool = False) -> bool:
        """Measure the model where that is due, and say whether all is over: the target reached, or the limit."""
        seconds, limit = self.seconds, self._spec.get("limit", np.inf)
        if seconds < min(self._due, limit) and not last:
            return False
        with self.aside():
            self._points.append([round(seconds, 1), float(self.meter.rewards(model).mean())])
        while self._due <= seconds:
            self._due *= LOOK_RATIO
        say(
            f"{seconds:.0f} s of at most {limit:.0f} s: reward {self._points[-1][1]:.4f}, target {self._spec['target']:.4f}"
        )
        return self.arrived or seconds >= limit

    @property
    def arrived(self) -> bool:
        """Whether the target is reached."""
        return bool(self._points) and self._points[-1][1] >= self._spec["target"]

    def result(self) -> dict[str, Any]:
        """Return when it ended, how, all points, and the seconds of each phase."""
        seconds = self._points[-1][0]
        told = self._phases | {"rest": max(0.0, seconds - sum(self._phases.values()))}
        phases = {name: round(spent, 1) for name, spent in told.items()}
        return {"seconds": seconds, "arrived": self.arrived, "curve": self._points, "phases": phases}


# --- VAR ---


def measure_samples(spec: dict[str, Any]) -> dict[str, Any]:
    """Sample the base's responses and score them; return the folders, the seconds of both, and the reward's standard deviation in a prompt."""
    folder = Path(spec["folder"])
    config = GenerateConfig(split="train", limit=spec["prompts"], samples_per_prompt=spec["responses"], max_new_tokens=spec["new_tokens"], seed=spec["seed"])  # fmt: skip
    started = time.monotonic()
    generate.run(make_job("generate", config, folder / "rows", policy=Path(spec["model"]), rows=Path(spec["rows"])))
    sampled = time.monotonic()
    score_rewards(folder / "rewards", scorer=Path(spec["scorer"]), rows=folder / "rows")
    phases = {"sample": sampled - started, "score": time.monotonic() - sampled}
    found: dict[str, Any] = {"rows": str(folder / "rows"), "rewards": str(folder / "rewards")}
    found |= {"seconds": sum(phases.values()), "phases": phases}
    found |= read_summary(folder / "rewards", "within_prompt_std")
    return found | read_summary(folder / "rows", "mean_response_tokens", "truncated_share")


def measure_var_curve(spec: dict[str, Any]) -> dict[str, Any]:
    """Train on the base's samples until the target is reached or the epochs are over; sampling and scoring count."""
    curve = Curve(spec, spent=spec["samples"]["phases"])
    with curve.phase("prepare"):
        trainer = make_trainer(spec, epochs=spec["epochs"])
    over = False
    while not over and trainer.progress.step < trainer.work.num_steps:
        with curve.phase("steps"):
            trainer.take_step()
        over = curve.look(trainer.model.model, last=trainer.progress.step == trainer.work.num_steps)
    return curve.result() | {"steps": trainer.progress.step}


def measure_var_gain(spec: dict[str, Any]) -> dict[str, Any]:
    """Train on the base's samples for the given seconds, their drawing and scoring included, to the end of the step in which they are over,
    as DPO does; return the answers' rewards."""
    meter, trainer = Meter(spec), make_trainer(spec, epochs=100)
    started, seconds = time.monotonic() - spec["samples"]["seconds"], 0.0
    while seconds < spec["limit"]:
        trainer.take_step()
        seconds = time.monotonic() - started
    steps = trainer.progress.step
    say(f"{steps} steps, {seconds:.0f} s")
    prompts = sum(len(trainer.work.rows(step)) for step in range(steps))
    return {"rewards": meter.rewards(trainer.model.model).tolist(), "seconds": seconds, "prompts": prompts}


def measure_target(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what a scorer says of the samples that VAR learns from (of each prompt's first `responses`): of all, by their weights, and of the
    best of each prompt by the weights' own reward. Samples of a policy that has learned its target whole are on these prompts as much better as the second is than the first."""
    rows = list(iterate_rows(Path(spec["samples"]["rows"])))
    stored, count = read_scores(Path(spec["samples"]["rewards"]), "reward"), spec.get("responses")
    responses = [row["responses"][:count] for row in rows]
    group_R = np.repeat(np.arange(len(rows)), [len(texts) for texts in responses])
    reward_R = np.concatenate([stored[row["row_id"]]["reward"][:count] for row in rows])
    base_R = np.zeros_like(reward_R)
    lambda_ = resolve_lambda(spec["lambda_"], LambdaUnit.reward_std, reward_R=reward_R, base_R=base_R, group_R=group_R)
    weight_R = softmax_weights(reward_R, base_R, group_R, lambda_=lambda_)
    prompts, texts = [rows[group]["prompt"] for group in group_R], [*chain(*responses)]
    judged_R, _ = open_scorer(Path(spec["scorer"])).score(prompts, texts, budget=RUNTIME.microbatch_tokens)
    best_R = reward_R == largest_of_sets(reward_R, group_R)
    return {
        "samples": judged_R.mean(),
        "weighted": np.average(judged_R, weights=weight_R),
        "best": judged_R[best_R].mean(),
    }


def make_trainer(spec: dict[str, Any], *, epochs: int) -> Trainer:
    """Return a VAR run on the base's samples before its first step, as the job `train` makes one, at a constant learning rate as its
    rival has."""
    config = VarConfig(
        lambda_=spec["lambda_"],
        lambda_unit=LambdaUnit.reward_std,
        reference_factor=ReferenceFactor.sum,
        learning_rate=spec["learning_rate"],
        schedule=Schedule.constant,
        warmup_fraction=0.0,
        seed=spec.get("seed", 0),
        max_tokens=spec["longest_pair"] + spec["new_tokens"],
        batch_prompts=spec["batch_prompts"],
        epochs=epochs,
    )
    inputs = {"base": spec["model"], "rows": spec["samples"]["rows"], "rewards": spec["samples"]["rewards"]}
    job = make_job("train", config, Path(spec["folder"]), **{name: Path(path) for name, path in inputs.items()})
    keep_freed_memory()
    prepared = train.prepare(job, config, RUNTIME, ALONE)
    groups = choose_groups(example.samples for example in prepared.ready.examples)
    check_layout(prepared.policy, groups, layout=RUNTIME.layout, device=CPU)  # the preflight does it in the job
    settings = train.make_settings(config)
    steps = prepared.ready.steps
    return Trainer(
        prepared.policy, make_optimiser(prepared.policy, settings), steps, settings, RUNTIME, job, Progress()
    )


# --- jobs ---


def make_job(name: str, config: Config, folder: Path, **inputs: Path) -> Job:
    """Return a job of the project's own, in this process."""
    (folder / "work").mkdir(parents=True, exist_ok=True)
    described, runtime = config.model_dump(mode="json"), RUNTIME.model_dump(mode="json")
    return Job(name=name, config=described, runtime=runtime, inputs=inputs, output=folder, work=folder / "work")


def score_rewards(folder: Path, *, scorer: Path, rows: Path) -> None:
    """Score the rows' responses."""
    score.run(make_job("score_rewards", RewardScoreConfig(max_tokens=REWARD_TOKENS), folder, scorer=scorer, rows=rows))


def open_scorer(folder: Path) -> Any:
    """Return a reward model to score with."""
    return load_scorer(
        folder, render=RewardRender.text_pair, max_tokens=REWARD_TOKENS, precision=Precision.float32, device=CPU
    )


def pick_rows(folder: Path, *, split: str, limit: int) -> list[dict[str, Any]]:
    """Return the rows that the job `generate` answers at this limit, in the order of their ids."""
    chosen = generate.choose_rows(folder, config=GenerateConfig(split=split, limit=limit))
    rows = [row for row in iterate_rows(folder, split=split) if row["row_id"] in chosen]
    return sorted(rows, key=lambda row: row["row_id"])


def read_summary(folder: Path, *names: str) -> dict[str, Any]:
    """Return some figures of a job's summary."""
    summary = json.loads((folder / "summary.json").read_text())
    return {name: summary[name] for name in names}
