"""What accelerators can do and cost: the vendors' data sheets and assumed prices; and what this machine's CPU was measured at.

Peaks are dense (no structured sparsity), in operations a second. Memory is what a program sees, a little below the name on
the box. Prices are typical on-demand prices of one device at specialised clouds as of PRICES_AS_OF: an assumption to plan
with, not an offer; give your own with `--usd-per-hour` or VARFLOW_USD_PER_HOUR. The table needs no torch.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.config import Precision

if TYPE_CHECKING:
    import torch

PRICES_AS_OF = "2025-10"
GEMM_SIZE = 1024
GEMM_SECONDS = 0.25  # bound on what measuring costs


@dataclass(frozen=True)
class Price:
    """What an hour of one device costs, of the whole machine where it computes on its CPU, and where this is known from."""

    usd_per_hour: float
    basis: str


@dataclass(frozen=True)
class Accelerator:
    """One kind of device. `pattern` holds the words that torch's name of it has, all of them."""

    name: str
    pattern: tuple[str, ...]
    memory_gib: float
    bf16_flops: float
    tf32_flops: float
    fp32_flops: float
    usd_per_hour: float

    def peak_flops(self, precision: Precision) -> float:
        """Return the peak of matrix products as the engine runs them: in bfloat16, or in float32 as torch is set to."""
        import torch

        if precision == Precision.bfloat16:
            return self.bf16_flops
        return self.fp32_flops if torch.get_float32_matmul_precision() == "highest" else self.tf32_flops


NOT_WHOLE = ("MIG", "LAPTOP", "MAX-Q")  # in a name: a part of such a device, or a smaller one that is called so
# More words come first: "A100 80GB PCIe" before "A100".
ACCELERATORS = (
    Accelerator("B200", ("B200",), 178, 2250e12, 1125e12, 75e12, 4.99),
    Accelerator("H200-NVL", ("H200", "NVL"), 140, 835e12, 417e12, 60e12, 3.49),
    Accelerator("H200", ("H200",), 140, 989e12, 494e12, 67e12, 3.79),
    Accelerator("H100-NVL", ("H100", "NVL"), 93, 835e12, 417e12, 60e12, 2.79),
    Accelerator("H100-PCIe", ("H100", "PCIe"), 79, 756e12, 378e12, 51e12, 2.49),
    Accelerator("H100", ("H100",), 79, 989e12, 494e12, 67e12, 2.99),
    Accelerator("A100-80GB", ("A100", "80GB"), 79, 312e12, 156e12, 19.5e12, 1.79),
    Accelerator("A100-40GB", ("A100",), 39, 312e12, 156e12, 19.5e12, 1.29),
    Accelerator("L40S", ("L40S",), 44, 362e12, 183e12, 91.6e12, 0.99),
    Accelerator("L4", ("L4",), 22, 121e12, 60e12, 30.3e12, 0.71),
    Accelerator("RTX-4090", ("4090",), 23.6, 165e12, 82.6e12, 82.6e12, 0.69),
    Accelerator("MI300X", ("MI300X",), 191, 1307e12, 653e12, 163e12, 2.99),
)


def find_accelerator(name: str) -> Accelerator | None:
    """Return the accelerator of a name of ours (`H100`) or torch's (`NVIDIA H100 80GB HBM3`); None for one not in the table."""
    own = next((device for device in ACCELERATORS if device.name.lower() == name.lower()), None)
    if own:
        return own
    if any(word in name.upper().split() for word in NOT_WHOLE):
        return None
    words = name.upper().replace("-", " ").split()
    return next((d for d in ACCELERATORS if all(word.upper() in words for word in d.pattern)), None)


def find_price(name: str, *, given: float | None) -> Price | None:
    """Return what an hour of a device costs: the given price, else the table's; None where neither is known, as for a CPU."""
    if given is not None:
        return Price(given, f"{given:g} USD an hour and device, given")
    found = find_accelerator(name)
    if found is None:
        return None
    return Price(found.usd_per_hour, f"{found.usd_per_hour:g} USD an hour and device, assumed as of {PRICES_AS_OF}")


def name_device(device: "torch.device") -> str:
    """Return the table's name of a device, torch's where it is not in the table, `cpu` for a CPU."""
    import torch

    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device)
    found = find_accelerator(name)
    return found.name if found else name


def device_peak(device: "torch.device", precision: Precision) -> float | None:
    """Return the rate, in operations a second, that a training step's rate is a share of; None for an unknown accelerator.

    On a CPU it is measured, in float32, in well under a second; on an accelerator it is the data sheet's.
    """
    import torch

    if device.type != "cuda":
        return measure_gemm()
    found = find_accelerator(torch.cuda.get_device_name(device))
    return found.peak_flops(precision) if found else None


def measure_gemm(threads: int | None = None) -> float:
    """Return the rate of float32 matrix products on the CPU, the best of several, in operations a second: with so many of torch's threads, no
    more than it has; None: all."""
    import torch

    a, b = torch.ones(2, GEMM_SIZE, GEMM_SIZE)
    out = torch.empty_like(a)
    there = torch.get_num_threads()
    torch.set_num_threads(min(threads or there, there))
    try:
        torch.mm(a, b, out=out)  # the first one wakes the threads
        fastest = float("inf")
        ends = time.monotonic() + GEMM_SECONDS
        while time.monotonic() < ends:
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            fastest = min(fastest, time.perf_counter() - started)
    finally:
        torch.set_num_threads(there)
    return 2 * GEMM_SIZE**3 / fastest
