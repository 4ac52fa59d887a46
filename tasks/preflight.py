"""The checks that precede training, alone: a child that trains nothing."""

import json
import shutil
from typing import Any

from infra.settings import child_environment
from tasks.artifacts import lock_folder
from tasks.child import ChildJob, run_child
from tasks.execute import Execution, thread_environment
from tasks.mirror import listener
from tasks.step import Planned
from training.preflight.findings import FILE as PREFLIGHT_FILE


def preflight(run: Execution, training: Planned) -> dict[str, Any]:
    """Make the checks of a planned training step, whose inputs are there, and return what they found.

    It is about this machine as much as about the data, so nothing is recorded and nothing is found from an earlier time.
    """
    folder = run.settings.home / "work" / "preflight" / training.fingerprint
    if hear := listener.get():
        hear.started("preflight")
    with lock_folder(folder) as lock:
        shutil.rmtree(folder)
        folder.mkdir()
        job = ChildJob(
            package="training",
            name="preflight",
            config=training.config.model_dump(mode="json"),
            runtime=training.runtime.model_dump(mode="json"),
            inputs=run.input_folders(training),
            folder=folder,
            environment=child_environment(thread_environment(training.runtime.threads)),
        )
        run_child(job, keep_fds=(lock,), on_metrics=lambda _: None)
        found: dict[str, Any] = json.loads((job.output / PREFLIGHT_FILE).read_text())
        shutil.rmtree(folder)
    if hear:
        hear.finished("preflight", cached=False, seconds=found["seconds"])
    return found
