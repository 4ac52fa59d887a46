"""Which source wins, what is refused, and that no secret shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.settings import child_environment, read_settings

SECRET = "0123456789abcdef-secret"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Leave no variable of ours, and stand in an empty folder."""
    for name in list(os.environ):
        if name.startswith(("VARFLOW_", "AWS_", "PREFECT_", "MLFLOW_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_stack(home: Path, **values: object) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "stack.json").write_text(json.dumps(values))
    (home / "credentials.json").write_text(json.dumps({"s3_access_key": "local", "s3_secret_key": SECRET}))


def test_by_default_all_is_local_and_derived_from_the_ports(bare: Path) -> None:
    settings = read_settings(s3_port=9000, prefect_port=4300)
    assert settings.home == bare / ".varflow"
    assert settings.s3_endpoint == "http://127.0.0.1:9000"
    assert settings.prefect_api_url == "http://127.0.0.1:4300/api"
    assert settings.mlflow_tracking_uri == "http://127.0.0.1:5500"
    assert settings.weed_ports == {"s3": 9000, "master": 9001, "volume": 9002, "filer": 9003}
    assert all(settings.is_local(service) for service in ("s3", "prefect", "mlflow", "worker"))


def test_the_nearest_home_upwards_is_found(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / ".varflow").mkdir()
    below = bare / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert read_settings().home == bare / ".varflow"
    (bare / "a" / ".varflow").mkdir()
    assert read_settings().home == bare / "a" / ".varflow"
    monkeypatch.setenv("VARFLOW_HOME", "elsewhere")
    assert read_settings().home == below / "elsewhere"


def test_order_call_then_environment_then_stack_then_default(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings().s3_bucket == "varflow"
    write_stack(bare / ".varflow", s3_bucket="of-the-stack", prefect_port=4300)
    assert read_settings().s3_bucket == "of-the-stack"
    assert read_settings().prefect_api_url == "http://127.0.0.1:4300/api"
    monkeypatch.setenv("VARFLOW_S3_BUCKET", "of-the-environment")
    assert read_settings().s3_bucket == "of-the-environment"
    assert read_settings(s3_bucket="of-the-call").s3_bucket == "of-the-call"
    monkeypatch.setenv("VARFLOW_S3_BUCKET", "")
    assert read_settings().s3_bucket == "of-the-stack"


def test_local_credentials_never_go_to_another_server(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stack(bare / ".varflow")
    assert read_settings().s3_access_key == "local"
    monkeypatch.setenv("VARFLOW_S3_ENDPOINT", "https://minio.example:9000/")
    settings = read_settings()
    assert (settings.s3_endpoint, settings.s3_access_key, settings.s3_secret_key) == (
        "https://minio.example:9000",
        None,
        None,
    )
    assert not settings.is_local("s3") and settings.is_local("prefect")
    monkeypatch.setenv("VARFLOW_S3_ENDPOINT", "aws")
    settings = read_settings()
    assert (settings.s3_endpoint, settings.s3_access_key) == (None, None)
    assert "AWS_ACCESS_KEY_ID" not in settings.library_environment()


def test_a_foreign_endpoint_that_the_stack_was_started_with_is_found_by_another_shell(bare: Path) -> None:
    write_stack(bare / ".varflow", s3_endpoint="https://minio.example:9000")
    settings = read_settings()
    assert settings.s3_endpoint == "https://minio.example:9000"
    assert settings.s3_access_key is None


def test_every_fault_is_named_in_one_error_without_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARFLOW_S3_PORT", "60000")
    monkeypatch.setenv("VARFLOW_PREFECT_API_URL", "localhost:4200")
    monkeypatch.setenv("VARFLOW_S3_BUCKET", "No Bucket")
    monkeypatch.setenv("VARFLOW_S3_SECRET_KEY", SECRET)
    with pytest.raises(ValueError) as error:
        read_settings()
    text = str(error.value)
    assert "VARFLOW_S3_PORT: got '60000'; Input should be less than or equal to 55532" in text
    assert "VARFLOW_PREFECT_API_URL: got 'localhost:4200'; expected a URL" in text
    assert "VARFLOW_S3_BUCKET: got 'No Bucket'" in text
    assert SECRET not in text


def test_ports_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="mlflow_port=8335 and s3_port=8333 overlap; SeaweedFS takes 8333 to 8336"):
        read_settings(mlflow_port=8335)
    with pytest.raises(ValueError, match="overlap"):
        read_settings(prefect_port=18_333)


def test_half_a_pair_of_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARFLOW_S3_SECRET_KEY", SECRET)
    with pytest.raises(ValueError, match="only one of s3_access_key and s3_secret_key is set") as error:
        read_settings()
    assert SECRET not in str(error.value)


def test_a_broken_stack_file_says_what_to_do(bare: Path) -> None:
    write_stack(bare / ".varflow")
    (bare / ".varflow" / "stack.json").write_text("{")
    with pytest.raises(ValueError, match=r"stack\.json: not JSON .* remove it and start again"):
        read_settings()


def test_no_secret_in_the_text_or_the_json_of_settings(bare: Path) -> None:
    settings = read_settings(s3_access_key="key", s3_secret_key=SECRET, endpoint_key=SECRET)
    assert SECRET not in repr(settings) + str(settings) + settings.model_dump_json() + str(settings.model_dump())


def test_apply_exports_what_the_libraries_read(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "environ", dict(os.environ, MLFLOW_S3_ENDPOINT_URL="http://old", HTTPS_PROXY="http://proxy")
    )
    read_settings(s3_access_key="key", s3_secret_key=SECRET).apply()
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5500"
    assert os.environ["MLFLOW_S3_ENDPOINT_URL"] == "http://127.0.0.1:8333"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert os.environ["VARFLOW_HOME"] == str(bare / ".varflow")
    assert os.environ["NO_PROXY"] == "127.0.0.1,localhost"
    read_settings(s3_endpoint="aws").apply()
    assert "MLFLOW_S3_ENDPOINT_URL" not in os.environ


def test_another_process_reads_the_same_settings_from_the_environment_of_a_service(bare: Path) -> None:
    for changed in (
        {"s3_endpoint": "aws"},
        {"s3_port": 9000, "s3_prefix": "a/b", "s3_access_key": "k", "s3_secret_key": SECRET, "endpoint_key": SECRET},
    ):
        settings = read_settings(home=bare / "home", **changed)
        script = "from infra.settings import read_settings; s = read_settings(); print(s.model_dump_json()); print(*(key and key.get_secret_value() for key in (s.s3_secret_key, s.endpoint_key)))"
        done = subprocess.run(
            [sys.executable, "-P", "-c", script],
            env=settings.service_environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == [
            settings.model_dump_json(),
            f"{SECRET} {SECRET}" if "s3_secret_key" in changed else "None None",
        ]


def test_a_stray_variable_bends_no_local_server(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql://production")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5_0")
    environment = read_settings().service_environment()
    assert environment["NCCL_IB_HCA"] == "mlx5_0", "the worker hands it on"
    assert environment.keys().isdisjoint({"PREFECT_API_DATABASE_CONNECTION_URL", "AWS_PROFILE", "SOME_TOKEN"})
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert read_settings(s3_endpoint="aws").service_environment()["AWS_PROFILE"] == "work"


def test_a_compute_child_gets_no_credentials(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = {"NCCL_SOCKET_IFNAME": "ib0", "PYTORCH_ALLOC_CONF": "expandable_segments:True", "CC": "clang"}
    own = dict(os.environ, OMP_NUM_THREADS="3", SOME_TOKEN=SECRET, HF_TOKEN=SECRET, **passed)
    monkeypatch.setattr(os, "environ", own)
    read_settings(s3_access_key="key", s3_secret_key=SECRET, endpoint_key=SECRET).apply()
    environment = child_environment({"EXTRA": "1"})
    assert SECRET not in environment.values()
    assert not [name for name in environment if name.startswith(("AWS_", "MLFLOW_", "PREFECT_"))]
    assert (environment["OMP_NUM_THREADS"], environment["EXTRA"], environment["PYTHONSAFEPATH"]) == ("3", "1", "1")
    assert environment["PATH"] == os.environ["PATH"] and environment.items() >= passed.items()
    assert (environment["HF_HUB_OFFLINE"], environment["VLLM_NO_USAGE_STATS"]) == ("1", "1")


def test_the_key_of_a_judge_is_shown_nowhere_and_its_address_asked_for(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"VARFLOW_JUDGE_URL: not set; expected the address"):
        read_settings().require_judge_url()
    monkeypatch.setenv("VARFLOW_JUDGE_URL", "http://judge.example:8000/v1/")
    monkeypatch.setenv("VARFLOW_JUDGE_API_KEY", SECRET)
    settings = read_settings()
    given = {"VARFLOW_JUDGE_URL": "http://judge.example:8000/v1", "VARFLOW_JUDGE_API_KEY": SECRET}
    assert settings.require_judge_url() == given["VARFLOW_JUDGE_URL"]
    assert SECRET not in repr(settings) + settings.model_dump_json()
    assert SECRET not in child_environment({}).values()
    assert settings.service_environment().items() >= given.items(), "the worker hands it on"


@pytest.mark.parametrize("url", [f"http://me:{SECRET}@judge/v1", f"http://judge/v1?key={SECRET}", f"ftp://{SECRET}"])
def test_an_address_that_may_hold_a_secret_is_refused_without_showing_it(
    bare: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("VARFLOW_JUDGE_URL", url)
    with pytest.raises(ValueError, match=r"VARFLOW_JUDGE_URL: expected http:// or https://") as refusal:
        read_settings()
    assert SECRET not in str(refusal.value)


def test_reading_settings_loads_no_heavy_library() -> None:
    script = "import sys, infra.settings; print(sorted({'prefect', 'mlflow', 'torch', 'boto3'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
