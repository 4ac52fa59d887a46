"""Files of a small Arena-Hard in its repository's layout."""

import gzip
import json
from pathlib import Path


def write_arena(folder: Path) -> Path:
    """Write three questions with a baseline's answers and the judge's prompt; return the folder."""
    (folder / "config").mkdir(parents=True)
    (folder / "model_answer").mkdir()
    uids = [f"{n:032x}" for n in (3, 1, 2)]
    rows = [
        {"uid": uid, "category": "arena-hard-v0.1", "cluster": "c", "prompt": f"Question {uid[-1]}"} for uid in uids
    ]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(folder / "model_answer" / "gpt-4-0314.jsonl.gz", "wt") as out:
        for uid in uids:
            turns = [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": {"answer": f"baseline {uid[-1]}"}},
            ]
            out.write(json.dumps({"uid": uid, "model": "gpt-4-0314", "messages": turns}) + "\n")
    template = "<|User Prompt|>\\n{QUESTION}\\n\\n<|The Start of Assistant A's Answer|>\\n{ANSWER_A}\\n<|The End of Assistant A's Answer|>\\n\\n<|The Start of Assistant B's Answer|>\\n{ANSWER_B}\\n<|The End of Assistant B's Answer|>"
    (folder / "config" / "arena-hard-v0.1.yaml").write_text(
        f'regex_patterns:\n  - \\[\\[([AB<>=]+)\\]\\]\n  - \\[([AB<>=]+)\\]\nprompt_template: "{template}"\n'
    )
    (folder / "config" / "judge_system_prompt.txt").write_text("Be fair.")
    return folder
