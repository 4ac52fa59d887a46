"""The local stack: SeaweedFS, a Prefect server, an MLflow server and one Prefect worker, as one supervised daemon group."""

from infra.stack.lifecycle import SERVICES, down, status, up
from infra.stack.state import DownReport, ServiceStatus, StackError, StackStatus

__all__ = ["SERVICES", "DownReport", "ServiceStatus", "StackError", "StackStatus", "down", "status", "up"]
