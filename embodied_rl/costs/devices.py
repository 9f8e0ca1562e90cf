"""Published peaks of well-known devices, and devices that the user describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embodied_rl.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peaks from the vendor's data sheet.

    Attributes:
        name: as the user writes it.
        memory_gib: memory, in GiB.
        bandwidth: of that memory, in GB/s; None: not known, so no bound comes from it.
        half: dense bfloat16 (t4: float16) TFLOP/s with float32 accumulation.
        single: dense float32 TFLOP/s without tensor cores: torch's default for float32 products.
        tf32: dense TF32 TFLOP/s, for `torch.set_float32_matmul_precision("high")`; None: none.
        launch_us: microseconds of the CPU for each kernel of eager torch; 0: none.
        reserved_gib: what CUDA's context and its libraries take of the memory, in GiB.
    """

    name: str
    memory_gib: float
    bandwidth: float | None
    half: float
    single: float
    tf32: float | None = None
    launch_us: float = 5.0
    reserved_gib: float = 1.0


# NVIDIA's data sheets, SXM versions of a100, h100 and h200; sparsity, which they like to include,
# taken out. Memory is what torch finds, a little less than what is sold.
KNOWN = {
    d.name: d
    for d in (
        Device("a100", 79, 2039, 312, 19.5, 156),
        Device("a100-40gb", 39, 1555, 312, 19.5, 156),
        Device("h100", 79, 3350, 989, 67, 494),
        Device("h200", 139, 4800, 989, 67, 494),
        Device("l40s", 44, 864, 362, 91.6, 183),
        Device("l4", 22, 300, 121, 30.3, 60),
        Device("a10g", 22, 600, 70, 31.2, 35),
        Device("t4", 14.5, 320, 65, 8.1),
        Device("rtx3090", 23.5, 936, 71, 35.6, 35.6),
        Device("rtx4090", 23.5, 1008, 165, 82.6, 82.6),
        Device("rtx5090", 31, 1792, 210, 105, 105),
    )
}


def name_devices(
    names: str | Sequence[str] | None,
    *,
    tflops: float | None = None,
    memory_gib: float | None = None,
    bandwidth: float | None = None,
    gflops: float | None = None,
    cpu_memory_gib: float = 0.0,
) -> list[Device]:
    """Returns the devices that `gpu=` names.

    Args:
        names: one or several; None: the CPU if `gflops` is given, else every known GPU.
        tflops: peak of a device that is not in the table.
        memory_gib: its memory.
        bandwidth: its memory's bandwidth in GB/s, if known.
        gflops: float32 peak of the CPU.
        cpu_memory_gib: memory that the CPU has.

    Raises:
        UserError: an unknown name without its peak and memory, or a CPU without its speed.
    """
    if names is None:
        names = ["cpu"] if gflops is not None else list(KNOWN)
    chosen = names.split(",") if isinstance(names, str) else list(names)
    devices = []
    for name in (str(n).strip().lower() for n in chosen):
        if name == "cpu":
            devices.append(_cpu(gflops, cpu_memory_gib, bandwidth))
        elif tflops is not None and memory_gib is not None:
            if name in KNOWN:
                raise UserError(
                    f"gpu={name} is in the table already, with {KNOWN[name].half:g} TFLOP/s and "
                    f"{KNOWN[name].memory_gib:g} GiB. Drop gpu_tflops and gpu_memory_gib, or give "
                    "the device another name."
                )
            devices.append(Device(name, memory_gib, bandwidth, tflops, tflops))
        elif name in KNOWN:
            devices.append(KNOWN[name])
        else:
            raise UserError(
                f"gpu={name!r} is not in the table. Known: {', '.join([*KNOWN, 'cpu'])}."
                f"{nearest(name, KNOWN)} Any other: add gpu_tflops= and gpu_memory_gib= (and "
                "gpu_bandwidth=, in GB/s, if you know it)."
            )
    if not devices:
        raise UserError(f"gpu={names!r} names no device. Known: {', '.join([*KNOWN, 'cpu'])}.")
    return devices


def _cpu(gflops: float | None, memory_gib: float, bandwidth: float | None) -> Device:
    if gflops is None:
        raise UserError(
            "gpu=cpu needs gflops=, the float32 GFLOP/s that this CPU reaches in a matrix product "
            "(about 100 for one AVX-512 core)."
        )
    peak = gflops / 1000
    return Device("cpu", memory_gib, bandwidth, peak, peak, None, 0.0, 0.0)
