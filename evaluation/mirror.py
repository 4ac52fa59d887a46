"""Build and check an offline mirror of benchmark data, laid out so that lm-eval's stock tasks read it unmodified.

Given a relative folder name, `datasets.load_dataset("cais/mmlu", "anatomy")` takes the folder `cais/mmlu` of the working
directory when there is one. So a mirror holds, for each hub repository, parquet files and a README.md whose YAML header
names them; the harness loads its tasks with the mirror as working directory, and no socket is opened.

Raw files are taken in the formats in which their authors published them, each plain or gzipped:

| benchmark | below the raw folder | format |
|---|---|---|
| MMLU | `mmlu/data/{test,dev,val}/<subject>_{test,dev,val}.csv` | question, four choices, answer: a letter without a header line (hendrycks/test), or an index under `question,choice0..3,answer` |
| GSM8K | `gsm8k/{train,test}.jsonl` | `question`, `answer` |
| HumanEval | `humaneval/HumanEval.jsonl` | `task_id`, `prompt`, `canonical_solution`, `test`, `entry_point` |
| BBH | `bbh/bbh/<task>.json` | `examples`: list of `input`, `target` |

Any subset of benchmarks, subjects and tasks may be there; `missing_data` says what a suite lacks.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.config import BenchmarkConfig

MMLU, GSM8K, HUMANEVAL, BBH = "cais/mmlu", "openai/gsm8k", "openai/openai_humaneval", "SaylorTwift/bbh"
MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
MMLU_SPLITS = {"test": "test", "dev": "dev", "val": "validation"}
HUMANEVAL_CONFIG = "openai_humaneval"
GSM8K_TASKS = ("gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot", "gsm8k_cot_llama")
HUMANEVAL_TASKS = ("humaneval", "humaneval_instruct")

SUBJECT_NAMES = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security
    conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
    high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
    high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence
    logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes
    moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine
    professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions
"""
MMLU_SUBJECTS = tuple(SUBJECT_NAMES.split())

BBH_NAMES = """
    boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting
"""
BBH_TASKS = tuple(BBH_NAMES.split())

Row = dict[str, Any]


def build_mirror(raw: Path, mirror: Path) -> dict[str, int]:
    """Turn the raw files below `raw` into the folder `mirror`, whole or not at all; return rows by file of the mirror.

    An existing mirror is replaced. A build that was killed leaves a folder `.<name>-*` beside it and nothing else.
    ValueError names the file and line of a row that is not in its benchmark's format.
    """
    mirror.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=mirror.parent, prefix=f".{mirror.name}-") as scratch:
        built = Path(scratch) / "new"
        rows = {}
        for name, table in read_raw(raw):
            path = built / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(table), path)
            rows[name] = len(table)
        if not rows:
            raise ValueError(
                f"raw benchmark data {raw}: nothing found; expected at least one of mmlu/data/test/*.csv, "
                "gsm8k/test.jsonl, humaneval/HumanEval.jsonl, bbh/bbh/*.json (each may end in .gz); check the folder"
            )
        write_headers(built, names=rows)
        if mirror.exists():
            mirror.rename(Path(scratch) / "old")
        built.rename(mirror)
    return rows


def read_raw(raw: Path) -> Iterator[tuple[str, list[Row]]]:
    """Yield (file name in the mirror, its rows) for every raw file that is there."""
    for folder, split in MMLU_SPLITS.items():
        for path in find(raw / "mmlu" / "data" / folder, suffix=f"_{folder}.csv"):
            subject = stem(path).removesuffix(f"_{folder}")
            yield f"{MMLU}/{subject}/{split}.parquet", read_mmlu(path, subject=subject)
    for split in ("train", "test"):
        for path in find(raw / "gsm8k", suffix=f"{split}.jsonl"):
            yield f"{GSM8K}/main/{split}.parquet", read_jsonl(path, fields=("question", "answer"))
    for path in find(raw / "humaneval", suffix="HumanEval.jsonl"):
        fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        yield f"{HUMANEVAL}/{HUMANEVAL_CONFIG}/test.parquet", read_jsonl(path, fields=fields)
    for path in find(raw / "bbh" / "bbh", suffix=".json"):
        yield f"{BBH}/{stem(path)}/test.parquet", read_bbh(path)


def find(folder: Path, *, suffix: str) -> list[Path]:
    """Return the files of a folder that end in `suffix`, or in it and `.gz`, by name; both at once is refused."""
    if not folder.is_dir():
        return []
    paths = sorted(p for p in folder.iterdir() if p.name.removesuffix(".gz").endswith(suffix))
    names = [p.name.removesuffix(".gz") for p in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"raw benchmark data {folder}: {', '.join(twice)} is there plain and gzipped; keep one")
    return paths


def stem(path: Path) -> str:
    """Return the file's name without .gz and without its format's suffix."""
    return path.name.removesuffix(".gz").rpartition(".")[0]


def read_text(path: Path) -> str:
    """Return the file's text, unpacked where it ends in .gz."""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()


