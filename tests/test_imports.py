"""The direction of imports, and who may know which library, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "tasks", "training", "evaluation", "infra")
ALLOWED = {
    "flows": {"tasks", "training", "evaluation", "infra"},
    "tasks": {"training", "evaluation", "infra"},
    "evaluation": {"training"},
    "training": set(),
    "infra": set(),
}
ONLY_IN = {
    "boto3": {"infra/store.py"},
    "botocore": {"infra/store.py"},
    "mlflow": {"infra/tracking.py", "infra/registry.py"},
    "lm_eval": {"evaluation/harness/run.py"},
}
PREFECT_IN = {"flows", "tasks", "infra"}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the package"
            yield node.lineno, node.module or ""


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    for line, module in imported(path):
        top = module.split(".")[0]
        if top in PACKAGES:
            assert top == package or top in ALLOWED[package], f"{name}:{line}: {package} must not import {top}"
        if top in ONLY_IN:
            assert name in ONLY_IN[top], f"{name}:{line}: only {sorted(ONLY_IN[top])} may know {top}"
        if top == "prefect":
            assert package in PREFECT_IN, f"{name}:{line}: {package} must not know Prefect"
        if path.name == "config.py":
            assert top not in {"torch", "transformers"}, f"{name}:{line}: a config must be readable without {top}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_settings_reads_the_environment(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}:
            assert name == "infra/settings.py", f"{name}:{node.lineno}: only infra/settings.py reads the environment"
        if isinstance(node, ast.Name) and node.id == "BaseSettings":
            assert name == "infra/settings.py", f"{name}:{node.lineno}: reads the environment"
