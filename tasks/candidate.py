"""Candidates for promotion: which model a reference means, on whose word it may become champion, whether it is what was evaluated."""

import re
from collections.abc import Iterator

from evaluation.gate.verdict import Decision, OlderVerdictError, Verdict, read_verdict
from infra import records, registry
from infra.provenance import name_user
from infra.records import Record
from infra.registry import Candidate, Standing
from infra.store import Store, digest_bytes
from infra.tracking import Tracking, read_steps
from tasks.gate import CHALLENGER, CHAMPION

REMEDY = "run the pipeline until the gate says PROMOTE, or promote it with --without-gate REASON"
RUN_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # of MLflow, of Prefect


def choose_model(store: Store, name: str | None) -> str:
    """Return the registered model that is meant: the named one, or the only one, of those that have a history."""
    known = registry.list_models(store)
    if name is None and len(known) == 1:
        return known[0]
    if name not in known:
        raise ValueError(
            f"got {f'--model {name}' if name else 'no --model'}, expected one of {', '.join(known) or '(none was promoted yet)'}"
        )
    return name


def find_model(store: Store, reference: str, *, tracking: Tracking, model: str | None = None) -> Record:
    """Return the record of the model that a reference means.

    `champion` or `champion:MODEL`; an artifact as STEP/FINGERPRINT or the start of one; a verdict, for the challenger it is about; a run by its
    Prefect or MLflow id or page, for what it trained. Raises ValueError for anything else, and for what is no model.
    """
    return find_candidate(store, reference, tracking=tracking, model=model)[0]


def find_candidate(
    store: Store, reference: str, *, tracking: Tracking, model: str | None = None
) -> tuple[Record, Record | None]:
    """Return the record of the model that a reference means, as `find_model`, and that of the verdict where it names one."""
    if reference == "champion" or reference.startswith("champion:"):
        name = choose_model(store, reference.partition(":")[2] or model)
        champion = registry.read_standing(store, name).champion
        if champion is None:
            raise ValueError(f"champion of {name!r}: nothing was promoted yet; expected a reference to a model")
        return records.resolve(store, champion.ref), None
    run = name_run(reference)
    tags = tracking.find_tags(run) if run else {}
    if tags:
        steps = read_steps(tags)
        if "train" not in steps:
            raise ValueError(f"run {run}: it trained nothing; expected a run of align, or a model as STEP/FINGERPRINT")
        reference = steps["train"]
    record, verdict = records.resolve(store, reference), None
    if record.step == "gate":
        record, verdict = records.resolve(store, record.inputs[CHALLENGER]), record
    names = {file.name for file in record.files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{record.ref}: got {', '.join(sorted(names)[:4])}, expected a model: config.json and "
            "*.safetensors, as train/FINGERPRINT has them"
        )
    return record, verdict


def name_run(reference: str) -> str | None:
    """Return the id of the run that a reference may mean, by its id or the address of its page; None for anything else."""
    if reference.startswith(("http://", "https://")):
        parts = reference.partition("?")[0].rstrip("/").split("/")
        return next((part for part in reversed(parts) if RUN_ID.fullmatch(part)), None)
    return reference if RUN_ID.fullmatch(reference) else None


def list_verdicts(store: Store, model: Record) -> list[Record]:
    """Return the gate's records about a challenger, newest first."""
    about = [record for record in records.iterate(store, "gate") if record.inputs.get(CHALLENGER) == model.fingerprint]
    return sorted(about, key=lambda record: record.created, reverse=True)


def choose_verdict(store: Store, model: Record, *, standing: Standing) -> Record:
    """Return the verdict by which a model may be promoted: the newest over the present champion (the newest of all where there is
    none, or where no verdict is over it, which the registry then refuses), if that says PROMOTE.

    An older one under other margins or rules has been overtaken. Raises ValueError saying what the newest says instead.
    """
    verdicts = list_verdicts(store, model)
    ref = model.ref
    if not verdicts:
        raise ValueError(f"{ref}: the gate has said nothing about it, expected a verdict PROMOTE; {REMEDY}")
    champion = standing.champion.fingerprint if standing.champion else None
    over = [verdict for verdict in verdicts if champion in (None, verdict.inputs[CHAMPION])]
    newest = (over or verdicts)[0]
    if newest.summary["verdict"] != "PROMOTE":
        reason = str(next(iter(newest.summary["reasons"]), ""))
        raise ValueError(
            f"{ref}: the gate says {newest.summary['verdict']} (gate/{newest.fingerprint[:12]}: {reason}), expected PROMOTE; {REMEDY}"
        )
    return newest


