"""`varflow plan`: what a recipe's training will take, found out without weights, servers or a hub."""

from dataclasses import dataclass
from pathlib import Path

from flows.config import AlignConfig
from infra import provenance, records
from infra.settings import Settings
from infra.stack.http import NoAnswer, ask
from infra.store import Store, StoreError, open_store
from tasks.ingest import ingest
from training.config import Device, Precision
from training.devices import name_device
from training.memory import show_bytes
from training.model import TOKENIZER_FILES, resolve_device
from training.plan import (
    ARCHITECTURES,
    Mfu,
    Plan,
    assume_workload,
    build_on_meta,
    choose_machine,
    list_architectures,
    measure_workload,
    plan_training,
    read_architecture,
)

DEMO = Path(__file__).with_name("demo")


@dataclass(frozen=True)
class Assumptions:
    """What the user states instead of having it looked up."""

    device: str | None = None
    ranks: int | None = None  # None: those of the recipe's runtime
    mfu: float | None = None
    usd_per_hour: float | None = None
    rows: int | None = None
    tokens: int | None = None


def make_plan(config: AlignConfig, assumptions: Assumptions, *, settings: Settings) -> Plan:
    """Return what a recipe's training takes; whether there is room for it is the plan's to say."""
    path = find_architecture(config.policy, home=settings.home)
    model = build_on_meta(read_architecture(path), config.train.lora)
    store = open_if_there(settings)
    # A recipe for a GPU may be planned where there is none.
    here = Device.cpu if config.runtime.device == Device.cpu else Device.auto
    device = assumptions.device or name_device(resolve_device(here))
    if assumptions.mfu is not None:
        mfu: Mfu | None = Mfu(assumptions.mfu, "given")
    else:
        size = sum(p.numel() for p in model.parameters())
        mfu = find_mfu(device, size, precision=config.train.precision, store=store) if store else None
    price = settings.usd_per_hour if assumptions.usd_per_hour is None else assumptions.usd_per_hour
    machine = choose_machine(device, config.train, config.runtime, ranks=assumptions.ranks, mfu=mfu, usd_per_hour=price)
    folder = None if assumptions.rows or assumptions.tokens or store is None else find_rows(config, store, settings)
    work = assume_workload(assumptions.rows, assumptions.tokens)
    if folder is not None:
        has_tokenizer = path.is_dir() and any((path / name).is_file() for name in TOKENIZER_FILES)
        work = measure_workload(folder, config.train, tokenizer_folder=path if has_tokenizer else None)
    return plan_training(model, config.train, config.runtime, work, machine)


def find_architecture(policy: str, *, home: Path) -> Path:
    """Return the folder or file with the policy's config. Nothing is fetched: ValueError where it is not on this machine."""
    kind, separator, name = policy.partition(":")
    if not separator or kind not in ("architecture", "embedded", "demo", "hub", "mirror"):
        return Path(policy).expanduser().resolve()
    mirrored = home / "mirror" / "models" / name.replace("@", "/")
    known = {"embedded": home / "models" / name, "demo": DEMO / name, "mirror": mirrored}.get(kind)
    if known is not None and (known / "config.json").is_file():
        return known
    shipped = ARCHITECTURES / f"{name}.json"
    if kind not in ("hub", "mirror") and shipped.is_file():
        return shipped
    if kind == "hub" and (cached := find_cached(name)):
        return cached
    raise ValueError(
        f"policy {policy!r}: its config is not on this machine, and a plan asks no hub; expected a folder or file with its config.json "
        f"(--set policy=PATH), or architecture:NAME of {', '.join(list_architectures())}"
    )


