"""What devices can reach, for model FLOPs utilisation."""

from __future__ import annotations

# Words of torch.cuda.get_device_name -> dense TFLOP/s in bf16 and fp16, by NVIDIA's data sheets of the products (theirs are
# often with 2:4 sparsity, which doubles them). The first row whose words are all in the name counts.
_TFLOPS: list[tuple[tuple[str, ...], float]] = [
    (("A100",), 312.0),
    (("H100", "NVL"), 835.0),
    (("H100", "PCIe"), 756.0),
    (("H100", "HBM3"), 989.4),  # SXM
    (("H200", "NVL"), 835.0),
    (("H200",), 989.4),
    (("GB200",), 2500.0),
    (("B200",), 2250.0),
    (("L40S",), 362.05),
]


def peak_tflops(device_name: str) -> float | None:
    """Dense TFLOP/s in bf16 and fp16 of the GPU of this name; None where it is not known, as for a part of a GPU (MIG)."""
    if "MIG" in device_name:
        return None
    return next((peak for words, peak in _TFLOPS if all(word in device_name for word in words)), None)
