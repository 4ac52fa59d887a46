"""How every verb of the command talks: reports on stdout, progress on stderr, JSON alone. Nothing heavy is imported here."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from infra.settings import Settings

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a field of the config; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]


def connect() -> "Settings":
    """Read the settings and export them to the libraries, which must not be imported before."""
    from infra.settings import read_settings

    settings = read_settings()
    settings.apply()
    return settings


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr that work is under way; the yielded function prints a line of news."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status(title):
        yield lambda message: console.print(message, markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))
