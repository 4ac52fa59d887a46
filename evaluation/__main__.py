"""What a parent starts: `python -m evaluation JOB.json [LIFELINE_FD]` (training.job says what is in the file)."""

import sys

from training.job import Job, main


def benchmark(job: Job) -> None:
    """Run one benchmark; torch and lm-eval are imported only now."""
    from evaluation.benchmark import run

    run(job)


if __name__ == "__main__":
    sys.exit(main({"benchmark": benchmark}, sys.argv[1:]))
