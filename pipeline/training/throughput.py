"""Model FLOPs utilisation: the share of a device's peak that a run uses. Light to import: `scldm plan` uses it."""

from __future__ import annotations

from scldm.nn.flops import TRAINING

# Dense peak in operations per second, by a part of the device's name and the precision of products. From the vendor's
# data sheets, of SXM modules unless the name says another; tf32 keeps fp32 numbers and rounds what is multiplied.
PEAKS: dict[str, dict[str, float]] = {
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12},
    "V100": {"fp32": 15.7e12},
}


def peak_flops(device: str | None, precision: str) -> float | None:
    """Return a device's peak in operations per second; None if it is not known, for example of a CPU.

    Args:
        precision: fp32, tf32 or bf16.
    """
    for name, peaks in PEAKS.items():
        if device is not None and all(part in device for part in name.split()):
            return peaks.get(precision)
    return None


def mfu(flops_per_cell: float, cells_per_s: float, peak: float | None, workers: int) -> float | None:
    """Return the share of all workers' peak that training uses; None if the peak is not known."""
    return None if peak is None else TRAINING * flops_per_cell * cells_per_s / (peak * workers)
