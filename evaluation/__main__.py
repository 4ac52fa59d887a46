"""What a parent starts: `python -m evaluation JOB.json [LIFELINE_FD]` (training.job says what is in the file)."""

import sys

from training.job import EXIT_USER_ERROR, Job, main


def benchmark(job: Job) -> None:
    """Run one benchmark; its modules are imported only now."""
    from evaluation.harness.benchmark import run

    run(job)


def judge(job: Job) -> None:
    """Have a judge compare answers."""
    from evaluation.judges.judging import run

    run(job)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.stderr.write("usage: python -m evaluation JOB.json [LIFELINE_FD]\n")
        sys.exit(EXIT_USER_ERROR)
    sys.exit(main({"benchmark": benchmark, "judge": judge}, sys.argv[1:]))
