"""Machines known by name. Peaks and bandwidths are data sheets'; what is achieved of them is assumed, and said so.

Nothing here was measured but "cpu". A measured file is better: natgrad plan --calibrate FILE, on the machine.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from natgrad_lab.plan.machine import Link, Machine, Table, read

GEMM, GRAM, INVERSE = 0.7, 0.6, 0.3
"""Shares of the peak at large sizes (assumed)."""
HALF = {"gemm": 128.0, "gram": 128.0, "inverse": 6000.0}
"""Sides of a matrix at which half of that is reached (assumed)."""
SIZES = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0)


class Sheet(NamedTuple):
    """What a GPU's data sheet says: operations a second of convolutions and of products, bytes, bytes a second.

    share, half: of convolutions' peak what wide layers reach, and the channels at which half of that is reached.
    """

    about: str
    conv: float
    conv_why: str
    share: float
    half: float
    gemm: float
    memory: float
    bandwidth: float
    devices: int
    inside: float
    inside_why: str
    between: float
    between_why: str


SHEETS = {
    "v100-ib": Sheet(
        "Tesla V100 SXM2 16 GB, four to a host, two InfiniBand EDR ports (ABCI)",
        15.7e12,
        "15.7 TFLOP/s in fp32 (V100 data sheet, 2018)",
        0.95,
        8.0,
        15.7e12,
        16e9,
        900e9,
        4,
        150e9,
        "NVLink, 6 x 25 GB/s each way (V100 data sheet)",
        25e9,
        "2 x 100 Gb/s EDR a host (ABCI's system overview)",
    ),
    "a100": Sheet(
        "A100 SXM4 80 GB, eight to a host, eight InfiniBand HDR ports (DGX A100)",
        156e12,
        "156 TFLOP/s in TF32, in which torch runs fp32 convolutions by default (A100 data sheet, 2021)",
        0.4,
        32.0,
        19.5e12,
        80e9,
        2039e9,
        8,
        300e9,
        "NVLink, 12 x 25 GB/s each way (A100 data sheet)",
        200e9,
        "8 x 200 Gb/s HDR a host (DGX A100 data sheet)",
    ),
    "h100": Sheet(
        "H100 SXM5 80 GB, eight to a host, eight InfiniBand NDR ports (DGX H100)",
        494e12,
        "494 TFLOP/s in dense TF32, in which torch runs fp32 convolutions by default (H100 data sheet, 2023)",
        0.4,
        32.0,
        67e12,
        80e9,
        3350e9,
        8,
        450e9,
        "NVLink, 18 x 25 GB/s each way (H100 data sheet)",
        400e9,
        "8 x 400 Gb/s NDR a host (DGX H100 data sheet)",
    ),
    "h200": Sheet(
        "H200 SXM 141 GB, eight to a host, eight InfiniBand NDR ports (DGX H200)",
        494e12,
        "494 TFLOP/s in dense TF32, in which torch runs fp32 convolutions by default (H200 data sheet, 2024)",
        0.4,
        32.0,
        67e12,
        141e9,
        4800e9,
        8,
        450e9,
        "NVLink, 18 x 25 GB/s each way (H200 data sheet)",
        400e9,
        "8 x 400 Gb/s NDR a host (DGX H200 data sheet)",
    ),
}


def named(name: str) -> Machine:
    """A machine by its name or by the path of its JSON file."""
    if name in SHEETS:
        return gpu(name, SHEETS[name])
    if name == "cpu":
        return read(Path(__file__).parent / "cpu.json")
    if name.endswith(".json") or "/" in name or Path(name).is_file():
        return read(Path(name))
    known = [*SHEETS, "cpu"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}, or a JSON file"
    raise ValueError(f"there is no machine {name!r}; {hint}")


def gpu(name: str, sheet: Sheet) -> Machine:
    """A machine from a data sheet and the shares that are assumed above."""
    memory: dict[str, Table] = {kind: ((1.0, sheet.bandwidth * share),) for kind, share in MEMORY.items()}
    compute = {
        "conv": table(sheet.half, sheet.conv * sheet.share),
        "conv_backward": table(sheet.half, sheet.conv * sheet.share),
        "gemm": table(HALF["gemm"], sheet.gemm * GEMM),
        "gram": table(HALF["gram"], sheet.gemm * GRAM),
        "inverse": table(HALF["inverse"], sheet.gemm * INVERSE),
        "cholesky": table(HALF["inverse"], sheet.gemm * INVERSE),
        "eigen": table(HALF["inverse"], sheet.gemm * INVERSE / 20),
    }
    return Machine(
        name,
        "gpu",
        {**compute, **memory},
        launch=8e-6,
        memory=sheet.memory,
        devices=sheet.devices,
        inside=Link(4e-6, 0.8 * sheet.inside),
        between=Link(6e-6, 0.8 * sheet.between),
        layer=4e-5,
        refresh=2e-4,
        call=4e-5,
        sources=sources(sheet),
    )


MEMORY = {"elementwise": 0.75, "norm": 0.6, "gather": 0.35, "scatter": 0.1}
"""Shares of the memory's bandwidth (assumed)."""


def table(half: float, best: float) -> Table:
    """Rates that grow with the size up to the best, half of which they have at `half`."""
    return tuple((size, best * size / (size + half)) for size in SIZES)


CHECKED = {
    "Tesl": "so that ResNet-50 trains at about the 367 images a second that NVIDIA publishes (DeepLearningExamples)",
    "A100": "ResNet-50 comes to within a tenth of the 938 images a second that NVIDIA publishes (DeepLearningExamples)",
}


def sources(sheet: Sheet) -> dict[str, str]:
    """Where a GPU's figures are from."""
    assumed = f"of which {sheet.share:.0%} is assumed for wide layers, half of it at {sheet.half:.0f} channels"
    checked = CHECKED.get(sheet.about[:4], "checked against no run")
    return {
        "machine": sheet.about,
        "conv, conv_backward": f"{sheet.conv_why}, {assumed}; {checked}",
        "gemm, gram": f"{sheet.gemm / 1e12:g} TFLOP/s in fp32 (data sheet); {GEMM:.0%} and {GRAM:.0%} assumed",
        "inverse, cholesky": f"{INVERSE:.0%} of fp32's peak, half of it at {HALF['inverse']:.0f} (assumed)",
        "eigen": "a twentieth of a Cholesky inverse's rate (assumed; on CPUs it is a sixth, docs/overhead.md)",
        "elementwise, norm, gather, scatter": f"{sheet.bandwidth / 1e9:g} GB/s (data sheet), of which "
        + ", ".join(f"{share:.0%} for {kind}" for kind, share in MEMORY.items())
        + " (assumed)",
        "memory": "data sheet",
        "inside": f"{sheet.inside_why}, 80 % and 4 us assumed",
        "between": f"{sheet.between_why}, 80 % and 6 us assumed",
        "launch": "8 us of the host an operation in eager torch (assumed)",
        "layer, refresh, call": "40 us of Python a layer, half of it on every rank, half at its owner; 200 us where it "
        "is measured; 40 us a message (assumed; one core of an EPYC takes 46 us a layer of ResNet-50)",
    }
