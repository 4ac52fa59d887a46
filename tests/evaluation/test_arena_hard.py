"""Arena-Hard 0.1 from its files: real rows where they are, and what is wrong with others said by name."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from evaluation.config import PromptSetConfig
from evaluation.eval_sets import write_prompts
from evaluation.judges.arena_hard import read_prompt, read_questions, read_stored_answers
from evaluation.judges.config import JudgeConfig, JudgeRuntime
from evaluation.judges.judging import run
from tests.evaluation.arena_files import write_arena
from tests.evaluation.chat_server import ChatServer, StandardInput, answers_of, prefer_longer
from training.data.rows import RowsWriter
from training.data.schema import SCHEMA
from training.job import Job

JUDGE = {"kind": "endpoint", "model": "judge", "revision": "2026"}


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    """Write an Arena-Hard of three questions in the repository's layout."""
    return write_arena(tmp_path / "arena")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """Serve a judge that prefers the longer answer."""
    with ChatServer(prefer_longer) as server:
        monkeypatch.setattr("sys.stdin", StandardInput(key="", url=server.url))
        yield server


def write_answers(
    folder: Path, questions: dict[str, str], answer: Callable[[str], str], *, samples: int = 1, cut: bool | None = None
) -> Path:
    """Write a policy's answers as the generate step leaves them; `cut` says whether the token limit ended them."""
    folder.mkdir()
    with RowsWriter(folder / "responses.parquet", SCHEMA) as out:
        for line, (uid, question) in enumerate(questions.items(), start=1):
            row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
            prompt = [{"role": "user", "content": question}]
            row |= {"row_id": uid, "split": "heldout", "prompt": prompt, "source": "policy"}
            row |= {"responses": [answer(uid)] * samples, "truncated": None if cut is None else [cut] * samples}
            out.write([row | {"line": line}])
    return folder


def make_job(folder: Path, *, files: Path, answers: Path, **config: Any) -> Job:
    path = folder / "job.json"
    folder.mkdir()
    job = {
        "job": "judge",
        "config": JudgeConfig.model_validate({"benchmark": "arena_hard", "judge": JUDGE} | config).model_dump(
            mode="json"
        ),
        "runtime": JudgeRuntime(patience_seconds=5).model_dump(mode="json"),
        "inputs": {"benchmark": str(files), "answers": str(answers)}
        | {f"{who}_answers": str(answers / who) for who in ("challenger", "champion")},
        "output": str(folder / "output"),
        "work": str(folder / "work"),
    }
    path.write_text(json.dumps(job))
    return Job.read(path)


def read_summary(job: Job) -> dict[str, Any]:
    return dict(json.loads((job.output / "summary.json").read_text()))


def test_a_model_against_the_baseline(arena: Path, endpoint: ChatServer, tmp_path: Path) -> None:
    questions = read_questions(arena)
    answers = write_answers(
        tmp_path / "answers", questions, lambda uid: "x" if uid.endswith("1") else "a longer answer"
    )
    job = make_job(tmp_path / "job", files=arena, answers=answers)
    run(job)
    found = read_summary(job)
    assert found["value"] == pytest.approx(2 / 3) and (found["items"], found["judge"]) == (3, "judge@2026")
    assert found["style_control"].startswith("unavailable") and found["mean_other_answer_chars"] == len("baseline 1")
    (row,) = json.loads((job.output / "scores.json").read_text())
    assert (row["benchmark"], row["task"], row["filter"]) == ("arena_hard", "against gpt-4-0314", "judge judge@2026")
    assert row["low"] <= row["value"] <= row["high"] and row["task_version"].startswith("arena-hard-v0.1 ")
    assert {messages[0]["content"] for messages in endpoint.answered} == {"Be fair."}


