"""The `varflow` command. Every verb is thin: it reads the settings, makes one call and shows the answer.

What a verb reports goes to stdout (with `--json`: one JSON object and nothing else), progress and errors go to stderr. Exit
status: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped by SIGINT and SIGTERM. Libraries are imported inside the verbs:
`--help` has to be instant.
"""

import errno
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import cli_mirror, cli_models
from flows.console import Json, Set, connect, print_json, progress

if TYPE_CHECKING:
    from infra.settings import Settings
    from infra.stack import ServiceStatus, StackStatus

STARTED = time.monotonic()  # of the command, imports included: what its user waits for
STOPPED_BY = {128 + number: number.name for number in (signal.SIGINT, signal.SIGTERM)}  # exit status, as shells have it
OWN_PACKAGES = ("flows", "tasks", "training", "evaluation", "infra")

app = typer.Typer(
    help="New preference data in, a better language model out: VAR training, benchmarks and a gate on Prefect, MLflow and S3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_models.app)
app.add_typer(cli_mirror.app, name="mirror")


def main() -> None:
    """Run the command line. `--debug` counts wherever it stands."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app(arguments, prog_name="varflow")
    except SystemExit as end:
        if end.code in STOPPED_BY:
            what = STOPPED_BY[end.code]
            sys.stderr.write(
                f"varflow: stopped by {what}; what is done stays, and the same command goes on from there\n"
            )
        raise
    except Exception as error:  # noqa: BLE001 - the last frame: whatever failed is told in one message
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        sys.stderr.write(f"varflow: {explain(error)}\n")
        sys.exit(1)


def explain(error: Exception) -> str:
    """Say what failed. An error that nobody foresaw is called ours, and says how to see where it comes from."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from infra.settings import read_settings

        return f"{error}; make room on the disk of {read_settings().home}, or set VARFLOW_HOME to a folder on another, and run it again"
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
        status = up(read_settings(), progress=tell, on_ready=register_deployments)
    if as_json:
        print_json(describe_stack(status) | {"started": list(status.started)})
        return
    typer.echo(f"started {', '.join(status.started)}" if status.started else "the stack is up already")
    show_places(status)


def register_deployments(settings: "Settings") -> None:
    """Make the deployments that are not there yet."""
    settings.apply()
    from flows.deployments import register

    register(settings)


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


# --- runs ---


@app.command("run")
def run_recipe(
    recipe: Annotated[str, typer.Argument(help="demo, smoke or hh_rlhf; see flows/recipes.py.")],
    changes: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and run nothing.")] = False,
    on: Annotated[str, typer.Option("--on", help="here: in this process. worker: through its deployment.")] = "here",
    as_json: Json = False,
) -> None:
    """Align a model by a recipe: ingest, reward, train, evaluate, gate, promote, report."""
    from flows.overrides import override
    from flows.recipes import read_recipe

    config = override(read_recipe(recipe), changes or [])
    warn_of_policy(config)
    if dry_run:
        return show_plan(config, as_json=as_json)
    launch("align", config, on=on, as_json=as_json)
    return None


def warn_of_policy(config: Any) -> None:
    """Say on stderr what is wrong with a recipe's gate although it can be used."""
    from evaluation.gate.policy import flag_policy

    for flag in flag_policy(config.gate, config.suite):
        typer.echo(f"gate: {flag}", err=True)


@app.command("plan")
def plan_training(
    recipe: Annotated[str, typer.Argument(help="demo, smoke or hh_rlhf; see flows/recipes.py.")],
    changes: Set = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu (this one), H100, H200, A100-80GB ...")] = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", help="How many of them, weights sharded; else those of the recipe's runtime."),
    ] = None,
    mfu: Annotated[float | None, typer.Option("--mfu", help="Share of the peak that becomes training.")] = None,
    usd_per_hour: Annotated[float | None, typer.Option("--usd-per-hour", help="Price of one device.")] = None,
    rows: Annotated[int | None, typer.Option("--rows", help="Prompts of the train split, instead of ingested.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens of a row, prompt and responses.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe's training takes: memory, steps, hours, USD. Reads no weights; --set policy=architecture:NAME plans any model."""
    settings = connect()
    from flows.overrides import override
    from flows.plan import Assumptions, describe_plan, make_plan
    from flows.recipes import read_recipe
    from training.plan import require_room

    config = override(read_recipe(recipe), changes or [])
    plan = make_plan(config, Assumptions(device, ranks, mfu, usd_per_hour, rows, tokens), settings=settings)
    if as_json:
        print_json(plan.as_json())
    else:
        for title, line in describe_plan(plan):
            typer.echo(f"{title:8}{line}")
    require_room(plan)


@app.command("preflight")
def run_preflight(
    recipe: Annotated[str, typer.Argument(help="demo, smoke or hh_rlhf; see flows/recipes.py.")],
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Check what a recipe would train on, as training does at its start. Exit status 1 if a check fails."""
    settings = connect()
    from rich.console import Console

    from flows.launch import run_here
    from flows.overrides import override
    from flows.preflight import preflight
    from flows.recipes import read_recipe

    config = override(read_recipe(recipe), changes or [])
    outcome = run_here(preflight, config, settings=settings, console=Console(stderr=True))
    if as_json:
        print_json(outcome)
    else:
        show_checks(outcome)
    raise typer.Exit(0 if outcome["passed"] else 1)


def show_checks(outcome: dict[str, Any]) -> None:
    """Print one line a check, and below a failed one the rows that show it."""
    for check in outcome["checks"]:
        typer.echo(f"{check['outcome']:>14}  {check['name']}: {check['line']}")
        for row in check["rows"]:
            typer.echo(f"{'':16}{row['row_id'][:12]}  {row['excerpt']}")
    verdict = "all checks passed" if outcome["passed"] else "training would stop here"
    typer.echo(f"{verdict}, {outcome['seconds']:.1f} s; at most {outcome['seconds_allowed']:.0f} s were allowed")


@app.command("benchmark")
def run_benchmark(
    model: Annotated[
        str, typer.Argument(help="A folder, embedded:NAME, hub: or mirror:ORG/NAME@COMMIT, or STEP/FINGERPRINT.")
    ],
    files: Annotated[
        str,
        typer.Option("--files", help="Folder of benchmark files, benchmarks:ORG/NAME@COMMIT,... or demo:benchmarks."),
    ] = "demo:benchmarks",
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            "--suite",
            help="paper, paper_chat, standard, hha, alignment, reward_bias, demo or smoke; see evaluation/suites.py.",
        ),
    ] = "demo",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="First items of each task or set; a part is named as one.")
    ] = None,
    noise: Annotated[
        bool,
        typer.Option("--noise", help="Also vary few-shot seed, batch size and workers: how far does each score move?"),
    ] = False,
    backend: Annotated[
        str | None, typer.Option("--backend", help="transformers, vllm or openai; the last with --endpoint.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", help="NAME@URL of a served model; MODEL is then its config and tokenizer."),
    ] = None,
    reward: Annotated[
        str,
        typer.Option("--reward", metavar="MODEL", help="Reward model that scores the answers of hha and alignment."),
    ] = "",
    baseline: Annotated[
        str, typer.Option("--baseline", metavar="MODEL", help="Also answers them: gain and win rate against it.")
    ] = "",
    changes: Set = None,
    on: Annotated[str, typer.Option("--on", help="here: in this process. worker: through its deployment.")] = "here",
    as_json: Json = False,
) -> None:
    """Run a profile of benchmarks on a model; hha and alignment have its answers scored, reward_bias tests a reward model."""
    from evaluation.suites import limit_suite, place_suite, read_suite
    from flows.config import BenchmarkFlowConfig
    from flows.overrides import override
    from tasks.noise import choose_noise

    suite = place_suite(read_suite(profile), backend=backend, endpoint=endpoint)
    suite = suite if limit is None else limit_suite(suite, limit)
    config = BenchmarkFlowConfig(model=model, benchmarks=files, suite=suite, reward=reward, baseline=baseline)
    config = override(config, changes or [])
    if noise:
        varied = choose_noise(config.suite, config.runtime)  # how it is run is known now; what was set of it holds
        config = override(config.model_copy(update={"noise": varied}), changes or [])
    launch("benchmark", config, on=on, as_json=as_json)


@app.command("judge")
def run_judge(
    benchmark: Annotated[
        str, typer.Argument(help="arena_hard, or heldout; evalbiasbench and llmbar test the judge itself.")
    ],
    judge: Annotated[
        str, typer.Option("--judge", help="endpoint:NAME@REVISION at VARFLOW_JUDGE_URL, or a local chat model.")
    ],
    model: Annotated[str, typer.Argument(help="arena_hard's model, or generate/FINGERPRINT of heldout answers.")] = "",
    against: Annotated[
        str, typer.Option("--against", metavar="REF", help="heldout's other answers, generate/FINGERPRINT.")
    ] = "",
    files: Annotated[
        str, typer.Option("--files", help="Folder that holds arena-hard-v0.1, evalbiasbench or llmbar.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="First items, of each group; a part is named as one.")
    ] = None,
    changes: Set = None,
    on: Annotated[str, typer.Option("--on", help="here: in this process. worker: through its deployment.")] = "here",
    as_json: Json = False,
) -> None:
    """Have a judge say which of two answers is better, each pair in both orders."""
    from flows.config import JudgeFlowConfig
    from flows.overrides import make, override

    kind, _, name = judge.partition(":")
    served, _, revision = name.rpartition("@") if "@" in name else (name, "", "")
    is_endpoint = kind == "endpoint"
    judged_by = {"kind": "endpoint", "model": served, "revision": revision} if is_endpoint else {"kind": "local"}
    values = {
        "judging": {"benchmark": benchmark, "judge": judged_by, "limit": limit},
        "judge_model": "" if is_endpoint else judge,
        "model": model,
        "against": against,
        "files": files,
    }
    launch("judge", override(make(JudgeFlowConfig, values), changes or []), on=on, as_json=as_json)


@app.command("retrain")
def run_retrain(
    recipe: Annotated[str, typer.Argument(help="What to run when there is enough new data.")] = "demo",
    changes: Set = None,
    on: Annotated[str, typer.Option("--on", help="here: in this process. worker: through its deployment.")] = "here",
    as_json: Json = False,
) -> None:
    """Train on the pushed batches, if there is news; say why not otherwise."""
    from flows.config import RetrainConfig
    from flows.overrides import override
    from flows.recipes import read_recipe

    base = read_recipe(recipe).model_copy(update={"champion": "current"})
    config = override(RetrainConfig(recipe=base), changes or [])
    warn_of_policy(config.recipe)
    launch("retrain", config, on=on, as_json=as_json)


@app.command("push")
def push_preferences(
    files: Annotated[list[Path], typer.Argument(help="Preferences as JSON lines, JSON or Parquet.")],
    as_json: Json = False,
) -> None:
    """Store batches of preferences and tell Prefect that they landed."""
    settings = connect()
    from prefect.events import emit_event

    from flows.launch import check_servers, push
    from infra.store import open_store

    check_servers(settings)
    store = open_store(settings)
    store.probe()
    pushed = push(store, files, emit=emit_event)
    if as_json:
        return print_json({"pushed": pushed})
    for item in pushed:
        typer.echo(f"{item['digest'][:12]}  {'stored' if item['new'] else 'was there already'}  {item['file']}")
    return None


@app.command("report")
def show_report(
    run: Annotated[str, typer.Argument(help="A run's Prefect or MLflow id or page, or report/FINGERPRINT.")],
    as_json: Json = False,
) -> None:
    """Fetch a run's report and say where it lies."""
    settings = connect()
    from flows.launch import find_step
    from infra.store import open_store
    from infra.tracking import Tracking
    from tasks.artifacts import fetch_artifact

    store = open_store(settings)
    record = find_step(store, run, step="report", tracking=Tracking(settings.mlflow_tracking_uri))
    page = fetch_artifact(store, record, home=settings.home) / "report.html"
    if as_json:
        return print_json({"report": str(page), "url": store.url(f"{record.prefix}/report.html")})
    typer.echo(str(page))
    return None


@app.command("gate")
def show_gate(
    explain: Annotated[
        str,
        typer.Option(
            "--explain", metavar="RUN_OR_REF", help="A run's id or page, gate/FINGERPRINT, or a verdict.json."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Explain a verdict: each guard with test, interval, margin, detectable effect and what would decide it. Checks its seal."""
    settings = connect()
    from rich.console import Console

    from flows.verdict import draw_verdict, find_verdict

    found = find_verdict(explain, settings=settings)
    if as_json:
        return print_json(found.as_json())
    draw_verdict(found, Console() if sys.stdout.isatty() else Console(width=220))
    return None


@app.command("lineage")
def show_lineage(
    reference: Annotated[str, typer.Argument(metavar="REF", help="STEP/FINGERPRINT, or any start of a fingerprint.")],
    as_json: Json = False,
) -> None:
    """Show what an artifact came from and what came of it."""
    settings = connect()
    from flows.launch import trace
    from infra.store import open_store

    found = trace(open_store(settings), reference)
    if as_json:
        return print_json(found)
    draw_lineage(found)
    return None


def launch(name: str, config: Any, *, on: str, as_json: bool) -> None:
    """Run a flow here or on the worker and show what came of it."""
    settings = connect()
    from rich.console import Console

    from flows.deployments import find_flow
    from flows.launch import run_here, run_on_worker

    if on == "worker":
        outcome = run_on_worker(f"{name}/{name}", config, settings=settings)
    elif on == "here":
        outcome = run_here(find_flow(name), config, settings=settings, console=Console(stderr=True))
    else:
        raise ValueError(f"--on {on!r}: expected here or worker")
    if as_json:
        return print_json(outcome)
    show_outcome(config, outcome)
    return None


def show_plan(config: Any, *, as_json: bool) -> None:
    """Print a recipe's steps: fingerprint, cached or not, and what changed."""
    settings = connect()
    from flows.launch import plan_recipe

    rows = plan_recipe(config, settings=settings)
    if as_json:
        return print_json({"steps": rows})
    for row in rows:
        typer.echo(f"{'cached' if row['cached'] else 'to do':>6}  {row['fingerprint'][:12]}  {row['title']}")
        for line in row["changed"][:6]:
            typer.echo(f"{'':22}{line}")
    return None


def show_outcome(config: Any, outcome: dict[str, Any]) -> None:
    """Print what a run returned: verdict first, links last."""
    from evaluation.gate.explain import explain_noise
    from evaluation.gate.verdict import Noise

    if "verdict" in outcome:
        typer.echo(f"\n{outcome['verdict']}")
        for reason in outcome["reasons"]:
            typer.echo(f"  - {reason}")
        typer.echo(f"  {outcome['promotion']}")
    if outcome.get("started") is False:
        typer.echo(f"nothing to do: {outcome['reason']}")
    for name, value in outcome.get("scores", {}).items():
        typer.echo(f"  {name:40} {value:.6g}")
    for name, flag in outcome.get("flags", {}).items():
        typer.echo(f"  flagged: {name}: {flag}")
        found = outcome.get("benchmarks", {}).get(name, {})
        for shown in (found[key] for key in sorted(found) if key.startswith("flag_sample_")):
            typer.echo(f"    {shown}")
    for name, floors in outcome.get("noise", {}).items():
        for floor in floors:
            typer.echo(f"  noise floor: {explain_noise(name, Noise.model_validate(floor), whose='the model')}")
    for name in ("prefect_run", "mlflow_run", "report"):
        if name in outcome:
            typer.echo(f"  {name.replace('_', ' '):12} {outcome[name]}")
    steps = outcome.get("steps", [])
    seconds = time.monotonic() - STARTED
    if steps and all(step["cached"] for step in steps):
        typer.echo(f"{config.name}: all {len(steps)} steps cached, {seconds:.1f} s")
    elif steps:
        typer.echo(
            f"{config.name}: {sum(not step['cached'] for step in steps)} of {len(steps)} steps run, {seconds:.1f} s"
        )
    if "verdict" in outcome:
        typer.echo("the servers stay up; `varflow down` stops them")


def draw_lineage(found: dict[str, Any]) -> None:
    """Print the tree of what an artifact came from, and of what came of it."""
    from rich.console import Console
    from rich.tree import Tree

    def grow(tree: Tree, node: dict[str, Any]) -> None:
        for name, given in node.get("inputs", {}).items():
            text = given.get("ref") or f"source {given['source']}"
            grow(tree.add(f"{name}: {text[:40]}", highlight=False), given)

    def grow_uses(tree: Tree, uses: list[dict[str, Any]]) -> None:
        for use in uses:
            grow_uses(tree.add(use["ref"][:40], highlight=False), use["used_by"])

    origins, uses = Tree(f"{found['ref'][:40]}  comes from"), Tree("and went into")
    grow(origins, found)
    grow_uses(uses, found["used_by"])
    Console().print(origins, uses)