def promote_by_hand(
    store: Store, model: str, record: Record, *, without_gate: str, verdict: Record | None = None
) -> tuple[Standing, bool]:
    """Make a model champion by a verdict, the named one or else `choose_verdict`'s, or, with a reason in place of one, by the caller's own word.

    Returns (standing, whether it moved). Raises ValueError without a verdict or where bytes changed, ChampionMoved when
    another promotion came first, VerdictUsed for a verdict that may promote nothing any more.
    """
    before = registry.read_standing(store, model)
    held = before.champion
    if held and (held.ref, held.digest) == (record.ref, records.digest_files(record)):
        without_gate, verdict = held.reason, None  # again, and of the same bytes: nothing is to be decided
    elif without_gate:
        verdict = None
    else:
        verdict = verdict or choose_verdict(store, record, standing=before)
        check_evaluated(store, record, verdict=verdict)
    store.check_files(record.prefix, record.files)
    candidate = make_candidate(store, record, verdict=verdict, by=name_user(), reason=without_gate, standing=before)
    after = registry.promote(store, model, candidate)
    return after, after.number > before.number


def make_candidate(
    store: Store,
    record: Record,
    *,
    verdict: Record | None,
    by: str,
    reason: str = "",
    standing: Standing | None = None,
) -> Candidate:
    """Return a model as the registry keeps it; without a verdict it is to replace the champion of `standing`."""
    champion = standing.champion if standing else None
    over = verdict.inputs[CHAMPION] if verdict else champion.fingerprint if champion else ""
    return Candidate(
        ref=record.ref,
        digest=records.digest_files(record),
        over=over,
        verdict=verdict.ref if verdict else "",
        decision=str(verdict.summary["verdict"]) if verdict else "",
        reason=reason,
        source=store.url(record.prefix),
        mlflow_run=record.mlflow_run,
        by=by,
    )


def check_evaluated(store: Store, model: Record, *, verdict: Record) -> None:
    """Raise ValueError unless the verdict is as recorded, says PROMOTE, and all that it rests on read the model's recorded bytes.

    A fingerprint says what was asked for; bytes may differ where an artifact was lost and made again. Whether the store still
    has the recorded bytes is `Store.check_files`' to say.
    """
    ref, seal = model.ref, f"gate/{verdict.fingerprint}"
    check_promotes(store, verdict)
    if verdict.inputs[CHALLENGER] != model.fingerprint:
        raise ValueError(
            f"{seal}: is about {verdict.inputs[CHALLENGER][:16]}…, expected {ref}; name the verdict's own challenger"
        )
    digest = records.digest_files(model)
    reads = list(find_reads(store, verdict, of=model.fingerprint))
    wrong = [f"{by} read {read[:12]}" for by, read in reads if read is not None and read != digest]
    if wrong or not reads:
        raise ValueError(
            f"{ref}: its files have digest {digest[:12]}, but {'; '.join(wrong) or f'{seal} does not say which bytes it read'}: what "
            "would be promoted is not what was evaluated; delete those records and run the pipeline again"
        )


def read_sealed(store: Store, verdict: Record) -> Verdict:
    """Return the verdict of a gate's record. Raises ValueError unless it is the file that was recorded, under the seal that the record keeps."""
    found = store.get(f"{verdict.prefix}/verdict.json")
    recorded = {file.name: file.sha256 for file in verdict.files}.get("verdict.json")
    where = store.url(f"{verdict.prefix}/verdict.json")
    if found is None or digest_bytes(found[0]) != recorded:
        got = digest_bytes(found[0])[:12] if found else "no file"
        raise ValueError(
            f"{where}: got {got}, expected SHA-256 {str(recorded)[:12]}: the verdict was changed; run the gate again"
        )
    try:
        return read_verdict(found[0], kept=verdict.summary.get("seal"))
    except ValueError as error:
        kind = OlderVerdictError if isinstance(error, OlderVerdictError) else ValueError
        raise kind(f"gate/{verdict.fingerprint[:12]}: {error}") from error


def check_promotes(store: Store, verdict: Record) -> None:
    """Raise ValueError unless the sealed verdict says PROMOTE."""
    decision = read_sealed(store, verdict).decision
    if decision is not Decision.promote:
        raise ValueError(
            f"{store.url(verdict.prefix)}/verdict.json: says {decision}, expected PROMOTE; promote it with --without-gate REASON if you must"
        )


def find_reads(store: Store, start: Record, *, of: str) -> Iterator[tuple[str, str | None]]:
    """Yield (step/fingerprint, digest read) of every artifact, back from `start`, that took the model `of` as an input.

    A record of a version that did not keep digests has None for one: its fingerprint alone says what it read.
    """
    waiting, seen = [start], {start.fingerprint}
    while waiting:
        record = waiting.pop()
        for name, fingerprint in record.inputs.items():
            given = record.given.get(name)
            if fingerprint == of:
                yield f"{record.step}/{record.fingerprint[:12]}", given.digest if given else None
            elif given and fingerprint not in seen and given.name.endswith(f"/{fingerprint}"):
                seen.add(fingerprint)
                made = records.read_record(store, step=given.name.partition("/")[0], fingerprint=fingerprint)
                if made is None:
                    raise ValueError(f"{record.ref}: rests on {given.name}, of which there is no record any more")
                waiting.append(made[0])