def test_a_part_is_named_as_one(arena: Path, endpoint: ChatServer, tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers", read_questions(arena), str)
    job = make_job(tmp_path / "job", files=arena, answers=answers, limit=2)
    run(job)
    assert (read_summary(job)["benchmark"], read_summary(job)["items"]) == ("arena_hard_part", 2)
    assert sorted({messages[1]["content"][16:26] for messages in endpoint.answered}) == ["Question 1", "Question 2"]


def test_a_limit_beyond_the_questions_names_no_part(arena: Path, endpoint: ChatServer, tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers", read_questions(arena), str)
    with pytest.raises(ValueError, match=r"arena_hard: questions: got the limit 4, there are 3; lower it, or leave it"):
        run(make_job(tmp_path / "job", files=arena, answers=answers, limit=4))
    assert not endpoint.asked


def test_all_won_is_no_certainty_and_three_questions_are_few(arena: Path, endpoint: ChatServer, tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers", read_questions(arena), lambda _: "the longest answer", cut=True)
    job = make_job(tmp_path / "job", files=arena, answers=answers)
    run(job)
    found = read_summary(job)
    assert (found["value"], found["stderr"], found["high"]) == (1.0, None, 1.0)
    assert found["low"] == pytest.approx(0.43850, abs=1e-5), "Wilson's of 3 of 3"
    assert (found["cut_answers"], found["cut_other_answers"]) == (3, 0)
    assert found["flag"] == (
        "few: 3 questions say little; expected 30 or more; "
        "limit: 3 of 3 answers of the model were ended by the token limit (max_new_tokens)"
    )


def test_two_models_held_out_answers_sample_by_sample(endpoint: ChatServer, tmp_path: Path) -> None:
    asked = {f"{n:032x}": f"Question {n}" for n in range(4)}
    (tmp_path / "answers").mkdir()
    write_answers(tmp_path / "answers" / "challenger", asked, lambda _: "longer", samples=2, cut=False)
    write_answers(tmp_path / "answers" / "champion", asked, lambda _: "short", samples=2, cut=True)
    job = make_job(tmp_path / "job", files=tmp_path, answers=tmp_path / "answers", benchmark="heldout", limit=3)
    run(job)
    found = read_summary(job)
    assert (found["value"], found["items"], found["questions"], found["cut_other_answers"]) == (1.0, 6, 3, 6)
    assert "6 of 6 answers of the champion were ended by the token limit" in found["flag"]


def test_held_out_answers_that_are_not_to_the_same_are_refused_in_words(endpoint: ChatServer, tmp_path: Path) -> None:
    asked = {f"{n:032x}": f"Question {n}" for n in range(2)}
    for name, theirs, samples, told in (
        ("often", asked, 1, r"row 0{32} has 2 answers of the challenger and 1 of the champion; expected as many; gen"),
        ("other", asked | {f"{1:032x}": "Other"}, 2, r"row 0{31}1 is 'Question 1' for the challenger and 'Other' for"),
    ):
        answers = tmp_path / name
        answers.mkdir()
        write_answers(answers / "challenger", asked, str, samples=2)
        write_answers(answers / "champion", theirs, str, samples=samples)
        with pytest.raises(ValueError, match=told):
            run(make_job(tmp_path / f"job {name}", files=tmp_path, answers=answers, benchmark="heldout"))
    write_answers(tmp_path / "beyond", asked, str)
    (tmp_path / "both").mkdir()
    for who in ("challenger", "champion"):
        (tmp_path / "both" / who).symlink_to(tmp_path / "beyond")
    with pytest.raises(ValueError, match=r"heldout: prompts: got the limit 3, there are 2"):
        run(make_job(tmp_path / "job", files=tmp_path, answers=tmp_path / "both", benchmark="heldout", limit=3))
    assert not endpoint.asked


def test_a_question_without_answer_is_no_smaller_benchmark(arena: Path, endpoint: ChatServer, tmp_path: Path) -> None:
    questions = read_questions(arena)
    questions.pop(f"{2:032x}")
    answers = write_answers(tmp_path / "answers", questions, str)
    with pytest.raises(ValueError, match=r"1 of 3 questions have no answer of the model \(first: 0+2\)"):
        run(make_job(tmp_path / "job", files=arena, answers=answers))
    assert not endpoint.asked


def test_what_is_missing_is_named(arena: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no answers of gpt-5; expected model_answer/gpt-5.jsonl, got \['gpt-4-0314'\]"
    ):
        read_stored_answers(arena, "gpt-5")
    (arena / "config" / "judge_system_prompt.txt").unlink()
    with pytest.raises(ValueError, match=r"no file .*judge_system_prompt.txt"):
        read_prompt(arena)
    (arena / "question.jsonl").write_text('{"uid": "1", "prompt": "q"}\n')
    with pytest.raises(ValueError, match="1 ids are not 32 hex digits"):
        read_questions(arena)


def test_the_real_files(real_data: Path, endpoint: ChatServer, tmp_path: Path) -> None:
    """500 questions, the stored answers of two models, the judge's own prompt; the verdict is the rule's, counted here by hand."""
    folder = real_data / "arena-hard-v0.1"
    questions = read_questions(folder)
    baseline, other = (read_stored_answers(folder, name) for name in ("gpt-4-0314", "gpt-3.5-turbo-0125"))
    assert len(questions) == 500 and questions.keys() == baseline.keys() == other.keys()
    counts = write_prompts(folder, PromptSetConfig(name="arena_hard"), output=tmp_path)
    assert counts == {"read": 500, "unusable": 0, "repeated": 0, "rows": 500}
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["row_id"] for row in rows] == list(questions) and rows[0]["prompt"][0]["content"] == questions[
        rows[0]["row_id"]
    ]
    answers = write_answers(tmp_path / "answers", questions, other.__getitem__)
    job = make_job(tmp_path / "job", files=folder, answers=answers, limit=60)
    run(job)
    found = read_summary(job)
    asked = list(questions)[:60]
    wins = sum(len(other[uid]) > len(baseline[uid]) for uid in asked)
    ties = sum(len(other[uid]) == len(baseline[uid]) for uid in asked)
    assert found["value"] == pytest.approx((wins + ties / 2) / 60)
    assert (found["longer_wins"], found["position_bias"], found["unparseable_pairs"]) == (1.0, 0.0, 0)
    shown = {answers_of(messages) for messages in endpoint.answered}
    assert shown == {pair for uid in asked for pair in ((other[uid], baseline[uid]), (baseline[uid], other[uid]))}
    prompt = read_prompt(folder)
    assert prompt.read("My final verdict is tie: [[A=B]].") == 0 and prompt.read("[A>>B]") == 2
    assert "impartial judge" in prompt.system


@pytest.mark.parametrize(("name", "items"), [("evalbiasbench", 80), ("llmbar", 419)])
def test_the_real_sets_that_test_judges(
    real_data: Path, endpoint: ChatServer, tmp_path: Path, name: str, items: int
) -> None:
    job = make_job(tmp_path / "job", files=real_data / name, answers=tmp_path, benchmark=name)
    run(job)
    found, rows = read_summary(job), json.loads((job.output / "scores.json").read_text())
    assert found["items"] == items == sum(row["n"] for row in rows if not row["decides"])
    assert len(endpoint.answered) <= 2 * items and found["longer_wins"] == 1.0
    if name == "evalbiasbench":
        assert found["accuracy_length bias"] < 0.1, "the longer answer is the trap"
