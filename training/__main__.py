"""`python -m training JOB.json [LIFELINE_FD]`: run one job of this package, see training.job.

A job's module is imported when it is asked for, so that `ingest` starts without torch.
"""

import importlib
import sys
from collections.abc import Callable

from training.job import EXIT_USER_ERROR, Job, main

TARGETS = {
    "ingest": "training.data.ingest",
    "reward_model": "training.reward_model",
    "score_rewards": "training.reward.score",
    "score_reference": "training.reference",
    "train": "training.train",
    "preflight": "training.train:check",
    "generate": "training.generate",
    "import_model": "training.embedded",
}


def import_late(module: str) -> Callable[[Job], None]:
    """Return a function that imports `module` and calls its `run`, or what is named behind a colon, with the job."""
    path, _, name = module.partition(":")

    def run(job: Job) -> None:
        getattr(importlib.import_module(path), name or "run")(job)

    return run


JOBS = {name: import_late(module) for name, module in TARGETS.items()}

if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.stderr.write("usage: python -m training JOB.json [LIFELINE_FD]\n")
        sys.exit(EXIT_USER_ERROR)
    sys.exit(main(JOBS, sys.argv[1:]))
