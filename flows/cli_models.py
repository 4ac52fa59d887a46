"""The verbs about models: which one is champion, since when and why, and how it leaves the store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.console import Json, connect, print_json, progress

if TYPE_CHECKING:
    from infra.registry import Entry, Standing
    from infra.settings import Settings
    from infra.store import Store

app = typer.Typer()

Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="champion, STEP/FINGERPRINT or the start of one (gate/… for what it is about), or a run's id or page.",
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", help="Registered model; may be left out while there is only one.")
]


@app.command("promote")
def promote_model(
    reference: Reference,
    model: Model = None,
    without_gate: Annotated[
        str,
        typer.Option(
            "--without-gate", metavar="REASON", help="Promote without a verdict; the reason stays in the history."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Make a model champion: by the gate's newest verdict on it over the champion, by a verdict that REF names, or by a reason that you give."""
    settings = connect()
    from infra.store import open_store
    from infra.tracking import Tracking
    from tasks.candidate import choose_model, find_candidate, promote_by_hand

    store = open_store(settings)
    store.probe()
    record, verdict = find_candidate(store, reference, tracking=Tracking(settings.mlflow_tracking_uri), model=model)
    with progress("checking that it is what was evaluated"):
        name = model or choose_model(store, None)
        _, moved = promote_by_hand(store, name, record, without_gate=without_gate, verdict=verdict)
    show_standing(store, name, settings=settings, moved=moved, as_json=as_json)


