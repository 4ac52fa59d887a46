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

A folder that `varflow mirror datasets` made has `datasets/ORG/NAME/COMMIT/`: hub repositories, taken as they are. Both may lie in one
folder. Any subset of benchmarks, subjects and tasks may be there; `missing_data` says what a suite lacks.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from evaluation.config import BenchmarkConfig
from evaluation.harness import stock
from evaluation.harness.stock import Need

MMLU, GSM8K, HUMANEVAL, BBH = "cais/mmlu", "openai/gsm8k", "openai/openai_humaneval", "SaylorTwift/bbh"
FILL = "add their raw files, or fetch them (`varflow mirror datasets --for-task TASK --to FOLDER`)"
MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
MMLU_SPLITS = {"test": "test", "dev": "dev", "val": "validation"}
HUMANEVAL_CONFIG = "openai_humaneval"
GSM8K_TASKS = ("gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot", "gsm8k_cot_llama")

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

DATA = {
    ".parquet",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".txt",
    ".arrow",
    ".gz",
    ".zst",
    ".xz",
    ".zip",
}  # as `datasets` reads them

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
        write_headers(built, names=rows)
        for repository, copy in find_repositories(raw).items():
            rows |= take_repository(copy, built, repository=repository)
        if not rows:
            raise ValueError(
                f"raw benchmark data {raw}: nothing found; expected at least one of mmlu/data/test/*.csv, gsm8k/test.jsonl, "
                "humaneval/HumanEval.jsonl, bbh/bbh/*.json (each may end in .gz), datasets/ORG/NAME/COMMIT/; check the folder"
            )
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
    for number, line in enumerate(io.StringIO(read_text(path)), start=1):
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


def find_repositories(raw: Path) -> dict[str, Path]:
    """Return the folder of each hub repository below `raw/datasets`, by the repository's name; two commits of one are refused."""
    found: dict[str, Path] = {}
    for path in sorted((*raw.glob("datasets/*/*"), *raw.glob("datasets/*/*/*"))):
        if not (path.is_dir() and re.fullmatch(r"[0-9a-f]{40}", path.name)):
            continue
        repository = path.parent.relative_to(raw / "datasets").as_posix()
        if repository in found:
            raise ValueError(
                f"benchmark data {raw}: {repository} is there at the commits {found[repository].name} and {path.name}; keep one of "
                "the folders, or name the commit in benchmarks:ORG/NAME@COMMIT"
            )
        found[repository] = path
    return found


def take_repository(copy: Path, mirror: Path, *, repository: str) -> dict[str, int]:
    """Copy a hub repository's visible files into the mirror; return rows by file, 0 for what is no Parquet."""
    target = mirror / repository
    if target.exists():
        raise ValueError(
            f"benchmark data: {repository} is there as raw files and as the hub repository {copy}; keep one of them"
        )
    shutil.copytree(copy, target, ignore=shutil.ignore_patterns(".*"))
    files = sorted(path for path in target.rglob("*") if path.is_file())
    return {
        path.relative_to(mirror).as_posix(): pq.read_metadata(path).num_rows if path.suffix == ".parquet" else 0
        for path in files
    }


def read_header(repository: Path) -> dict[str, dict[str, list[str]]]:
    """Return {configuration: {split: patterns of its files}} as the YAML header of a data set's README.md says; {} where none does."""
    readme = repository / "README.md"
    header = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL) if readme.is_file() else None
    configs = (yaml.safe_load(header[1]) or {}).get("configs") or [] if header else []
    found: dict[str, dict[str, list[str]]] = {}
    for config in (config for config in configs if "data_files" in config):
        names = [str(config.get("config_name", "default")), *(["default"] if config.get("default") else [])]
        found |= dict.fromkeys(names, list_patterns(config["data_files"]))
    return found


def list_patterns(data_files: Any) -> dict[str, list[str]]:
    """Return {split: patterns} of the forms that `data_files` may have."""
    if isinstance(data_files, Mapping):
        splits: dict[str, Any] = dict(data_files)
    elif data_files and isinstance(data_files, list) and isinstance(data_files[0], Mapping):
        splits = {item["split"]: item["path"] for item in data_files}
    else:
        splits = {"train": data_files}
    return {split: [paths] if isinstance(paths, str) else list(paths) for split, paths in splits.items()}


def digest_mirror(folder: Path) -> str:
    """Return 64 hex digits of SHA-256 over every file's name and content, sorted by name."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def missing_data(folder: Path, benchmarks: Iterable[BenchmarkConfig]) -> list[str]:
    """Return every file of the mirror that these benchmarks need and that is not there, sorted; empty when all is well.

    A task that does not exist, or that cannot be run here, appears as a sentence of its own.
    """
    needed: set[Need] = set()
    unknown: set[str] = set()
    for task in {task for benchmark in benchmarks for task in benchmark.tasks}:
        try:
            needed.update(needed_data(task))
        except ValueError as error:
            unknown.add(str(error))
    headers = {need.repository: read_header(folder / need.repository) for need in needed}
    lacking = [need for need in needed if not is_held(need, folder / need.repository, headers[need.repository])]
    names = {need.file for need in lacking}
    names |= {name for need in lacking if not (folder / (name := f"{need.repository}/README.md")).is_file()}
    return sorted(names) + sorted(unknown)


def is_held(need: Need, repository: Path, header: Mapping[str, Mapping[str, list[str]]]) -> bool:
    """Tell whether a data set's folder has a split; where its header names no files, whether it has data at all."""
    if not header:
        return any(path.suffix in DATA for path in repository.rglob("*"))
    config = need.config or ("default" if "default" in header or len(header) > 1 else next(iter(header)))
    patterns = header.get(config, {}).get(need.split, [])
    return any(path.is_file() for pattern in patterns for path in repository.glob(pattern))


def needed_data(task: str) -> list[Need]:
    """Return what an lm-eval task, or the tasks of a group, read. Raises ValueError for one that is unknown or cannot be run here."""
    known = known_data(task)
    if known:
        return known
    tasks = stock.read_tasks(task)
    refusals = {one.name: reason for one in tasks if (reason := one.refusal())}
    if refusals:
        name, reason = next(iter(refusals.items()))
        within = f" of the group {task}" if task != name else ""
        raise ValueError(f"task {name!r}{within} cannot be run here: it {reason}")
    return [need for one in tasks for need in one.needs()]


def known_data(task: str) -> list[Need]:
    """Return what a task of the four benchmarks reads, without a look at any file; empty for another one."""
    if task in GSM8K_TASKS:
        return [Need(GSM8K, "main", split) for split in ("train", "test")]
    if task in stock.SANDBOXED:
        return [Need(HUMANEVAL, HUMANEVAL_CONFIG, "test")]
    if task == "mmlu" or (subject := task.removeprefix("mmlu_")) in MMLU_SUBJECTS:
        subjects = MMLU_SUBJECTS if task == "mmlu" else [subject]
        return [Need(MMLU, name, split) for name in subjects for split in ("dev", "test")]
    bbh = re.fullmatch(r"bbh(?:_cot)?_(?:few|zero)shot(?:_(\w+))?", task)
    if bbh and (bbh[1] is None or bbh[1] in BBH_TASKS):
        return [Need(BBH, name, "test") for name in ([bbh[1]] if bbh[1] else BBH_TASKS)]
    return []
