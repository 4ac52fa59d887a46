"""What supervisord starts: `python -m infra.stack.launch SERVICE` becomes that service.

Before that it ends what is left of the service's last life. A server killed with -9 may leave a child of its own that still
holds the port, and the restart would fail for ever. A worker's children are runs, which may live on without it.
"""

import os
import sys

from infra.settings import read_settings
from infra.stack.processes import end_processes
from infra.stack.services import SERVICES, command

BULK_NICE = (
    15  # gigabytes of weights go to the store while the next step computes, to which 29 of 30 parts of a core are left
)


def main(name: str) -> None:
    """Replace this process by the service."""
    service = next(service for service in SERVICES if service == name)
    settings = read_settings()
    if service != "worker":
        end_processes(settings.home, service=service, grace_seconds=0)
    if service == "s3":
        os.nice(BULK_NICE)
    words = command(service, settings)
    os.execv(words[0], words)


if __name__ == "__main__":
    main(sys.argv[1])
