"""The four services: their command lines, ports and what supervisord is told about them."""

import json
import socket
import sys
from pathlib import Path

from infra.settings import GRPC_OFFSET, LOOPBACK, Service, Settings
from infra.stack.processes import SERVICE_MARK
from infra.stack.state import run_folder, write_private

SERVICES: tuple[Service, ...] = ("s3", "prefect", "mlflow", "worker")
TITLES: dict[Service, str] = {
    "s3": "S3 (SeaweedFS)",
    "prefect": "Prefect",
    "mlflow": "MLflow",
    "worker": "Prefect worker",
}
STOP_SECONDS: dict[Service, int] = {"s3": 30, "prefect": 15, "mlflow": 10, "worker": 30}  # weed takes 15 s, always
HEARTBEAT_SECONDS = 10
POLL_SECONDS = 2


def command(service: Service, settings: Settings) -> list[str]:
    """Give the command line of a service. None holds a secret: everybody may read it."""
    return {"s3": _weed, "prefect": _prefect, "mlflow": _mlflow, "worker": _worker}[service](settings)


def _weed(settings: Settings) -> list[str]:
    ports, sockets = settings.weed_ports, run_folder(settings.home)
    return [
        str(Path(sys.executable).parent / "weed"),
        "server",
        f"-dir={settings.home / 's3'}",
        f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}",
        "-s3",
        f"-s3.port={ports['s3']}",
        f"-master.port={ports['master']}",
        f"-volume.port={ports['volume']}",
        f"-filer.port={ports['filer']}",
        f"-s3.config={settings.home / 's3.json'}",
        f"-s3.localSocket={sockets / 's3.sock'}",
        f"-filer.localSocket={sockets / 'filer.sock'}",
        "-s3.autoCreateBucket=false",  # a misspelt bucket is an error, not a new bucket
        "-master.volumeSizeLimitMB=256",
        "-volume.max=0",  # as many volumes as the disk holds
        "-volume.minFreeSpace=1GiB",  # writes fail before the disk is full
        "-volume.preStopSeconds=0",
        "-master.electionTimeout=1s",  # one master: a restart would wait the default of 10 s for nobody
        "-disableHttp",  # without this and the next, files are written and deleted without credentials
        "-filer.disableHttp",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
    ]


def _prefect(settings: Settings) -> list[str]:
    return [*_python("prefect"), "server", "start", "--host", LOOPBACK, "--port", str(settings.prefect_port)]


def _mlflow(settings: Settings) -> list[str]:
    root = "/".join(part for part in (settings.s3_bucket, settings.s3_prefix, "mlflow") if part)
    return [
        *_python("mlflow"),
        "server",
        *("--host", LOOPBACK, "--port", str(settings.mlflow_port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{settings.home / 'mlflow' / 'mlflow.db'}"),
        *("--default-artifact-root", f"s3://{root}", "--no-serve-artifacts"),
    ]


def _worker(settings: Settings) -> list[str]:
    return [
        *_python("prefect"),
        *("worker", "start", "--type", "process", "--pool", settings.work_pool, "--name", worker_name()),
        *("--install-policy", "never"),
    ]


def _python(module: str) -> list[str]:
    """Run a module of this environment; -P keeps the working directory from standing in for a package."""
    return [sys.executable, "-P", "-m", module]


def worker_name() -> str:
    """Name this machine's worker, the same after a restart."""
    return f"varflow-{socket.gethostname()}"


def ports(service: Service, settings: Settings) -> dict[int, str]:
    """Give each port a service listens on, with the setting that moves it."""
    if service == "s3":
        bases = settings.weed_ports.values()
        return {port: "VARFLOW_S3_PORT" for base in bases for port in (base, base + GRPC_OFFSET)}
    if service == "worker":
        return {}
    return {getattr(settings, f"{service}_port"): f"VARFLOW_{service.upper()}_PORT"}


def environment(settings: Settings) -> dict[str, str]:
    """Give the environment of supervisord, which all services inherit. Holds the S3 credentials."""
    return settings.service_environment() | {
        "PYTHONUNBUFFERED": "1",
        "PREFECT_LOGGING_COLORS": "false",
        # any page in the user's browser could start flows, were every origin allowed as by default
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(
            f"http://{host}:{settings.prefect_port}" for host in (LOOPBACK, "localhost")
        ),
        "PREFECT_WORKER_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": str(POLL_SECONDS),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # unused here, and it costs eight processes and 18 s
    }


def write_configuration(settings: Settings) -> Path:
    """Write what supervisord and SeaweedFS read, and make their folders. Returns supervisord's file."""
    home = settings.home
    for name in ("logs", "s3", "prefect", "mlflow"):
        (home / name).mkdir(exist_ok=True, mode=0o700)
    if settings.s3_secret_key is not None and settings.is_local("s3"):
        key = {"accessKey": settings.s3_access_key, "secretKey": settings.s3_secret_key.get_secret_value()}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "varflow", "credentials": [key], "actions": actions}
        write_private(home / "s3.json", json.dumps({"identities": [identity]}))
    path = home / "supervisord.conf"
    write_private(path, supervisor_configuration(settings))
    return path


def supervisor_configuration(settings: Settings) -> str:
    """Give supervisord's configuration. Its paths are relative to the home, whose name then needs no quoting."""
    socket_path = str(run_folder(settings.home) / "supervisor.sock").removeprefix(f"{settings.home}/")
    sections = [
        f"[unix_http_server]\nfile={socket_path}\nchmod=0700",
        "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        "[supervisord]\ndirectory=.\npidfile=supervisord.pid\nlogfile=logs/supervisord.log\n"
        "logfile_maxbytes=5MB\nlogfile_backups=2\numask=077\nchildlogdir=logs",
    ]
    interpreter = sys.executable.replace("%", "%%")
    for service in SERVICES:
        sections.append(
            f"[program:{service}]\n"
            f'command="{interpreter}" -P -m infra.stack.launch {service}\n'
            f'environment={SERVICE_MARK}="{service}"\n'
            "directory=.\nautostart=false\nautorestart=true\nstartsecs=10\nstartretries=20\n"
            f"stopwaitsecs={STOP_SECONDS[service]}\nkillasgroup=true\nredirect_stderr=true\n"
            f"stdout_logfile=logs/{service}.log\nstdout_logfile_maxbytes=10MB\nstdout_logfile_backups=3"
        )
    return "\n\n".join(sections) + "\n"
