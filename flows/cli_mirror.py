"""The verbs that bring hub repositories into a mirror: the only ones that need the hub, so that all others can do without."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.console import Json, connect, print_json

if TYPE_CHECKING:
    from infra.hub import Kind

app = typer.Typer(no_args_is_help=True, help="Pin Hugging Face hub repositories by commit, with digests and licences.")

To = Annotated[str, typer.Option("--to", metavar="FOLDER|store", help="A folder, or the S3 store below mirror/.")]
Revision = Annotated[
    str,
    typer.Option("--revision", help="Branch, tag or commit; it is resolved to a commit before anything is fetched."),
]


@app.command("models")
def mirror_models(
    names: Annotated[list[str], typer.Argument(metavar="ORG/NAME...", help="Model repositories of the hub.")],
    to: To = "store",
    revision: Revision = "main",
    as_json: Json = False,
) -> None:
    """Mirror models: safetensors, configuration, tokenizer. Pickled weights and code are left out, and named."""
    mirror("model", names, to=to, revision=revision, as_json=as_json)


@app.command("datasets")
def mirror_datasets(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="ORG/NAME...", help="Data set repositories of the hub.")
    ] = None,
    for_task: Annotated[
        list[str] | None,
        typer.Option("--for-task", metavar="TASK", help="Those that an lm-eval task or group reads; may be repeated."),
    ] = None,
    to: To = "store",
    revision: Revision = "main",
    as_json: Json = False,
) -> None:
    """Mirror data sets: for benchmarks (--files FOLDER, or benchmarks:ORG/NAME@COMMIT) and for preferences."""
    from evaluation.harness.mirror import needed_data

    needed = {need.repository: None for task in for_task or [] for need in needed_data(task)}
    wanted = [*(names or []), *needed]
    if not wanted:
        raise ValueError(
            "mirror datasets: got neither a name nor --for-task; expected repositories of the hub, or tasks of lm-eval"
        )
    mirror("dataset", wanted, to=to, revision=revision, as_json=as_json)


def mirror(kind: "Kind", names: list[str], *, to: str, revision: str, as_json: bool) -> None:
    """Pin all repositories, then fetch one after the other, and say what each is."""
    settings = connect()
    from infra import hub
    from infra.store import open_store
    from tasks.artifacts import open_digests

    store = open_store(settings) if to == "store" else None
    if store:
        store.probe()
    root = settings.home / "mirror" if store else Path(to).expanduser().resolve()
    digests, endpoint = open_digests(settings), settings.hub_endpoint
    pins = hub.pin(names, kind=kind, revision=revision, endpoint=endpoint)
    done = []
    for pinned in pins:
        manifest, fetched = hub.fetch(pinned, root=root, endpoint=endpoint, digests=digests, progress=tell)
        stored = hub.keep(store, root / manifest.name, manifest) if store else False
        done.append(describe(manifest, new=fetched or stored))
        done[-1]["where"] = store.url(f"mirror/{manifest.name}") if store else str(root / manifest.name)
        done[-1]["reference"] = manifest.reference if store else done[-1]["where"]
        if not as_json:
            show(done[-1])
    together = ",".join(f"{one['repository']}@{one['commit']}" for one in done)
    files = f"benchmarks:{together}" if store else str(root)
    if as_json:
        return print_json({"repositories": done} | ({"files": files} if kind == "dataset" else {}))
    if kind == "dataset":
        typer.echo(f"benchmarks read them with --files {files}")
    return None


def tell(message: str) -> None:
    """Print a line of news."""
    typer.echo(message, err=True)


def describe(manifest: Any, *, new: bool) -> dict[str, Any]:
    """Return a mirrored repository as JSON values."""
    return manifest.model_dump(mode="json") | {"new": new, "bytes": sum(file.size for file in manifest.files)}


def show(one: dict[str, Any]) -> None:
    """Print what a repository is and where it lies."""
    state = "mirrored" if one["new"] else "was there already"
    typer.echo(
        f"{one['repository']}@{one['commit']}  {state}: {len(one['files'])} files, {one['bytes'] / 1e6:,.1f} MB, "
        f"licence {one['licence'] or 'not stated'}"
    )
    typer.echo(f"  {one['reference']}")
    if one["left_out"]:
        typer.echo(f"  left out, since only safetensors and data are taken: {', '.join(one['left_out'])}")
