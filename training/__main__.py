"""`python -m training JOB.json [LIFELINE_FD]`: run one job of this package, see training.job.

A job's module is imported when it is asked for, so that `ingest` starts without torch.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from training.config import Runtime
from training.job import EXIT_USER_ERROR, Job, main

TARGETS = {
    "ingest": "training.data.ingest",
    "reward_model": "training.reward_model",
    "score_rewards": "training.reward.score",
    "score_reference": "training.reference",
    "score_cross": "training.cross",
    "score_tokens": "training.token_scores",
    "train": "training.train",
    "preflight": "training.train:check",
    "generate": "training.generate",
    "import_model": "training.embedded",
}


RANKED = {"train", "preflight", "reward_model"}  # what several ranks can share


def import_late(name: str, target: str) -> Callable[[Job], None]:
    """Return a function that imports a target and calls its `run`, or what is named behind a colon, on as many ranks as asked for."""
    module, _, function = target.partition(":")

    def run(job: Job) -> None:
        runtime = Runtime.model_validate(job.runtime)
        if name in RANKED and runtime.world_size > 1 and not is_rank():
            importlib.import_module("training.launch").launch(job, runtime)
        else:
            getattr(importlib.import_module(module), function or "run")(job)

    return run


def find_ranks(job: Job) -> Sequence[int]:
    """Return which of a machine's ranks this process is, where torchrun has started it, or else will start."""
    ranks = job.runtime.get("ranks", 1)
    if job.name not in RANKED or (ranks, job.runtime.get("nodes", 1)) == (1, 1):
        return [0]
    if is_rank():
        from torch.distributed import get_node_local_rank

        return [get_node_local_rank()]
    return range(max(1, ranks)) if isinstance(ranks, int) else [0]  # none, or fewer, the job refuses


def is_rank() -> bool:
    """Say whether torch's launcher has started this process."""
    from torch.distributed import is_torchelastic_launched

    return is_torchelastic_launched()


JOBS = {name: import_late(name, module) for name, module in TARGETS.items()}

if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.stderr.write("usage: python -m training JOB.json [LIFELINE_FD]\n")
        sys.exit(EXIT_USER_ERROR)
    status = main(JOBS, sys.argv[1:], find_ranks=find_ranks)
    # On its way out a rank would wait for others that are gone.
    if status and "torch.distributed" in sys.modules and is_rank():
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
