"""Model FLOPs utilisation: the share of a device's peak that a run uses. Light to import: `scldm plan` uses it."""

from __future__ import annotations

from scldm.nn.flops import TRAINING

# Dense peak in operations per second, by a part of the device's name: (bf16, fp32). From the vendor's data sheets.
PEAKS = {
    "A100": (312e12, 19.5e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "V100": (None, 15.7e12),
}


def peak_flops(device: str | None, precision: str) -> float | None:
    """Return a device's peak in operations per second; None if it is not known, for example of a CPU."""
    for name, (bf16, fp32) in PEAKS.items():
        if device is not None and all(part in device for part in name.split()):
            return bf16 if precision == "bf16" else fp32
    return None


def mfu(flops_per_cell: float, cells_per_s: float, peak: float | None, workers: int) -> float | None:
    """Return the share of all workers' peak that training uses; None if the peak is not known."""
    return None if peak is None else TRAINING * flops_per_cell * cells_per_s / (peak * workers)
