"""What each step's result follows from, as a digest of its sources: comments, docstrings and white space do not count.

`python -m tests.golden.step_sources` writes the digests of today. Do that after raising a step's version, or, with the
version as it was, to declare that a change of the code does not change what comes out.
"""

import ast
import hashlib
import io
import json
import tokenize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = Path(__file__).with_name("step_sources.json")
PACKAGES = ("training", "evaluation")
ENTRIES = {
    "ingest": "training/data/ingest.py",
    "reward_model": "training/reward_model.py",
    "score_rewards": "training/reward/score.py",
    "score_reference": "training/reference.py",
    "score_cross": "training/cross.py",
    "score_tokens": "training/token_scores.py",
    "train": "training/train.py",
    "generate": "training/generate.py",
    "mirror": "evaluation/harness/mirror.py",
    "evaluate": "evaluation/harness/benchmark.py",
    "judge": "evaluation/judges/judging.py",
    "evaluate_varied": "evaluation/harness/benchmark.py",
    "noise": "evaluation/gate/decide.py",
    "gate": "evaluation/gate/decide.py",
    "report": "evaluation/pages/report.py",
    "contamination": "evaluation/harness/contamination.py",
    "compare": "evaluation/pages/comparison_page.py",
    "prompt_set": "evaluation/eval_sets.py",
    "pair_set": "evaluation/eval_sets.py",
    "alignment": "evaluation/alignment.py",
    "reward_bias": "evaluation/reward_bias.py",
}
HOW_NOT_WHAT = {"training/job.py", "training/metrics.py", "evaluation/harness/watch.py"}  # how work is run and shown


def read_steps() -> dict[str, int]:
    """Return the version of every step."""
    import tasks.alignment
    import tasks.compare
    import tasks.contamination
    import tasks.evaluate
    import tasks.gate
    import tasks.generate
    import tasks.ingest
    import tasks.judge
    import tasks.noise
    import tasks.report
    import tasks.reward_model
    import tasks.score
    import tasks.train
    from tasks.step import Step

    modules = (
        tasks.alignment, tasks.compare, tasks.contamination, tasks.evaluate, tasks.gate, tasks.generate, tasks.ingest, tasks.judge,
        tasks.noise, tasks.report, tasks.reward_model, tasks.score, tasks.train,
    )  # fmt: skip
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Step)]
    return {step.name: step.version for step in found}


def digest_sources(entry: str) -> str:
    """Return the digest of a module and of all it imports from our packages, directly or not."""
    seen: set[str] = set()
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name in seen or name in HOW_NOT_WHAT:
            continue
        seen.add(name)
        waiting += imported(ROOT / name)
    trees = {name: hashlib.sha256(strip(ROOT / name).encode()).hexdigest() for name in sorted(seen)}
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()


def imported(path: Path) -> list[str]:
    """Return the files of ours that a module imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    files = [name.replace(".", "/") + ".py" for name in names if name.split(".")[0] in PACKAGES]
    return [name for name in files if (ROOT / name).is_file()]


def strip(path: Path) -> str:
    """Return a module's text without comments, docstrings and white space. No syntax tree: its print changes with Python."""
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "\n"
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and body
            and ast.get_docstring(node, clean=False)
        ):
            for row in range(body[0].lineno, (body[0].end_lineno or 0) + 1):
                lines[row - 1] = ""
    return "".join("".join(lines).split())


def describe() -> dict[str, dict[str, Any]]:
    """Return version and digest of every step."""
    versions = read_steps()
    return {
        name: {"version": versions[name], "sources": digest_sources(entry)} for name, entry in sorted(ENTRIES.items())
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(describe(), indent=1) + "\n")
