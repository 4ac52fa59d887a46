"""The command's manners: instant help, one message on an error, JSON alone on stdout; up, down and status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import explain
from infra.settings import Settings
from infra.stack import StackError

CALL = "from flows.cli import main; main()"


def varflow(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in an empty folder, with none of this machine's settings."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("VARFLOW_", "PREFECT_", "MLFLOW_"))
    }
    call = [sys.executable, "-c", CALL, *words]
    return subprocess.run(call, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)


def test_help_loads_no_heavy_library() -> None:
    heavy = {"prefect", "mlflow", "torch", "pandas", "boto3", "transformers", "pydantic_settings", "pyarrow", "plotly"}
    script = f"import sys, flows.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_the_verbs(tmp_path: Path) -> None:
    done = varflow("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("up", "down", "status"))


def test_version(tmp_path: Path) -> None:
    done = varflow("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.count(".")) == (0, 2)


def test_an_unknown_verb_is_a_usage_error(tmp_path: Path) -> None:
    done = varflow("upp", cwd=tmp_path)
    assert done.returncode == 2
    assert "No such command 'upp'" in done.stderr and done.stdout == ""


def test_a_wrong_setting_is_one_message_and_a_traceback_only_with_debug(tmp_path: Path) -> None:
    done = varflow("status", cwd=tmp_path, VARFLOW_MLFLOW_PORT="none", VARFLOW_S3_SECRET_KEY="geheim")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("varflow: ") and done.stderr.count("\n") == 1
    assert "VARFLOW_MLFLOW_PORT: got 'none'" in done.stderr
    debugged = varflow("status", "--debug", cwd=tmp_path, VARFLOW_MLFLOW_PORT="none", VARFLOW_S3_SECRET_KEY="geheim")
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr and done.stderr in debugged.stderr
    assert "geheim" not in done.stderr + debugged.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a.b: got 3, expected 4"), "a.b: got 3, expected 4"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "[Errno 2] No such file or directory: '/x'"),
        (StackError("port 4200 is taken"), "port 4200 is taken"),
        (KeyError("x"), "unexpected KeyError: 'x'; run the same again with --debug to see where, and report it"),
    ],
)
def test_a_foreseen_error_speaks_for_itself_and_another_is_called_ours(error: Exception, message: str) -> None:
    assert explain(error) == message


def test_status_of_no_stack_is_a_failure_and_makes_nothing(tmp_path: Path) -> None:
    done = varflow("status", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["healthy"] is False and found["home"] == str(tmp_path / ".varflow")
    assert list(tmp_path.iterdir()) == []


def test_down_of_no_stack_is_done(tmp_path: Path) -> None:
    done = varflow("down", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"stopped": [], "cancelled": [], "ended": []}
    assert list(tmp_path.iterdir()) == []


def test_status_and_a_second_up_of_a_running_stack(stack: Settings, tmp_path: Path) -> None:
    """The home alone is enough to find the stack, its ports and its credentials."""
    home = str(stack.home)
    done = varflow("status", "--json", cwd=tmp_path, VARFLOW_HOME=home)
    assert done.returncode == 0, done.stderr
    assert [service["state"] for service in json.loads(done.stdout)["services"]] == ["running"] * 4
    again = varflow("up", cwd=tmp_path, VARFLOW_HOME=home)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("the stack is up already")
    for url in (stack.prefect_ui_url, stack.mlflow_tracking_uri, stack.s3_endpoint):
        assert url and url in again.stdout
    assert stack.s3_secret_key is not None
    assert stack.s3_secret_key.get_secret_value() not in again.stdout + again.stderr + done.stdout + done.stderr
