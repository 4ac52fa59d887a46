"""The `varflow` command. Every verb is thin: it reads the settings, makes one call and shows the answer.

What a verb reports goes to stdout (with `--json`: one JSON object and nothing else), progress and errors go to stderr. Exit
status: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Libraries are imported inside the verbs: `--help` has to be instant.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from infra.stack import ServiceStatus, StackStatus

OWN_PACKAGES = ("flows", "tasks", "training", "evaluation", "infra")

app = typer.Typer(
    help="New preference data in, a better language model out: VAR training, benchmarks and a gate on Prefect, MLflow and S3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]


def main() -> None:
    """Run the command line. `--debug` counts wherever it stands."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        app(arguments, prog_name="varflow")
    except Exception as error:  # noqa: BLE001 - the last frame: whatever failed is told in one message
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        sys.stderr.write(f"varflow: {explain(error)}\n")
        sys.exit(1)


def explain(error: Exception) -> str:
    """Say what failed. An error that nobody foresaw is called ours, and says how to see where it comes from."""
    foreseen = isinstance(error, ValueError | OSError) or type(error).__module__.split(".")[0] in OWN_PACKAGES
    if foreseen:
        return str(error)
    return f"unexpected {type(error).__name__}: {error}; run the same again with --debug to see where, and report it"


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("varflow"))
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error, show its traceback as well.")] = False,
) -> None:
    """Take the options that every verb has; each is dealt with elsewhere."""


# --- the local stack ---


@app.command("up")
def start_stack(as_json: Json = False) -> None:
    """Start the local stack: S3, Prefect, MLflow and a worker. What runs already is left alone."""
    from infra.settings import read_settings
    from infra.stack import up

    with progress("starting the stack") as tell:
        status = up(read_settings(), progress=tell)
    if as_json:
        print_json(describe_stack(status) | {"started": list(status.started)})
        return
    typer.echo(f"started {', '.join(status.started)}" if status.started else "the stack is up already")
    show_places(status)


@app.command("down")
def stop_stack(as_json: Json = False) -> None:
    """Cancel the runs under way, so that they save their work, and stop the local stack. All data stays."""
    from infra.settings import read_settings
    from infra.stack import down

    with progress("stopping the stack") as tell:
        report = down(read_settings(), progress=tell)
    if as_json:
        print_json({"stopped": report.stopped, "cancelled": report.cancelled, "ended": report.ended})
        return
    if report.cancelled:
        typer.echo(f"cancelled {len(report.cancelled)} runs: {', '.join(report.cancelled)}")
    for process in report.ended:
        typer.echo(f"ended a process that was left: {process}")
    typer.echo(f"stopped {', '.join(report.stopped) or 'nothing'}; no process of the stack is left")


@app.command("status")
def show_stack(as_json: Json = False) -> None:
    """Show each service of the stack. Exit status 0 only if all are healthy."""
    from infra.settings import read_settings
    from infra.stack import status

    found = status(read_settings())
    if as_json:
        print_json(describe_stack(found))
    else:
        show_table(found)
    raise typer.Exit(0 if found.healthy else 1)


def describe_stack(status: "StackStatus") -> dict[str, Any]:
    """Give a stack's state as JSON values."""
    from dataclasses import asdict

    services = [asdict(service) for service in status.services]
    return {"home": str(status.settings.home), "healthy": status.healthy, "services": services}


def show_places(status: "StackStatus") -> None:
    """Print where the servers are to be seen."""
    settings = status.settings
    typer.echo(f"  Prefect  {settings.prefect_ui_url}")
    typer.echo(f"  MLflow   {settings.mlflow_tracking_uri}")
    typer.echo(f"  S3       {settings.s3_endpoint or 'AWS S3'} (bucket {settings.s3_bucket})")
    typer.echo(f"  home     {settings.home}")


def show_table(status: "StackStatus") -> None:
    """Print one line a service, and below it why it is not healthy."""

    def cells(service: "ServiceStatus") -> tuple[str, ...]:
        uptime = "" if service.uptime_seconds is None else f"{service.uptime_seconds:.0f} s"
        health = "healthy" if service.healthy else "NOT HEALTHY"
        pid, port = (str(value or "") for value in (service.pid, service.port))
        return service.service, service.state, health, pid, port, uptime, service.url

    rows = [("service", "state", "health", "pid", "port", "uptime", "url"), *map(cells, status.services)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    reasons = ["", *(service.detail for service in status.services)]
    for row, reason in zip(rows, reasons, strict=True):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if reason:
            typer.echo(f"  {reason}")


# --- how every verb talks ---


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
