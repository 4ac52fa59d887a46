"""Each mistake or missing server is one message: what, where, got, expected, next. No traceback, nothing recorded."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.store import Store
from tests.faults.command import Command, read_records, small
from tests.infra.test_store import CarelessStore

DEMO = Path(__file__).resolve().parents[2] / "flows" / "demo"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def nothing_recorded(store: Store, done: dict[str, Any]) -> Iterator[None]:
    """Hold every test of this module to leaving no record behind."""
    before = read_records(store)
    yield
    assert read_records(store) == before


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Return a copy of the tiny policy to be broken."""
    return Path(shutil.copytree(DEMO / "tiny-policy", tmp_path / "policy"))


def test_an_empty_preference_file(varflow: Command, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    told = varflow.refuse("run", "smoke", *small(preferences=str(tmp_path / "none.jsonl")))
    assert "none.jsonl: got no rows, expected at least one preference" in told


def test_a_half_broken_preference_file_again_and_again(varflow: Command, tmp_path: Path) -> None:
    """What the refused attempt left in its work folder does not change what the next one says."""
    rows = [json.dumps({"prompt": f"{n}?", "chosen": f"{n}!", "rejected": "No."}) for n in range(20)]
    (tmp_path / "half.jsonl").write_text("\n".join(row[: 9 if n % 2 else None] for n, row in enumerate(rows)))
    words = small(preferences=str(tmp_path / "half.jsonl"), ingest__max_invalid_fraction=0.1)
    told = varflow.refuse("run", "smoke", *words)
    assert "10 of 20 rows are unusable" in told and "half.jsonl:2" in told and "max_invalid_fraction" in told
    assert varflow.refuse("run", "smoke", *words) == told


def test_an_unknown_recipe_and_an_unknown_key(varflow: Command) -> None:
    told = varflow.refuse("run", "smok")
    assert told == "varflow: recipe 'smok': no such recipe; expected one of demo, smoke, hh_rlhf\n"
    told = varflow.refuse("run", "smoke", "--set", "train.lamda=0.3")
    assert "unknown key 'lamda'; expected lambda_" in told
    told = varflow.refuse("run", "smoke", "--set", "train.lambda_=-1")
    assert "train" in told and "greater than 0" in told and "got -1" in told


def test_a_model_without_weights(varflow: Command, policy: Path) -> None:
    (policy / "model.safetensors").unlink()
    told = varflow.refuse("run", "smoke", *small(policy=str(policy)))
    assert str(policy) in told and "safetensors" in told


def test_a_tokenizer_without_chat_template(varflow: Command, policy: Path) -> None:
    (policy / "chat_template.jinja").unlink()
    told = varflow.refuse("run", "smoke", *small(policy=str(policy)))
    assert str(policy) in told and "chat template" in told


def test_a_benchmark_that_is_not_in_the_mirror(varflow: Command) -> None:
    told = varflow.refuse("run", "smoke", *small(**{"suite__benchmarks__0__tasks": ["mmlu_virology"]}))
    assert "benchmarks 'demo:benchmarks': 2 files or tasks of the suite are not there" in told
    assert "cais/mmlu/virology/test.parquet" in told and "take the benchmarks out of the suite" in told


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"VARFLOW_S3_SECRET_KEY": "wrong"}, ("refused the credentials", "VARFLOW_S3_ACCESS_KEY")),
        ({"VARFLOW_S3_BUCKET": "absent"}, ("'absent' does not exist", "VARFLOW_S3_BUCKET")),
        ({"VARFLOW_S3_ENDPOINT": NOWHERE}, (f"no answer from {NOWHERE}", "varflow up")),
        ({"VARFLOW_PREFECT_API_URL": f"{NOWHERE}/api"}, ("Prefect", "varflow up", "VARFLOW_PREFECT_API_URL")),
        ({"VARFLOW_MLFLOW_TRACKING_URI": NOWHERE}, ("MLflow", "varflow up", "VARFLOW_MLFLOW_TRACKING_URI")),
    ],
    ids=["credentials", "bucket", "s3", "prefect", "mlflow"],
)
def test_a_server_that_is_away_or_refuses(varflow: Command, variables: dict[str, str], words: tuple[str, ...]) -> None:
    told = varflow.refuse("run", "smoke", *small(train__seed=50), **variables)
    assert all(word in told for word in words), told
    assert told.count("\n") == 1
    secret = varflow.settings.s3_secret_key
    assert secret and secret.get_secret_value() not in told


def test_a_store_that_ignores_conditions(varflow: Command) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CarelessStore) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        told = varflow.refuse("run", "smoke", *small(train__seed=50), VARFLOW_S3_ENDPOINT=endpoint)
        server.shutdown()
    assert "ignores conditional writes" in told and endpoint in told


def test_a_full_disk(varflow: Command, full_disk: Path) -> None:
    words = small(name="full", train__seed=51, train__epochs=20)
    told = varflow.refuse("run", "smoke", *words, VARFLOW_HOME=str(full_disk))
    assert "No space left on device" in told and str(full_disk) in told
