"""Where the servers are and where the data lies: the one reader of the environment.

A field takes, in this order, what the caller passes, the variable `VARFLOW_<FIELD>`, what the running local stack wrote into
its home (`stack.json`, `credentials.json`), the default. So another S3, Prefect or MLflow is a matter of one variable
each, and a second shell finds the stack that the first one started.

Importing this is cheap: neither Prefect nor MLflow nor boto3 is loaded, since `apply` has to come before them.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

LOOPBACK = "127.0.0.1"
GRPC_OFFSET = 10_000  # SeaweedFS opens port + 10000 beside every port
MAX_WEED_PORT = 65_535 - GRPC_OFFSET
STACK_MARK = (
    "VARFLOW_STACK"  # in the environment of all that the local stack starts, however deep; the value is its home
)
PREFECT_PORT, MLFLOW_PORT, S3_PORT = 4200, 5500, 8333
CHILD_VARIABLES = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV",
    "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "TORCH_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CC", "CXX",
    "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", STACK_MARK,
)  # fmt: skip
NCCL_PREFIX = "NCCL_"  # of variables that say how the GPUs of a cluster meet: which interface, which cards
# What a compute child has besides. GNU's OpenMP, torch's on Linux, reads when it is loaded how often a thread looks for work before it sleeps: its own
# 300,000 times hold a core for 4 ms, which the threads of attention then lack (training/segments.py).
COMPUTE_VARIABLES = {"GOMP_SPINCOUNT": "10000"}

# MLflow is a mirror: while it is away a run waits for it for seconds at a time, and not for minutes as MLflow's client does on its own.
MLFLOW_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")

MAY_HOLD_SECRETS = {
    "s3_access_key",
    "s3_secret_key",
    "endpoint_key",
    "judge_api_key",
    "judge_url",
}  # as they were given

Service = Literal["s3", "prefect", "mlflow", "worker"]


class Settings(BaseSettings):
    """The places varflow works with. Secrets never show in its text form, its errors or its JSON."""

    model_config = SettingsConfigDict(
        env_prefix="VARFLOW_", env_ignore_empty=True, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    home: Path = Field(
        description="data directory: state, logs and credentials of the local stack, scratch of the steps"
    )
    s3_endpoint: str | None = Field(
        description="URL of the S3 server; `aws` for Amazon's own; default: the local stack's"
    )
    s3_bucket: str = Field("varflow", min_length=3, max_length=63, pattern=r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$")
    s3_prefix: str = Field("", description="folder within the bucket; empty: the bucket's root")
    s3_region: str = "us-east-1"
    s3_access_key: str | None = Field(
        None, description="unset: the local stack's, or boto3's own search for another S3"
    )
    s3_secret_key: SecretStr | None = None
    endpoint_key: SecretStr | None = Field(
        None, description="key of the endpoint that benchmarks ask; unset: it takes none"
    )
    prefect_api_url: str = Field(description="e.g. http://127.0.0.1:4200/api; default: the local stack's")
    mlflow_tracking_uri: str = Field(description="e.g. http://127.0.0.1:5500; default: the local stack's")
    judge_url: str | None = Field(
        None,
        description="OpenAI-compatible endpoint of a judge, e.g. http://127.0.0.1:8000/v1; its key is judge_api_key",
    )
    judge_api_key: SecretStr | None = None
    prefect_port: int = Field(PREFECT_PORT, ge=1, le=65_535)
    mlflow_port: int = Field(MLFLOW_PORT, ge=1, le=65_535)
    s3_port: int = Field(
        S3_PORT, ge=1, le=MAX_WEED_PORT - 3, description="SeaweedFS also takes the next three, and all + 10000"
    )
    hub_endpoint: str | None = Field(
        None,
        description="URL of the Hugging Face hub or of a mirror that speaks its protocol; default: HF_ENDPOINT, or the hub",
    )
    work_pool: str = "varflow"
    usd_per_hour: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="price of an hour of one device, of the machine where it computes on its CPU; default: of a known accelerator the "
        "assumed one of training/devices.py, of a CPU none",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Name the sources, strongest first."""
        return init_settings, env_settings, LocalStackSource(settings_cls)

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_local_stack(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Derive from the ports what nothing else has set."""
        prefect = f"http://{LOOPBACK}:{values.get('prefect_port', PREFECT_PORT)}/api"
        mlflow = f"http://{LOOPBACK}:{values.get('mlflow_port', MLFLOW_PORT)}"
        s3 = f"http://{LOOPBACK}:{values.get('s3_port', S3_PORT)}"
        return {"prefect_api_url": prefect, "mlflow_tracking_uri": mlflow, "s3_endpoint": s3} | values

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @field_validator("s3_endpoint", mode="before")
    @classmethod
    def _aws_has_no_endpoint(cls, value: str | None) -> str | None:
        return None if value is None or value.lower() == "aws" else value

    @field_validator("s3_endpoint", "prefect_api_url", "mlflow_tracking_uri", "hub_endpoint")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("expected a URL that starts with http:// or https://")
        return value.rstrip("/") if value else value

    @field_validator("judge_url")
    @classmethod
    def _bare_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.password or url.query:
            raise ValueError(
                "expected http:// or https://, a host and a path, without a name, password or query; the key belongs in VARFLOW_JUDGE_API_KEY"
            )
        return value.rstrip("/")

    @field_validator("s3_prefix")
    @classmethod
    def _without_slashes_at_the_ends(cls, value: str) -> str:
        return value.strip("/")

    @model_validator(mode="after")
    def _keys_come_in_pairs(self) -> Self:
        if (self.s3_access_key is None) != (self.s3_secret_key is None):
            raise ValueError("only one of s3_access_key and s3_secret_key is set; set both or neither")
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        bases = self.weed_ports.values()
        taken = {self.prefect_port, self.mlflow_port, *bases, *(base + GRPC_OFFSET for base in bases)}
        if len(taken) < 2 + 2 * len(bases):
            raise ValueError(
                f"prefect_port={self.prefect_port}, mlflow_port={self.mlflow_port} and s3_port={self.s3_port} overlap; "
                f"SeaweedFS takes {self.s3_port} to {self.s3_port + len(bases) - 1}, and the same + {GRPC_OFFSET}"
            )
        return self

    @property
    def weed_ports(self) -> dict[str, int]:
        """Name each port SeaweedFS listens on, besides the same + 10000 for gRPC."""
        return {name: self.s3_port + i for i, name in enumerate(("s3", "master", "volume", "filer"))}

    @property
    def prefect_ui_url(self) -> str:
        """Give the address of Prefect's pages: a run's is this + `/runs/flow-run/<id>`."""
        return self.prefect_api_url.removesuffix("/api")

    def local_url(self, service: Service) -> str:
        """Give the URL at which the local stack serves `service` (the worker's is its Prefect's)."""
        ports = {
            "s3": self.s3_port,
            "prefect": self.prefect_port,
            "worker": self.prefect_port,
            "mlflow": self.mlflow_port,
        }
        return f"http://{LOOPBACK}:{ports[service]}" + ("/api" if service in ("prefect", "worker") else "")

    def is_local(self, service: Service) -> bool:
        """Tell whether `service` belongs to the local stack. A worker is local always: it is what runs on this machine."""
        urls = {"s3": self.s3_endpoint, "prefect": self.prefect_api_url, "mlflow": self.mlflow_tracking_uri}
        return service == "worker" or urls[service] == self.local_url(service)

    def library_environment(self) -> dict[str, str]:
        """Say in the variables of Prefect, MLflow and boto3 what these settings say. Holds the S3 credentials."""
        variables = {
            "PREFECT_API_URL": self.prefect_api_url,
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_LEVEL": self.log_level,
            "PREFECT_LOGGING_EXTRA_LOGGERS": "varflow",  # our warnings stand on the run's page
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "DO_NOT_TRACK": "1",
            "MLFLOW_TRACKING_URI": self.mlflow_tracking_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            **{name: os.environ.get(name, value) for name, value in MLFLOW_PATIENCE.items()},
            "AWS_DEFAULT_REGION": self.s3_region,
        }
        if self.is_local("prefect"):  # else the user's own profile, which may hold the key of that server
            variables["PREFECT_HOME"] = str(self.home / "prefect")
        if self.s3_endpoint is not None:
            variables["MLFLOW_S3_ENDPOINT_URL"] = self.s3_endpoint
        if self.s3_access_key is not None and self.s3_secret_key is not None:
            variables["AWS_ACCESS_KEY_ID"] = self.s3_access_key
            variables["AWS_SECRET_ACCESS_KEY"] = self.s3_secret_key.get_secret_value()
        if any(name in os.environ for name in PROXY_VARIABLES):
            exempt = ",".join(
                filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), LOOPBACK, "localhost"))
            )
            variables |= {"NO_PROXY": exempt, "no_proxy": exempt}
        return variables

    def apply(self) -> None:
        """Export `library_environment` to this process. Call it before prefect or mlflow is imported."""
        if self.s3_endpoint is None:
            os.environ.pop("MLFLOW_S3_ENDPOINT_URL", None)
        os.environ.update(self.library_environment() | {"VARFLOW_HOME": str(self.home)})

    def own_environment(self) -> dict[str, str]:
        """Give the `VARFLOW_*` variables from which another process reads these same settings. Holds all keys."""
        values = self.model_dump() | {"s3_endpoint": self.s3_endpoint or "aws"}
        plain = {name: v.get_secret_value() if isinstance(v, SecretStr) else v for name, v in values.items()}
        return {f"VARFLOW_{name.upper()}": str(value) for name, value in plain.items() if value is not None}

    def require_judge_url(self) -> str:
        """Give the address of a judge's endpoint, or raise ValueError."""
        if self.judge_url is None:
            raise ValueError(
                "VARFLOW_JUDGE_URL: not set; expected the address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1, "
                "and its key, if it wants one, in VARFLOW_JUDGE_API_KEY"
            )
        return self.judge_url

    def service_environment(self) -> dict[str, str]:
        """Give the environment of the local stack: an allow-list, so that no stray variable bends a server of ours.

        Variables of Prefect, MLflow and AWS pass only where that server is another one, which may need them.
        """
        foreign: dict[str, Service] = {"PREFECT_": "prefect", "MLFLOW_": "mlflow", "AWS_": "s3"}
        passed = [prefix for prefix, service in foreign.items() if not self.is_local(service)] + ["HF_"]
        environment = pick_allowed(*passed)
        own_programs = str(Path(sys.executable).parent)  # Prefect's worker starts `python` by name
        environment["PATH"] = f"{own_programs}{os.pathsep}{environment.get('PATH', os.defpath)}"
        return environment | self.library_environment() | self.own_environment() | {STACK_MARK: str(self.home)}


class LocalStackSource(PydanticBaseSettingsSource):
    """What the local stack of the home wrote: its ports and settings, and its credentials if the S3 in use is its own."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Give nothing for a single field: the files are read as a whole."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Read the files of the home that the stronger sources name, or the one found from the working directory."""
        stronger = self.current_state
        home = Path(stronger.get("home") or find_home()).expanduser().resolve()
        values = {"home": home} | read_object(home / "stack.json")
        merged = values | stronger
        endpoint = merged.get("s3_endpoint")
        if endpoint not in (None, f"http://{LOOPBACK}:{merged.get('s3_port', S3_PORT)}"):
            return values  # never hand the local stack's credentials to another server
        if stronger.keys() & {"s3_access_key", "s3_secret_key"}:
            return values
        return values | read_object(home / "credentials.json")


def read_settings(**overrides: Any) -> Settings:
    """Read the settings, or raise one ValueError that names every variable at fault and no value of a secret."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            name = str(fault["loc"][0]) if fault["loc"] else ""
            where = f"VARFLOW_{name.upper()}: " if name else ""
            got = f"got {fault['input']!r}; " if name in Settings.model_fields and name not in MAY_HOLD_SECRETS else ""
            faults.append(f"{where}{got}{fault['msg'].removeprefix('Value error, ')}")
        raise ValueError("; ".join(faults) + "; correct it, or unset it to use the local stack's") from None


def find_home() -> Path:
    """Give the nearest `.varflow` folder from the working directory upwards, or the one to be made here."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".varflow").is_dir():
            return folder / ".varflow"
    return here / ".varflow"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, {} where there is no such file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); it is written by `varflow up`: remove it and start again"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: got {type(value).__name__}, expected an object; remove it and run `varflow up` again"
        )
    return value


def pick_allowed(*prefixes: str) -> dict[str, str]:
    """Give the variables that a child may have, and those with one of some prefixes."""
    passed = (NCCL_PREFIX, *prefixes)
    return {name: value for name, value in os.environ.items() if name in CHILD_VARIABLES or name.startswith(passed)}


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Give the environment of a compute child: an allow-list of this one's and `extra`, no credentials, no server's URL.

    `PYTHONSAFEPATH` keeps a folder of the child's working directory from being imported in place of a package. A child reads what
    its inputs hold and asks no hub; what it starts itself, as vLLM its engines, sends nobody statistics. COMPUTE_VARIABLES make it faster.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return pick_allowed() | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | quiet | COMPUTE_VARIABLES | dict(extra)
