"""Hostile programs: each is contained, none is counted as passed; honest ones pass."""

import gzip
import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from evaluation.harness import sandbox
from evaluation.harness.sandbox import (
    MAX_PROCESSES,
    REASON_CHARS,
    Ending,
    Outcome,
    SandboxError,
    check_sandbox,
    find_parents,
    list_parents,
    run_program,
)

SECONDS = 10.0
HOST_USER = sandbox.UNPRIVILEGED if os.getuid() == 0 else os.getuid()
PASSED = Outcome(Ending.passed, "passed")
FORK_BOMB = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"


def run(source: str, *, seconds: float = SECONDS) -> Outcome:
    return run_program(source, seconds=seconds)


def processes_of(user: int) -> list[str]:
    """Return the command lines of a user's living processes on this host."""
    found = []
    for process in psutil.process_iter(["uids", "cmdline", "status"]):
        uids, status = process.info["uids"], process.info["status"]
        if uids is not None and uids.effective == user and status != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"] or []))
    return found


def wait_for(condition: Callable[[], bool]) -> bool:
    """Return whether the condition came true within some seconds."""
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def nothing_left() -> bool:
    return not any("/python/bin" in command for command in processes_of(HOST_USER))


def test_the_probe_holds_here() -> None:
    check_sandbox()


def test_an_honest_program_passes_and_a_wrong_one_says_why() -> None:
    assert run("import collections, math, re, typing, heapq, hashlib\nassert 1 + 1 == 2") == PASSED
    assert run("assert 1 + 1 == 3, 'arithmetic'") == Outcome(Ending.assertion, "AssertionError: arithmetic")
    assert run("def f(:").reason.startswith("SyntaxError")
    assert run("import numpy").reason == "ModuleNotFoundError: No module named 'numpy'"
    assert run("input()").reason.startswith("EOFError")


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('passed')\nraise SystemExit",
        "import os; os.write(3, b'passed'); os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "class Sly(Exception):\n    __str__ = lambda self: 1 / 0\nraise Sly",
        "import os, sys\nos.write = lambda *_: 1\nsys.exit(0)",
        "import os\nfor fd in range(3, 32):\n    try: os.close(fd)\n    except OSError: pass",
    ],
    ids=["exit", "_exit", "prints", "writes", "kills itself", "sly error", "no write", "closes all"],
)
def test_nothing_but_coming_to_the_end_is_a_pass(source: str) -> None:
    assert not run(source).passed


def test_the_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)").reason.startswith(
            "ConnectionRefusedError"
        )
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    names = "import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']"
    assert run(names).passed
    assert not run("import socket; socket.create_connection(('198.51.100.1', 80), timeout=2)").passed


