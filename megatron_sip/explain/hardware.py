"""What one accelerator can do by its data sheet. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config import Config


@dataclass(frozen=True)
class Hardware:
    """One H100 SXM by its data sheet, and shares of it that a program is assumed to reach."""

    name: str = "H100 SXM"
    bf16_flops: float = 989e12
    """Dense, FLOP/s."""
    fp8_flops: float = 1979e12
    memory_bytes: float = 80e9
    memory_bandwidth: float = 3.35e12
    """Bytes/s."""
    train_utilisation: float = 0.40
    serve_utilisation: float = 0.40
    """Of arithmetic, in prefill and in large decoding batches."""
    bandwidth_utilisation: float = 0.60


def peak_flops(config: Config, device_name: str) -> float | None:
    """FLOP/s that one trainer device can reach at best, None where it is unknown.

    Args: device_name: as the driver calls it; an H100 SXM is known.
    """
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if "H100" in device_name and "HBM3" in device_name:  # the PCIe and NVL cards are slower
        return Hardware().fp8_flops if config.platform.fp8 else Hardware().bf16_flops
    return None