def find_cached(reference: str) -> Path | None:
    """Return the folder of a hub repository at a commit in the local cache, where its config is there."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, commit = reference.partition("@")
    found = try_to_load_from_cache(repository, "config.json", revision=commit or None)
    return Path(found).parent if isinstance(found, str) else None


def open_if_there(settings: Settings) -> Store | None:
    """Return the store when something answers at its address."""
    try:
        if settings.s3_endpoint is not None:
            ask(settings.s3_endpoint)
    except NoAnswer as error:
        if error.status is None:
            return None
    return open_store(settings)


def find_mfu(device: str, parameters: int, *, precision: Precision, store: Store) -> Mfu | None:
    """Return the share that the newest training of a model of this size had in this precision on such a device (a CPU: of this host)."""
    try:
        trained = list(records.iterate(store, "train"))
    except StoreError:
        return None
    here = provenance.name_process()["host"]
    alike = [
        record
        for record in trained
        if (record.summary.get("device"), record.summary.get("parameters")) == (device, parameters)
        and record.identity["config"].get("precision") == precision.value
        and 0 < record.summary.get("flop_share", 0.0) <= 1  # above: a CPU's rate was measured while something else ran
        and (device != "cpu" or record.provenance["host"] == here)
    ]
    if not alike:
        return None
    newest = max(alike, key=lambda record: record.created)
    return Mfu(newest.summary["flop_share"], f"measured in train/{newest.fingerprint[:12]}")


def find_rows(config: AlignConfig, store: Store, settings: Settings) -> Path | None:
    """Return the folder of the recipe's ingest artifact; None where it is not made. Nothing is fetched from a hub for it."""
    if config.preferences.startswith("hub:"):
        return None
    from tasks.artifacts import fetch_artifact  # and with the next MLflow, which a plan without a store does without
    from tasks.sources import resolve_source

    try:
        source = resolve_source(config.preferences, store=store, settings=settings)
        planned = ingest(config.ingest, {"source": source}, runtime=config.runtime)
        record = records.find(store, step="ingest", fingerprint=planned.fingerprint)
        return None if record is None else fetch_artifact(store, record, home=settings.home)
    except StoreError:
        return None


def describe_plan(plan: Plan) -> list[tuple[str, str]]:
    """Return a plan as titled lines."""
    machine, sizes = plan.machine, plan.footprint
    parts = {
        "weights": sizes.weights, "their copies in bfloat16": sizes.copies, "gradients": sizes.gradients, "AdamW's moments": sizes.optimiser,
        "weights and gradients that are whole: around the layers, of the one under way": sizes.gathered,
        f"activations of a micro-batch of {plan.microbatch_tokens:,} tokens": sizes.activations,
        "a chunk of logits, the head's gradient": sizes.logits,
    }  # fmt: skip
    room = f"together on each rank, of {show_bytes(machine.memory_bytes)}" + ("" if plan.fits else ": DOES NOT FIT")
    trained = f" ({plan.trained_parameters:,} trained)" if plan.trained_parameters < plan.parameters else ""
    rate = f"{machine.ranks} x {machine.name} at {machine.peak_flops / 1e12:,.4g} TFLOP/s"
    idle = f"; a step has {plan.parts:.4g} parts for {machine.ranks} ranks, which work {plan.busy_share:.0%} of the time: raise train.batch_prompts, or lower --ranks"
    return [
        ("policy", f"{plan.model_type}, {plan.parameters:,} parameters{trained}, {plan.layers} layers"),
        ("data", f"{plan.rows:,} rows of {plan.tokens_per_row:,.0f} tokens ({plan.data_basis})"),
        ("run", f"{plan.steps:,} steps, {plan.tokens:,} tokens, {plan.flops:.3g} operations"),
        ("memory", f"{show_bytes(sizes.total):>10}  {room}"),
        *(("", f"{show_bytes(size):>10}  {name}") for name, size in parts.items() if size),
        *(
            [("", f"{show_bytes(plan.export_bytes):>10}  of the first machine's memory when the model is written")]
            if plan.export_bytes
            else []
        ),
        ("time", f"{show_hours(plan.hours)} on {rate} ({machine.basis}){idle if plan.busy_share < 1 else ''}"),
        (
            "cost",
            "no price known; give --usd-per-hour or set VARFLOW_USD_PER_HOUR"
            if plan.usd is None
            else f"{plan.usd:,.2f} USD ({machine.price_basis})",
        ),
    ]


def show_hours(hours: float) -> str:
    """Return a duration as a person would say it."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.1f} h"
