"""Two hosts: network namespaces of this machine with a cable between them, each with loopback, ports and an address of its own."""

import os
import subprocess
from collections.abc import Iterator

import pytest

ADDRESSES = ("198.51.100.1", "198.51.100.2")  # of RFC 5737: for examples, never routed


class Host:
    """A network namespace; what is started in it sees its own loopback and one end of the cable."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address, self.cable = name, address, f"{name}c"
        self.enter = ("nsenter", f"--net=/run/netns/{name}")

    def ip(self, *arguments: str) -> None:
        run("ip", "-n", self.name, *arguments)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Give two hosts that reach each other and nothing else."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        pytest.skip("makes network namespaces: needs root and a kernel that lets it")
    first, second = pair = tuple(Host(f"vf{os.getpid()}{n}", address) for n, address in enumerate(ADDRESSES))
    try:
        for host in pair:
            run("ip", "netns", "add", host.name)
            host.ip("link", "set", "lo", "up")
        first.ip("link", "add", first.cable, "type", "veth", "peer", "name", second.cable, "netns", second.name)
        for host in pair:
            host.ip("address", "add", f"{host.address}/24", "dev", host.cable)
            host.ip("link", "set", host.cable, "up")
        yield first, second
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)
