"""SeaweedFS alone, through the same `up` as the whole stack."""

import json
import stat
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from infra.settings import Settings, read_settings
from infra.stack import StackError, down, status, up
from infra.stack.processes import find_processes
from infra.store import Store, StoreError
from tests.stack_fixture import make_settings


def open_store(settings: Settings, *, secret_key: str | None = None) -> Store:
    assert settings.s3_secret_key is not None
    return Store(
        bucket=settings.s3_bucket,
        endpoint=settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=secret_key or settings.s3_secret_key.get_secret_value(),
    )


def test_the_store_serves_what_was_put_and_keeps_its_conditions(s3: Settings) -> None:
    store = open_store(s3)
    store.put("test_stack_s3/a", b"bytes")
    answer = store.get("test_stack_s3/a")
    assert answer is not None and answer[0] == b"bytes"
    store.probe()


def test_a_wrong_secret_is_refused(s3: Settings) -> None:
    with pytest.raises(StoreError, match="refused the credentials"):
        open_store(s3, secret_key="0" * 40).get("test_stack_s3/a")


def test_no_port_of_the_store_answers_without_credentials(s3: Settings) -> None:
    for port in s3.weed_ports.values():
        for method in ("PUT", "DELETE"):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/varflow/x", data=b"x", method=method)
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(request, timeout=5)
            assert refusal.value.code >= 400
    assert open_store(s3).get("x") is None


def test_a_misspelt_bucket_is_an_error_and_no_new_bucket(s3: Settings) -> None:
    store = open_store(s3.model_copy(update={"s3_bucket": "varfolw"}))
    with pytest.raises(StoreError, match="does not exist"):
        store.put("a", b"x")


def test_secrets_lie_in_private_files_and_in_no_command_line_or_log(s3: Settings) -> None:
    assert s3.s3_secret_key is not None
    secret = s3.s3_secret_key.get_secret_value()
    assert json.loads((s3.home / "credentials.json").read_text())["s3_secret_key"] == secret
    for name in ("credentials.json", "s3.json", "supervisord.conf"):
        assert stat.S_IMODE((s3.home / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE((s3.home / "run").stat().st_mode) == 0o700
    for log in (s3.home / "logs").iterdir():
        assert secret not in log.read_text(errors="replace"), log
    commands = [" ".join(process.cmdline()) for process in find_processes(s3.home)]
    assert any("supervisor" in command for command in commands)  # in no order: pids start over
    assert not any(secret in command for command in commands)


def test_another_shell_finds_the_stack_by_its_home_alone(s3: Settings) -> None:
    found = read_settings(home=s3.home)
    assert found == s3


def test_another_port_than_the_running_stack_has_is_refused(s3: Settings) -> None:
    moved = s3.model_copy(update={"prefect_port": 29_999, "prefect_api_url": "http://127.0.0.1:29999/api"})
    with pytest.raises(StackError, match=r"prefect_port=\d+, these settings say 29999; run `varflow down` first"):
        up(moved, services=("s3",))
    assert status(s3).services[0].healthy


def test_a_taken_port_names_its_owner_and_its_setting_and_nothing_is_left(s3: Settings, tmp_path: Path) -> None:
    rival = make_settings(tmp_path / "home").model_copy(update={"s3_port": s3.s3_port, "s3_endpoint": s3.s3_endpoint})
    weed = next(p for p in find_processes(s3.home) if p.name() == "weed")
    with pytest.raises(StackError) as error:
        up(rival, services=("s3",))
    assert f"port {s3.s3_port} of S3 (SeaweedFS) is taken by pid {weed.pid} (" in str(error.value)
    assert "set VARFLOW_S3_PORT" in str(error.value)
    assert find_processes(rival.home) == []
    assert not (rival.home / "stack.json").exists()


def test_down_of_a_stack_that_never_was_makes_nothing(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "home")
    assert down(settings).stopped == ()
    assert not settings.home.exists()


def test_everything_killed_in_a_deep_home_comes_up_again_with_its_data(tmp_path: Path) -> None:
    """The home is too deep for a socket in it, has a space and a percent sign, and its pid file is another process's."""
    settings = make_settings(tmp_path / ("deep " * 12) / "100%" / "home")
    try:
        first = up(settings, services=("s3",))
        open_store(first.settings).put("kept", b"data")
        running = find_processes(settings.home)
        for process in running:
            process.kill()
        psutil.wait_procs(running, timeout=10)  # those found before: one that is going has its ports for a moment more
        (settings.home / "supervisord.pid").write_text(str(psutil.Process().pid))
        second = up(settings, services=("s3",))
        assert second.started == ("s3",)
        assert second.settings == first.settings
        answer = open_store(second.settings).get("kept")
        assert answer is not None and answer[0] == b"data"
    finally:
        down(settings)
    assert find_processes(settings.home) == []