def test_host_files_can_neither_be_read_nor_written(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    assert run("open('/etc/shadow')").reason.startswith("FileNotFoundError")
    assert run(f"open({str(canary)!r})").reason.startswith("FileNotFoundError")
    assert not run(f"open({str(canary)!r}, 'w')").passed
    assert run("import os; open(os.__file__, 'a')").reason.startswith(("PermissionError", "OSError: [Errno 30]"))
    assert run("open('/new', 'w')").reason.startswith("OSError: [Errno 30] Read-only file system")
    assert run(
        "import os; assert set(os.listdir('/')) <= {'python', 'lib', 'lib64', 'usr', 'proc', 'dev', 'tmp'}"
    ).passed
    assert canary.read_text() == "untouched"


def test_no_environment_is_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_SECRET", "hunter2")
    own = "import os\nassert set(os.environ) <= {'PWD', 'LC_CTYPE', 'LD_LIBRARY_PATH'}"
    assert run(own) == PASSED
    # bubblewrap itself is process 1; what it was started with stays readable there
    every = "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n    assert 'CANARY' not in open(path).read()"
    assert run(every) == PASSED
    assert run("assert open('/proc/1/environ').read() == ''") == PASSED
    assert run("import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) == 2").passed


def test_root_here_is_nobody_there() -> None:
    assert run("import os\nassert (os.getuid(), os.getgid()) == (65534, 65534)").passed
    with ThreadPoolExecutor(1) as pool:  # seen from outside, where the host's own users are
        sleeping = pool.submit(run, "import time; time.sleep(2)")
        assert wait_for(lambda: not nothing_left())
        assert sleeping.result().passed
    powers = (
        "for line in open('/proc/self/status'):\n    assert not line.startswith('Cap') or int(line.split()[1], 16) == 0"
    )
    assert run(powers).passed
    assert run("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == -1, 'a user namespace'").passed


def test_a_fork_bomb_is_bounded_and_ends() -> None:
    outcome = run(FORK_BOMB, seconds=2.0)
    assert outcome == Outcome(Ending.timeout, "still running after 2 s")
    assert wait_for(nothing_left)
    count = "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(30)\n        n += 1\nexcept OSError: raise Exception(n)"
    assert 0 < int(run(count).reason.removeprefix("Exception: ")) <= MAX_PROCESSES


def test_children_left_behind_end_with_the_program() -> None:
    source = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n"
    assert run(source).passed
    assert wait_for(nothing_left)


@pytest.mark.parametrize(
    "source",
    ["import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)\nos.kill(-1, 9)\nos._exit(0)", "import os\nos.killpg(0, 9)"],
)
def test_the_parent_cannot_be_killed(source: str) -> None:
    assert not run(source).passed
    assert run("pass").passed


def test_output_is_bounded() -> None:
    assert run("while True:\n    print('x' * 100_000)", seconds=1.0) == Outcome(
        Ending.timeout, "still running after 1 s"
    )
    flood = "import os\nwhile True:\n    os.write(3, b'x' * 100_000)"  # our own channel, found by its number
    outcome = run(flood)
    assert not outcome.passed and len(outcome.reason) <= REASON_CHARS
    assert not run("open('big', 'wb').write(bytes(2**25))").passed


def test_a_memory_bomb_meets_its_limit() -> None:
    assert run("x = []\nwhile True:\n    x.append(bytearray(2**24))").reason.startswith("MemoryError")
    assert run("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))").reason.startswith("ValueError")


def test_memory_that_no_process_holds_is_refused() -> None:
    shared = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
while True:
    segment = libc.shmget(0, 2**26, 0o1600)
    if segment == -1:
        raise OSError(ctypes.get_errno(), "shmget")
    place = libc.shmat(segment, None, 0)
    ctypes.memset(place, 1, 2**26)
    libc.shmdt(ctypes.c_void_p(place))
"""
    assert run(shared) == Outcome(Ending.exception, "OSError: [Errno 38] shmget")
    assert run("import os\nwhile True: os.memfd_create('x')").reason == "OSError: [Errno 38] Function not implemented"


def test_processes_together_meet_one_limit_where_control_groups_can_be_made() -> None:
    source = """
import os, time
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        held = bytearray(300 * 2**20)
        for place in range(0, len(held), 4096): held[place] = 1
        time.sleep(3)
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children), "a child was killed"
"""
    outcome = run(source, seconds=30.0)
    killed = Outcome(Ending.assertion, "AssertionError: a child was killed")
    assert outcome == (killed if any("memory" in str(parent) for parent in find_parents()) else PASSED)
    assert [left for parent in find_parents() for left in parent.glob("varflow-sandbox-*")] == []


def test_control_groups_are_made_where_limits_are_handed_down(tmp_path: Path) -> None:
    (tmp_path / "memory" / "ours").mkdir(parents=True)
    (tmp_path / "pids").mkdir()
    first = "9:name=systemd:/\n8:pids:/elsewhere\n5:devices:/\n4:memory:/ours\n0::/\n"
    assert list(list_parents(tmp_path, first)) == [tmp_path / "pids", tmp_path / "memory" / "ours"]
    (tmp_path / "app.slice" / "ours.scope").mkdir(parents=True)
    (tmp_path / "app.slice" / "ours.scope" / "cgroup.subtree_control").write_text("\n")
    (tmp_path / "app.slice" / "cgroup.subtree_control").write_text("cpu memory pids\n")
    assert list(list_parents(tmp_path, "0::/app.slice/ours.scope\n")) == [tmp_path / "app.slice"]
    assert list(list_parents(tmp_path, "0::/\n")) == []


def test_a_fork_bomb_leaves_other_programs_their_processes() -> None:
    honest = "import os\nfor _ in range(50):\n    child = os.fork()\n    if child == 0: os._exit(0)\n    os.waitpid(child, 0)"
    with ThreadPoolExecutor(1) as pool:
        bomb = pool.submit(run, FORK_BOMB, seconds=5.0)
        assert wait_for(lambda: len(processes_of(HOST_USER)) > MAX_PROCESSES)
        assert run(honest) == PASSED
        assert not bomb.done()
        assert bomb.result().ending == Ending.timeout


def test_a_sandbox_that_does_not_stand_is_tried_again_and_then_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "RETRY_SECONDS", (0.01, 0.01))
    stand = sandbox.sandbox_command
    commands = [["/bin/false"], ["/bin/sh", "-c", "echo no more user namespaces >&2"]]
    monkeypatch.setattr(sandbox, "sandbox_command", lambda calls: commands.pop() if commands else stand(calls))
    assert run("pass") == PASSED and commands == []
    monkeypatch.setattr(sandbox, "sandbox_command", lambda _: ["/bin/sh", "-c", "echo no more user namespaces >&2"])
    with pytest.raises(SandboxError, match=r"did not come to stand \(no more user namespaces\)"):
        run("pass")
    monkeypatch.setattr(sandbox, "sandbox_command", lambda _: ["/bin/sh", "-c", "echo stands >&2"])
    with pytest.raises(SandboxError, match="before it had read the program"):
        run("#" * 2**20)


def test_a_slow_start_takes_nothing_of_a_program_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = sandbox.sandbox_command
    monkeypatch.setattr(
        sandbox, "sandbox_command", lambda calls: ["/bin/sh", "-c", 'sleep 2; exec "$@"', "sh", *stand(calls)]
    )
    assert run("pass", seconds=1.0) == PASSED


def test_how_a_program_failed_is_told() -> None:
    assert run("raise KeyError(3)") == Outcome(Ending.exception, "KeyError: 3")
    assert run("import os; os._exit(3)") == Outcome(Ending.exited, "exited with status 3 before its end")
    assert run("import os; os.kill(os.getpid(), 9)") == Outcome(Ending.killed, "killed by signal 9")


def test_time_is_bounded() -> None:
    assert run("import time; time.sleep(60)", seconds=1.0) == Outcome(Ending.timeout, "still running after 1 s")
    assert run("while True: pass", seconds=1.0) == Outcome(Ending.timeout, "still running after 1 s")


def test_without_a_working_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "RETRY_SECONDS", ())
    monkeypatch.setattr(sandbox, "sandbox_command", lambda _: ["/bin/false"])
    with pytest.raises(ValueError, match=r"never run without it.*kernel\.unprivileged_userns_clone"):
        check_sandbox()
    monkeypatch.setattr(sandbox, "sandbox_command", lambda _: ["/no/such/bwrap"])
    with pytest.raises(ValueError, match=r"sandbox: does not hold here \(.*No such file"):
        check_sandbox()


def test_a_sandbox_that_leaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    contained = sandbox.sandbox_command
    monkeypatch.setattr(sandbox, "sandbox_command", lambda calls: [a for a in contained(calls) if a != "--unshare-net"])
    with pytest.raises(ValueError, match="the host's loopback answers"):
        check_sandbox()
    monkeypatch.setattr(
        sandbox, "sandbox_command", lambda calls: [a for a in contained(calls) if a not in ("--seccomp", str(calls))]
    )
    with pytest.raises(ValueError, match="shared memory that no limit counts"):
        check_sandbox()


def test_frame_inspection_can_forge_a_pass_as_the_docstring_admits() -> None:
    forged = "import os, sys\nours = sys._getframe(1).f_globals\nos.write(ours['answer'], ours['secret'])\nos._exit(1)"
    assert run(forged).passed
    assert "walks the frames" in (sandbox.__doc__ or "")


@pytest.mark.slow
def test_every_canonical_solution_passes(real_data: Path) -> None:
    check_sandbox()
    with gzip.open(real_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        problems = [json.loads(line) for line in lines]
    programs = [f"{p['prompt']}{p['canonical_solution']}\n{p['test']}\ncheck({p['entry_point']})" for p in problems]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda source: run(source, seconds=30.0), programs))
    assert [o for o in outcomes if not o.passed] == []
    assert len(outcomes) == 164
