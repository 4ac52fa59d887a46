"""Judging by the command, on a real stack, with a real chat server as the judge."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from infra.settings import Settings
from infra.store import Store
from tests.evaluation.arena_files import write_arena
from tests.evaluation.chat_server import ChatServer, Hang, Messages, prefer_longer
from tests.faults.command import Command, record_of, small, words_of

KEY = "sk-never-to-be-seen-7777"
JUDGE = ("--judge", "endpoint:judge@2026")
QUICK = words_of({"runtime.patience_seconds": 1.0})


def write_bias(folder: Path, *, items: int) -> Path:
    """Write an EvalBiasBench whose better answer is the longer one; return the folder that holds it."""
    rows = [
        {
            "bias": "length bias",
            "instruction": f"{folder.name} {n}?",
            "response1": "long" * (n + 2),
            "response2": "s",
            "label": 1,
        }
        for n in range(items)
    ]
    (folder / "evalbiasbench").mkdir(parents=True)
    (folder / "evalbiasbench" / "biasbench.json").write_text(json.dumps({"length bias": rows}))
    return folder


def with_key(server: ChatServer) -> dict[str, str]:
    return {"VARFLOW_JUDGE_URL": server.url, "VARFLOW_JUDGE_API_KEY": KEY}


def test_a_judge_is_tested_and_a_larger_part_asks_only_what_is_new(
    varflow: Command, stack: Settings, store: Store, tmp_path: Path
) -> None:
    words = ("judge", "evalbiasbench", *JUDGE, "--files", str(write_bias(tmp_path / "files", items=5)))
    with ChatServer(prefer_longer) as server:
        part = varflow.ask(*words, "--limit", "2", **with_key(server))
        assert (part["scores"]["eval/evalbiasbench_part/accuracy"], len(server.answered)) == (1.0, 4)
        whole = varflow.ask(*words, **with_key(server))
        assert (whole["scores"]["eval/evalbiasbench/accuracy"], len(server.answered)) == (1.0, 10)
        again = varflow.run(*words, **with_key(server))
        assert len(server.answered) == 10 and "all 1 steps cached" in again.stdout and again.returncode == 0
        assert server.authorizations == {f"Bearer {KEY}"}
    found = whole["benchmarks"]["evalbiasbench"]
    assert (found["judge"], found["calls"], found["calls_now"]) == ("judge@2026", 10, 6)
    assert whole["scores"]["eval/evalbiasbench/length_bias/accuracy"] == 1.0
    record = record_of(store, whole, "judge")
    for name in [
        f"records/judge/{record.fingerprint}.json",
        *(f"{record.prefix}/{file.name}" for file in record.files),
    ]:
        written = store.get(name)
        assert written and KEY.encode() not in written[0]
    left = [path for path in stack.home.rglob("*") if path.is_file() and "prefect" not in path.parts]
    assert not [path for path in left if KEY.encode() in path.read_bytes()], "nor in any log"
    assert KEY not in again.stderr + again.stdout


def test_a_judge_that_draws_has_a_noise_floor(varflow: Command, store: Store, tmp_path: Path) -> None:
    words = ("judge", "evalbiasbench", *JUDGE, "--files", str(write_bias(tmp_path / "draws", items=2)))
    drawn = iter(["[[A>B]]", "[[B>A]]", "[[B>A]]", "[[A>B]]"] + ["[[A>B]]"] * 4)  # right, then wrong; the place
    often = words_of({"judging.repeats": 2, "judging.judge.temperature": 1.0, "runtime.concurrency": 1})
    with ChatServer(lambda _: next(drawn)) as server:
        told = varflow.ask(*words, *often, **with_key(server))
        shown = varflow.run(*words, *often, **with_key(server)).stdout
    floor = {"varied": "the judge's draw", "runs": 2, "flip_rate": 0.5, "max_difference": 0.5}
    assert told["noise"] == {"evalbiasbench": [floor]}
    metrics = record_of(store, told, "judge").summary["metrics"]
    assert metrics["noise/evalbiasbench/judge_max_difference"] == 0.5
    assert (
        "noise floor: evalbiasbench: 2 runs of the model alone that vary the judge's draw differ by up to 50.0" in shown
    )


def test_a_model_on_arena_hard(varflow: Command, done: dict[str, Any], tmp_path: Path) -> None:
    write_arena(tmp_path / "files" / "arena-hard-v0.1")
    brief = words_of({"answers.max_new_tokens": 4, "answers.max_prompt_tokens": 200, "runtime.threads": 1})
    words = ("judge", "arena_hard", "demo:tiny-policy", *JUDGE, "--files", str(tmp_path / "files"), *brief)
    with ChatServer(prefer_longer) as server:
        told = varflow.ask(*words, "--limit", "2", **with_key(server))
        assert 2 <= len(server.answered) <= 4
        assert "got the limit 5000, there are 3" in varflow.refuse(*words, "--limit", "5000", **with_key(server))
    assert [step["step"] for step in told["steps"]] == ["prompt_set", "generate", "judge"]
    scores, found = told["scores"], told["benchmarks"]["arena_hard_part"]
    assert scores["eval/arena_hard_part/win_rate_low"] <= scores["eval/arena_hard_part/win_rate"] == found["value"]
    assert (found["items"], found["mean_other_answer_chars"]) == (2, 10) and "unavailable" in found["style_control"]
    trained = next(f"train/{step['fingerprint']}" for step in done["steps"] if step["step"] == "train")
    other = ("judge", "arena_hard", trained, *words[3:], "--limit", "2")
    with ChatServer(prefer_longer) as server:
        judged = varflow.ask(*other, **with_key(server))
    compared = varflow.ask("compare", "demo:tiny-policy", trained, "--no-tokens")["comparison"]
    assert compared["length"]["n"] == 4, "answers to a judge's questions are no held-out answers"
    (wins,) = compared["judges"]
    assert (wins["what"], wins["n"], wins["unit"]) == ("arena_hard_part", 2, "questions")
    for level, of in zip(wins["levels"], (told, judged), strict=True):
        said = (of["scores"][f"eval/arena_hard_part/{name}"] for name in ("win_rate", "win_rate_low", "win_rate_high"))
        assert (level["value"], level["low"], level["high"]) == pytest.approx(tuple(said))
    with ChatServer(prefer_longer) as server:
        varflow.ask(*other[:-1], "1", **with_key(server))
    run = judged["mlflow_run"].partition("/runs/")[2].partition("?")[0]
    (of_the_run,) = varflow.ask("compare", "demo:tiny-policy", run, "--no-tokens")["comparison"]["judges"]
    assert of_the_run["levels"] == wins["levels"], "not those of a smaller part that was judged later"


def test_two_models_held_out_answers(varflow: Command, done: dict[str, Any]) -> None:
    champion, challenger = (f"generate/{step['fingerprint']}" for step in done["steps"] if step["step"] == "generate")
    with ChatServer(prefer_longer) as server:
        told = varflow.ask("judge", "heldout", challenger, "--against", champion, *JUDGE, **with_key(server))
        back = varflow.ask("judge", "heldout", champion, "--against", challenger, *JUDGE, **with_key(server))
        assert len(server.answered) <= 8, "the other way round the pairs are the same, and so are the calls"
    assert told["scores"]["eval/heldout/win_rate"] == pytest.approx(1 - back["scores"]["eval/heldout/win_rate"])
    assert told["benchmarks"]["heldout"]["items"] == 4


def test_a_recipe_with_a_judge_shows_its_win_rate_and_decides_as_without(
    varflow: Command, done: dict[str, Any]
) -> None:
    asked = {"judge": {"kind": "endpoint", "model": "judge", "revision": "recipe"}}
    assert "VARFLOW_JUDGE_URL: not set" in varflow.refuse("run", "smoke", *small(judge=asked))
    with ChatServer(prefer_longer) as server:
        told = varflow.ask("run", "smoke", *small(judge=asked), **with_key(server))
        assert 0 < len(server.answered) <= 8
    computed = [step["title"] for step in told["steps"] if not step["cached"]]
    assert computed == ["judge · heldout", "report"]
    assert (told["verdict"], told["reasons"]) == (done["verdict"], done["reasons"])
    page = Path(told["report"]).read_text()
    assert "Win rate by a judge" in page and "judge@recipe" in page and KEY not in page


def test_an_endpoint_that_dies_says_what_is_done_and_the_same_command_goes_on(varflow: Command, tmp_path: Path) -> None:
    words = ("judge", "evalbiasbench", *JUDGE, *QUICK, "--files", str(write_bias(tmp_path / "dying", items=6)))
    left, lock = iter(range(5)), threading.Lock()

    def dying(messages: Messages) -> str:
        with lock:
            if next(left, None) is None:
                raise Hang
        return prefer_longer(messages)

    with ChatServer(dying) as server:
        told = varflow.refuse(*words, **with_key(server))
    assert "the endpoint 127.0.0.1 did not answer within 1 s" in told
    assert "5 of 12 calls of this round are answered and kept; run the same again to go on" in told
    with ChatServer(prefer_longer) as server:
        found = varflow.ask(*words, **with_key(server))
        assert len(server.answered) == 7
    assert found["scores"]["eval/evalbiasbench/accuracy"] == 1.0


def test_what_is_not_said_is_asked_for(varflow: Command, tmp_path: Path) -> None:
    files = ("--files", str(write_bias(tmp_path / "files", items=2)))
    assert "VARFLOW_JUDGE_URL: not set" in varflow.refuse("judge", "evalbiasbench", *JUDGE, *files)
    assert "files is missing" in varflow.refuse("judge", "evalbiasbench", *JUDGE)
    assert "model is missing, against is missing" in varflow.refuse("judge", "heldout", *JUDGE)
    assert "judging.judge.endpoint.revision: String should have at least 1" in varflow.refuse(
        "judge", "llmbar", "--judge", "endpoint:x", *files
    )
    assert "Input should be 'arena_hard', " in varflow.refuse("judge", "arena", *JUDGE, *files)
