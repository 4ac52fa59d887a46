"""What lm-eval's stock tasks say of themselves: which data they read, and why some cannot be run here.

Read from their YAML files, since importing lm-eval and indexing its 14,000 files takes ten seconds; only evaluation/harness/run.py runs them.
"""

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from evaluation.config import HARNESS_VERSION

SANDBOXED = ("humaneval", "humaneval_instruct")  # the tasks whose programs run in evaluation/harness/sandbox.py
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
NAME = re.compile(rb"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([\w.:+-]+)[\"']?[ \t]*$", re.MULTILINE)
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
LOADERS = {"json", "csv", "parquet", "arrow", "text", "pandas", "webdataset", "imagefolder", "audiofolder"}
RUNS_CODE = {"exec", "eval", "system", "popen"}


@dataclass(frozen=True)
class Need:
    """One split of one configuration of a hub data set; None stands for a data set's own default."""

    repository: str
    config: str | None
    split: str

    @property
    def file(self) -> str:
        """Where a mirror built of raw files has it; in a hub repository the file may have another name."""
        return f"{self.repository}/{self.config or 'default'}/{self.split}.parquet"


@dataclass(frozen=True)
class StockTask:
    """One task as its YAML file has it, what it includes merged in, functions as `!function module.name`."""

    name: str
    folder: Path
    config: Mapping[str, Any]

    def needs(self) -> list[Need]:
        """Return the data it reads."""
        splits = {str(self.config[key]).partition("[")[0] for key in SPLITS if self.config.get(key)}
        config = self.config.get("dataset_name")
        return [
            Need(str(self.config["dataset_path"]), None if config is None else str(config), split)
            for split in sorted(splits)
        ]

    def refusal(self) -> str | None:
        """Return why it cannot be run here; None where it can."""
        path = str(self.config.get("dataset_path") or "")
        if "class" in self.config or "custom_dataset" in self.config:
            return "is made by code of its own, which does not say what data it reads"
        if not REPOSITORY.fullmatch(path) or path in LOADERS:
            return f"reads {path or 'no data set'!r}, which is no repository of the hub"
        if self.config.get("output_type") == "loglikelihood_rolling":
            return "measures perplexity, which is no score of items from 0 to 1"
        if "doc_to_image" in self.config or "doc_to_audio" in self.config:
            return "asks about images or sounds, and models here read text"
        if self.name not in SANDBOXED and (self.config.get("unsafe_code") or runs_code(self.folder, self.config)):
            return f"runs code outside of our sandbox, in which only {' and '.join(SANDBOXED)} run"
        return None


def read_tasks(name: str) -> list[StockTask]:
    """Return the task of a name, or the tasks of a group. Raises ValueError, with names near it, where there is none."""
    path = list_names().get(name)
    if path is None:
        near = difflib.get_close_matches(name, list_names(), n=3)
        raise ValueError(
            f"task {name!r}: lm-eval {HARNESS_VERSION} has no task or group of this name (nearest: {', '.join(near) or 'none'})"
        )
    config = read_config(path)
    if "group" not in config:
        return [StockTask(name, path.parent, config)]
    return list(_read_members(name, path, config))


def _read_members(group: str, path: Path, config: Mapping[str, Any]) -> Iterator[StockTask]:
    for member in config["task"] if isinstance(config["task"], list) else [config["task"]]:
        if isinstance(member, str) and member in list_names():
            yield from read_tasks(member)
        elif isinstance(member, str):
            yield from _read_tag(member, path.parent)
        elif isinstance(member.get("task"), str) and member["task"] in list_names():
            yield from (
                StockTask(task.name, task.folder, {**task.config, **member}) for task in read_tasks(member["task"])
            )
        elif isinstance(member.get("task"), str):
            yield StockTask(f"{group}::{member['task']}", path.parent, member)
        else:
            yield from _read_members(group, path, member)


def _read_tag(tag: str, folder: Path) -> Iterator[StockTask]:
    """Yield the tasks of a group's folder that bear a tag, which is how some groups name their members."""
    for path in sorted(folder.rglob("*.yaml")):
        config = read_config(path)
        tags = config.get("tag") or []
        if "group" not in config and tag in (tags if isinstance(tags, list) else [tags]):
            yield StockTask(config["task"], path.parent, config)


def find_folders(names: tuple[str, ...]) -> list[Path]:
    """Return the folders in which these tasks and groups, and the members of groups, are."""
    members = {task.folder for name in names for task in read_tasks(name)}
    folders = members | {list_names()[name].parent for name in names}
    return sorted(folder for folder in folders if not any(other in folder.parents for other in folders))


def stock_folder() -> Path:
    """Return the folder of the installed lm-eval's tasks, without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.submodule_search_locations, "lm-eval is a dependency"
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def list_names() -> dict[str, Path]:
    """Return the YAML file of every stock task and group by name; it takes about a second, once a process."""
    found: dict[str, Path] = {}
    for path in sorted(stock_folder().rglob("*.yaml")):
        for name in NAME.findall(path.read_bytes()):
            found.setdefault(name.decode(), path)
    return found


class _Loader(yaml.SafeLoader):
    """YAML with lm-eval's one tag, which is kept as text."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {loader.construct_scalar(node)}")  # type: ignore[arg-type]


def read_config(path: Path) -> dict[str, Any]:
    """Return a YAML file's values over those of the files that it includes."""
    config = yaml.load(path.read_bytes(), Loader=_Loader)
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= read_config(path.parent / name)
    return merged | config


def runs_code(folder: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether a task with functions of its own has, anywhere in their folder, a call that runs code or programs.

    Not every task that does so says `unsafe_code` (cruxeval does not).
    """
    modules = {
        folder / f"{found[1].replace('.', '/')}.py" for found in re.finditer(r"!function ([\w.]+)\.\w+", str(config))
    }
    folders = {module.parent for module in modules if module.is_file()}
    return any(_calls_code(path) for parent in folders for path in parent.glob("*.py"))


def _calls_code(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        called = node.func if isinstance(node, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        imports = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        module = node.module if isinstance(node, ast.ImportFrom) else ""
        if (
            name in RUNS_CODE
            or "subprocess" in (*imports, module)
            or (isinstance(node, ast.Constant) and node.value == "code_eval")
        ):
            return True
    return False