def read_mmlu(path: Path, *, subject: str) -> list[Row]:
    """Return rows `question`, `subject`, `choices` (4), `answer` (index) of one subject's file."""
    rows = []
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    for fields in reader:
        if fields == MMLU_HEADER or not fields:
            continue
        answer = fields[-1].strip()
        index = "ABCD".find(answer) if answer.isalpha() else int(answer) if answer.isdecimal() else -1
        if len(fields) != 6 or not 0 <= index <= 3:
            raise ValueError(
                f"{path}:{reader.line_num}: got {len(fields)} fields with the answer {answer!r}; "
                "expected question, four choices and A-D or 0-3; fix or remove the row"
            )
        rows.append({"question": fields[0], "subject": subject, "choices": fields[1:5], "answer": index})
    return require_rows(rows, path)


def read_jsonl(path: Path, *, fields: tuple[str, ...]) -> list[Row]:
    """Return one row of the named text fields for each line."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            rows.append(pick(parse(line, where=f"{path}:{number}"), fields=fields, where=f"{path}:{number}"))
    return require_rows(rows, path)


def read_bbh(path: Path) -> list[Row]:
    """Return rows `input`, `target` of one task's file."""
    content = parse(read_text(path), where=str(path))
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list):
        raise ValueError(f"{path}: no list `examples`; expected the upstream file of a BIG-Bench Hard task")
    rows = [pick(e, fields=("input", "target"), where=f"{path}, example {i}") for i, e in enumerate(examples)]
    return require_rows(rows, path)


def parse(text: str, *, where: str) -> Any:
    """Return the JSON value of a text, or raise ValueError with its place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); fix or remove it") from error


def pick(value: Any, *, fields: tuple[str, ...], where: str) -> Row:
    """Return the named text fields of an object, or raise ValueError naming what is not there."""
    lacking = [f for f in fields if not isinstance(value, dict) or not isinstance(value.get(f), str)]
    if lacking:
        raise ValueError(f"{where}: no text under {', '.join(lacking)}; expected {', '.join(fields)}")
    return {f: value[f] for f in fields}


def require_rows(rows: list[Row], path: Path) -> list[Row]:
    """Return the rows, or raise ValueError when there are none."""
    if not rows:
        raise ValueError(f"{path}: no rows; expected at least one; remove the file or fill it")
    return rows


def write_headers(mirror: Path, *, names: Iterable[str]) -> None:
    """Write each repository's README.md, whose YAML header tells `datasets` which file is which split of which config."""
    configs: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names):
        repository, config, _ = name.rsplit("/", 2)
        configs.setdefault(repository, {}).setdefault(config, []).append(Path(name).stem)
    for repository, splits in configs.items():
        lines = ["---", "configs:"]
        for config, present in splits.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split in present:
                lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        (mirror / repository / "README.md").write_text("\n".join([*lines, "---", ""]))


def digest_mirror(folder: Path) -> str:
    """Return 64 hex digits of SHA-256 over every file's name and content, sorted by name."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def missing_data(folder: Path, benchmarks: Iterable[BenchmarkConfig]) -> list[str]:
    """Return every file of the mirror that these benchmarks need and that is not there, sorted; empty when all is well.

    A task whose data no mirror holds appears as a sentence of its own.
    """
    needed: set[str] = set()
    unknown: set[str] = set()
    for task in {task for benchmark in benchmarks for task in benchmark.tasks}:
        files = needed_files(task)
        needed.update(files)
        if not files:
            near = difflib.get_close_matches(task, known_tasks(), n=3)
            unknown.add(f"data of task {task!r}, which no mirror holds (nearest: {', '.join(near) or 'none'})")
    needed |= {f"{name.rsplit('/', 2)[0]}/README.md" for name in needed}
    return sorted(name for name in needed if not (folder / name).is_file()) + sorted(unknown)


def known_tasks() -> list[str]:
    """Return the stock tasks that a mirror is made for, to suggest one for a misspelt name."""
    subjects = [f"mmlu_{name}" for name in MMLU_SUBJECTS]
    return [
        "mmlu",
        *subjects,
        *GSM8K_TASKS,
        *HUMANEVAL_TASKS,
        "bbh_cot_fewshot",
        *(f"bbh_cot_fewshot_{t}" for t in BBH_TASKS),
    ]


def needed_files(task: str) -> list[str]:
    """Return the mirror's files that an lm-eval task reads; empty for a task of another benchmark."""
    if task in GSM8K_TASKS:
        return [f"{GSM8K}/main/{split}.parquet" for split in ("train", "test")]
    if task in HUMANEVAL_TASKS:
        return [f"{HUMANEVAL}/{HUMANEVAL_CONFIG}/test.parquet"]
    if task == "mmlu" or (subject := task.removeprefix("mmlu_")) in MMLU_SUBJECTS:
        subjects = MMLU_SUBJECTS if task == "mmlu" else [subject]
        return [f"{MMLU}/{name}/{split}.parquet" for name in subjects for split in ("dev", "test")]
    bbh = re.fullmatch(r"bbh(?:_cot)?_(?:few|zero)shot(?:_(\w+))?", task)
    if bbh and (bbh[1] is None or bbh[1] in BBH_TASKS):
        return [f"{BBH}/{name}/test.parquet" for name in ([bbh[1]] if bbh[1] else BBH_TASKS)]
    return []