@app.command("rollback")
def roll_back_model(
    to: Annotated[
        int | None, typer.Option("--to", help="Entry of the history whose model is to be champion again.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; it stays in the history.")] = "no reason given",
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Make the champion before this one, or the one of an entry, champion again."""
    settings = connect()
    from infra.provenance import name_user
    from infra.registry import roll_back
    from infra.store import open_store
    from tasks.candidate import choose_model

    store = open_store(settings)
    store.probe()
    name = choose_model(store, model)
    _, moved = roll_back(store, name, to=to, reason=reason, by=name_user())
    show_standing(store, name, settings=settings, moved=moved, as_json=as_json)


@app.command("history")
def show_history(model: Model = None, as_json: Json = False) -> None:
    """Show every promotion, refusal, rollback and verdict of a model, and who is champion."""
    settings = connect()
    from infra.registry import read_history, read_standing
    from infra.store import open_store
    from tasks.candidate import choose_model

    store = open_store(settings)
    name = choose_model(store, model)
    standing, history = read_standing(store, name), read_history(store, name)
    if as_json:
        entries = [entry.model_dump(mode="json", exclude={"token"}) for entry in history]
        return print_json({"model": name, "history": entries} | describe_standing(standing))
    draw_history(name, standing, history)
    return None


@app.command("export")
def export_model(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(help="A new folder for the model as Hugging Face's libraries read it.")],
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Write a model to a folder, with a card: data, rewards, scores with intervals, licences, lineage, verdict."""
    settings = connect()
    from infra.store import open_store
    from infra.tracking import Tracking
    from tasks.candidate import find_model
    from tasks.export import export

    store, tracking = open_store(settings), Tracking(settings.mlflow_tracking_uri)
    record = find_model(store, reference, tracking=tracking, model=model)
    with progress(f"writing {folder}"):
        files = export(store, record, folder, settings=settings)
    if as_json:
        return print_json({"ref": record.ref, "folder": str(folder.resolve()), "files": files})
    typer.echo(
        f"{folder.resolve()}: {len(files)} files of {record.step}/{record.fingerprint[:12]}; README.md is its card"
    )
    return None


@app.command("compare")
def compare_models(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C…]", help="champion, a run's id, STEP/FINGERPRINT, or any model; the reference first."
        ),
    ],
    model: Model = None,
    tokens: Annotated[
        bool, typer.Option("--tokens/--no-tokens", help="Load the models to colour the tokens of a few answers.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Lay models side by side: scores, win rates and rewards with intervals, flips, settings, data, cost; and as a page."""
    settings = connect()
    from pydantic import ValidationError
    from rich.console import Console

    from flows.compare import compare
    from flows.config import CompareConfig
    from flows.launch import run_here

    try:
        config = CompareConfig(models=tuple(models), model_name=model or "", tokens=tokens)
    except ValidationError as error:
        raise ValueError(f"compare: {error.errors()[0]['msg']}; got {' '.join(models)}") from None
    outcome = run_here(compare, config, settings=settings, console=Console(stderr=True))
    if as_json:
        return print_json(outcome)
    draw_comparison(outcome)
    return None


def draw_comparison(outcome: dict[str, Any]) -> None:
    """Print the table of a comparison, how many items flip, and where its page lies."""
    from rich.console import Console
    from rich.table import Table

    found = outcome["comparison"]
    wide = Console().width
    console = Console(width=max(wide, 100))  # a pipe has no width, and numbers must not be cut
    table = Table(
        box=None, title=f"each minus {found['subjects'][0]}, {found['confidence']:.0%} intervals", title_justify="left"
    )
    for column in ("what", "model", "level", "difference", "won:lost", "p adj."):
        table.add_column(column, justify="left" if column in ("what", "model") else "right")
    measures = [*found["benchmarks"], *found["judges"], *found["alignment"], found["reward"], found["length"]]
    for measure in filter(None, measures):
        scale, digits = (100, 1) if measure["unit"] != "prompts" else (1, 1 if "characters" in measure["what"] else 3)
        for place, level in enumerate(measure["levels"]):
            difference = measure["differences"][place - 1] if place else None
            cells = ["", ""]
            if difference:
                low, high = (f"{scale * difference[end]:+.{digits}f}" for end in ("low", "high"))
                cells = [f"{difference['won']}:{difference['lost']}", f"{difference['p_adjusted']:.2g}"]
            table.add_row(
                f"{measure['what']} ({measure['n']})" if not place else "",
                found["subjects"][place],
                f"{scale * level['value']:.{digits}f}",
                f"{scale * difference['difference']:+.{digits}f} [{low}, {high}]" if difference else "reference",
                *cells,
            )  # fmt: skip
    console.print(table)
    for sentence in found["not_compared"]:
        typer.echo(f"not compared: {sentence}")
    for row in found["settings"]:
        typer.echo(
            f"  {row['name']}: {' | '.join('-' if value is None else str(value)[:60] for value in row['values'])}"
        )
    for row in found["cost"]:
        shown = ("-" if value is None else f"{value:,.4g}" for value in row["values"])
        unit = "" if row["name"].endswith(("USD", "seconds")) else ", seconds"
        typer.echo(f"  cost of {row['name']}{unit}: {' | '.join(shown)}")
    won = sum(flip["won"] for flip in found["flips"])
    typer.echo(f"{won} items won, {len(found['flips']) - won} lost; their texts are on the page")
    typer.echo(f"  page         {outcome['report']}\n  in MLflow    {outcome['report_in_mlflow']}")


def show_standing(store: "Store", name: str, *, settings: "Settings", moved: bool, as_json: bool) -> None:
    """Bring MLflow's aliases up and say who is champion now. A registry that is away is told of, and costs nothing else."""
    from infra.registry import mirror, read_standing
    from infra.stack.health import probe
    from infra.tracking import TrackingError

    behind = probe("mlflow", settings)
    if not behind:
        try:
            mirror(store, name, tracking_uri=settings.mlflow_tracking_uri)
        except TrackingError as error:
            behind = str(error)
    standing = read_standing(store, name)
    if as_json:
        return print_json({"model": name, "moved": moved, "mlflow": behind or "mirrored"} | describe_standing(standing))
    assert standing.champion
    typer.echo(f"{name}: {'champion is now' if moved else 'champion is already'} {standing.champion.ref}")
    if standing.previous:
        typer.echo(f"  previous: {standing.previous.ref}")
    if behind:
        typer.echo(f"  MLflow's aliases follow with the next call: {behind}", err=True)
    return None


def describe_standing(standing: "Standing") -> dict[str, Any]:
    """Return who is what, as JSON values."""
    return {
        name: entry.model_dump(mode="json", exclude={"token"}) if (entry := getattr(standing, name)) else None
        for name in ("champion", "previous", "challenger")
    }


def draw_history(name: str, standing: "Standing", history: "list[Entry]") -> None:
    """Print one line an entry, newest last, and below it who asked and why."""
    names = {
        entry.number: alias for alias in ("challenger", "previous", "champion") if (entry := getattr(standing, alias))
    }
    for entry in history:
        what = f"rolled back to entry {entry.restores}" if entry.restores else entry.move.value
        word = f"{entry.decision} by {entry.verdict[:17]}" if entry.verdict else "without the gate"
        typer.echo(
            f"{entry.number:4}  {entry.at[:19]}  {what}: {entry.ref[:22]}  {word}"
            + (f"  <- {names[entry.number]}" if entry.number in names else "")
        )
        typer.echo(f"{'':27}{entry.by}" + (f": {entry.reason}" if entry.reason else ""))
    typer.echo(f"{name}: champion {standing.champion.ref if standing.champion else 'none yet'}")
