"""Arena-Hard 0.1: its questions, a baseline's answers and the judge's prompt, read from the files of its repository.

The folder holds `question.jsonl` (`uid`, `prompt`), `model_answer/<model>.jsonl` (plain or gzipped), `config/arena-hard-v0.1.yaml`
(`prompt_template`, `regex_patterns`) and `config/judge_system_prompt.txt`, the text that the repository keeps in its code.
Source: github lmarena/arena-hard-auto; arXiv 2406.11939.
"""

import io
import re
from pathlib import Path

import yaml

from evaluation.harness.mirror import find, parse, pick, read_jsonl, read_text
from evaluation.judges.prompt import JudgePrompt

QUESTIONS_FILE, CONFIG_FILE, SYSTEM_FILE = (
    "question.jsonl",
    "config/arena-hard-v0.1.yaml",
    "config/judge_system_prompt.txt",
)
UID = re.compile(r"[0-9a-f]{32}")
LABELS = ("[[A>>B]]", "[[A>B]]", "[[A=B]]", "[[B>A]]", "[[B>>A]]")


def read_questions(folder: Path) -> dict[str, str]:
    """Return the questions by id, sorted, which are 32 hex digits: they serve as row ids."""
    path = require(folder / QUESTIONS_FILE)
    rows = read_jsonl(path, fields=("uid", "prompt"))
    questions = {row["uid"]: row["prompt"] for row in rows}
    odd = [uid for uid in questions if not UID.fullmatch(uid)]
    if odd or len(questions) < len(rows):
        raise ValueError(
            f"{path}: {len(odd)} ids are not 32 hex digits and {len(rows) - len(questions)} are there twice; expected the "
            "repository's own file; fetch it again"
        )
    return dict(sorted(questions.items()))


def read_stored_answers(folder: Path, model: str) -> dict[str, str]:
    """Return a model's answers by question, as the repository stores them."""
    paths = find(folder / "model_answer", suffix=f"{model}.jsonl")
    paths = [path for path in paths if path.name.removesuffix(".gz") == f"{model}.jsonl"]
    if not paths:
        known = sorted({p.name.partition(".jsonl")[0] for p in find(folder / "model_answer", suffix=".jsonl")})
        raise ValueError(
            f"Arena-Hard {folder}: no answers of {model}; expected model_answer/{model}.jsonl, got {known}; fetch it, or name "
            "another baseline"
        )
    answers = {}
    for number, line in enumerate(io.StringIO(read_text(paths[0])), start=1):
        where = f"{paths[0]}:{number}"
        row = parse(line, where=where)
        turns = row.get("messages") if isinstance(row, dict) else None
        last = turns[-1].get("content") if isinstance(turns, list) and turns else None
        given = {"uid": row.get("uid"), "answer": last.get("answer")} if isinstance(last, dict) else row
        picked = pick(given, fields=("uid", "answer"), where=where)
        answers[picked["uid"]] = picked["answer"]
    return answers


def read_prompt(folder: Path) -> JudgePrompt:
    """Return the judge's prompt as the folder's files have it."""
    path = require(folder / CONFIG_FILE)
    said = yaml.safe_load(path.read_text())
    patterns = said.get("regex_patterns") if isinstance(said, dict) else None
    template = said.get("prompt_template") if isinstance(said, dict) else None
    if not isinstance(template, str) or not isinstance(patterns, list) or "{ANSWER_B}" not in template:
        raise ValueError(
            f"{path}: no prompt_template with regex_patterns; expected the repository's own file; fetch it again"
        )
    return JudgePrompt(
        name=path.stem,
        system=require(folder / SYSTEM_FILE).read_text(),
        template=template,
        patterns=tuple(patterns),
        labels=LABELS,
    )


def require(path: Path) -> Path:
    """Return a file that has to be there."""
    if not path.is_file():
        raise ValueError(
            f"Arena-Hard: no file {path}; expected the files of its repository; fetch them, or name their folder"
        )
    return path
