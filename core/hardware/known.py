"""Datasheet facts of GPUs, and machines described by name such as `8xA100-40GB`.

Rates are dense (without sparsity) and, for 16-bit formats, with fp32 accumulation, because that is what training uses.
`memory_total_bytes` is what drivers report for such a card (seen in the "total capacity" of torch's out-of-memory
messages), which is 1-8% below the number in the name. Named machines have no known host memory and disks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distui.core.errors import UserError
from distui.core.hardware.types import GIB, PCIE_LANE_RATES, Gpu, Hardware

MAX_GPUS = 1 << 17
"""More than anybody has in one job; without a bound a digit too many takes all memory."""
T = 1e12
G = 1e9


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One row of the table: a GPU as its maker describes it."""

    name: str
    pattern: str
    """Regular expression on the name that NVML gives."""
    memory_gib: float
    compute_capability: tuple[int, int] | None
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    nvlink_bandwidth: float | None
    pcie_generation: int
    source: str
    nic_bits_per_gpu: float | None = None
    """Network of the reference system per GPU (DGX, HGX), bits/s; None where there is no reference system."""
    nic_source: str = ""


def _rates(fp32: float, half: float, bf16: bool = True) -> dict[str, float]:
    return {"fp32": fp32 * T, "fp16": half * T} | ({"bf16": half * T} if bf16 else {})


_DGX_A100 = "NVIDIA DGX A100 datasheet: eight 200 Gb/s HDR InfiniBand for eight GPUs"
_DGX_H100 = "NVIDIA DGX H100/H200 datasheet: eight 400 Gb/s NDR InfiniBand for eight GPUs"

# fmt: off
KNOWN_GPUS: tuple[GpuFacts, ...] = (
    GpuFacts("A100-40GB", r"A100.*SXM.*40GB", 39.39, (8, 0), _rates(19.5, 312), 1555 * G, 300 * G, 4,
             "NVIDIA A100 datasheet (SXM4 40GB)", 200e9, _DGX_A100),
    GpuFacts("A100-80GB", r"A100.*SXM.*80GB", 79.15, (8, 0), _rates(19.5, 312), 2039 * G, 300 * G, 4,
             "NVIDIA A100 datasheet (SXM4 80GB)", 200e9, _DGX_A100),
    GpuFacts("A100-PCIe-40GB", r"A100.*PCIE?.*40GB", 39.39, (8, 0), _rates(19.5, 312), 1555 * G, None, 4,
             "NVIDIA A100 datasheet (PCIe 40GB)"),
    GpuFacts("A100-PCIe-80GB", r"A100.*PCIE?.*80GB|A100 80GB PCIe", 79.15, (8, 0), _rates(19.5, 312), 1935 * G, None, 4,
             "NVIDIA A100 datasheet (PCIe 80GB)"),
    GpuFacts("H100-80GB", r"H100 (80GB HBM3|SXM)", 79.1, (9, 0), _rates(67, 989.4), 3350 * G, 450 * G, 5,
             "NVIDIA H100 datasheet (SXM5)", 400e9, _DGX_H100),
    GpuFacts("H100-PCIe-80GB", r"H100 PCIe", 79.1, (9, 0), _rates(51, 756), 2000 * G, None, 5,
             "NVIDIA H100 datasheet (PCIe)"),
    GpuFacts("H100-NVL-94GB", r"H100 NVL", 93.1, (9, 0), _rates(60, 835), 3900 * G, None, 5,
             "NVIDIA H100 datasheet (NVL)"),
    GpuFacts("H200-141GB", r"H200(?! NVL)", 139.8, (9, 0), _rates(67, 989.4), 4800 * G, 450 * G, 5,
             "NVIDIA H200 datasheet (SXM)", 400e9, _DGX_H100),
    GpuFacts("B200-180GB", r"B200", 178.3, (10, 0), _rates(75, 2250), 7700 * G, 900 * G, 5,
             "NVIDIA HGX B200 datasheet", 400e9, "NVIDIA DGX B200 datasheet: eight 400 Gb/s ports for eight GPUs"),
    GpuFacts("A10G-24GB", r"A10G", 22.0, (8, 6), _rates(35, 70), 600 * G, None, 4,
             "AWS / NVIDIA A10G datasheet"),
    GpuFacts("A10-24GB", r"A10(?!0|G)", 22.0, (8, 6), _rates(31.2, 125), 600 * G, None, 4,
             "NVIDIA A10 datasheet"),
    GpuFacts("A40-48GB", r"A40(?!0)", 44.4, (8, 6), _rates(37.4, 149.7), 696 * G, None, 4,
             "NVIDIA A40 datasheet"),
    GpuFacts("L4-24GB", r"L4(?!0)", 22.0, (8, 9), _rates(30.3, 121), 300 * G, None, 4,
             "NVIDIA L4 datasheet"),
    GpuFacts("L40S-48GB", r"L40S", 44.4, (8, 9), _rates(91.6, 362), 864 * G, None, 4,
             "NVIDIA L40S datasheet"),
    GpuFacts("T4-16GB", r"T4(?!0)", 14.6, (7, 5), _rates(8.1, 65, bf16=False), 320 * G, None, 3,
             "NVIDIA T4 datasheet"),
    GpuFacts("V100-16GB", r"V100.*16GB", 15.77, (7, 0), _rates(15.7, 125, bf16=False), 900 * G, 150 * G, 3,
             "NVIDIA V100 datasheet (SXM2)", 100e9, "NVIDIA DGX-1 datasheet: four 100 Gb/s EDR InfiniBand, eight GPUs"),
    GpuFacts("V100-32GB", r"V100.*32GB", 31.74, (7, 0), _rates(15.7, 125, bf16=False), 900 * G, 150 * G, 3,
             "NVIDIA V100 datasheet (SXM2)", 100e9, "NVIDIA DGX-2 datasheet: eight 100 Gb/s EDR, sixteen GPUs"),
    GpuFacts("RTX3090-24GB", r"RTX 3090(?! Ti)", 23.68, (8, 6), _rates(35.6, 71.2), 936 * G, None, 4,
             "NVIDIA GA102 white paper (GeForce RTX 3090)"),
    GpuFacts("RTX4090-24GB", r"RTX 4090", 23.64, (8, 9), _rates(82.6, 165.2), 1008 * G, None, 4,
             "NVIDIA Ada white paper (GeForce RTX 4090)"),
    GpuFacts("RTX5090-32GB", r"RTX 5090(?! D)", 31.36, (12, 0), _rates(104.8, 209.5), 1792 * G, None, 5,
             "NVIDIA RTX Blackwell white paper (GeForce RTX 5090)"),
    GpuFacts("MI300X-192GB", r"MI300X", 191.98, None, _rates(163.4, 1307.4), 5300 * G, 448 * G, 5,
             "AMD Instinct MI300X datasheet; Infinity Fabric, seven links of 64 GB/s each way"),
)
# fmt: on

_ROWS = {facts.name: facts for facts in KNOWN_GPUS}


def gpu_facts(nvml_name: str) -> GpuFacts | None:
    """Return the datasheet of the GPU that NVML calls `nvml_name`, None where it is not in the table."""
    if re.search(r"laptop|mobile|max-q|\bD$", nvml_name, re.IGNORECASE):
        return None  # slower variants that carry a desktop card's name
    for facts in KNOWN_GPUS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{facts.pattern})(?![A-Za-z0-9])", nvml_name, re.IGNORECASE):
            return facts
    return None


def _simplify(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("geforce", "").replace("nvidia", "").replace("sxm", ""))


def find_gpu(text: str) -> GpuFacts:
    """Return the row that `text` names; the memory may be left out where there is only one size.

    Raises: UserError with the nearest names.
    """
    wanted = _simplify(text)
    exact = [facts for facts in KNOWN_GPUS if _simplify(facts.name) == wanted]
    matches = exact or [facts for facts in KNOWN_GPUS if _simplify(facts.name.rsplit("-", 1)[0]) == wanted]
    if wanted and len(matches) == 1:
        return matches[0]
    if len(matches) > 1 or any(_simplify(name).startswith(wanted) for name in _ROWS if wanted):
        names = [facts.name for facts in matches] or [n for n in _ROWS if _simplify(n).startswith(wanted)]
        raise UserError(
            f"hardware {text!r} is not complete", f"it could be {_either(names)}", f"write {_either(names)}"
        )
    near = difflib.get_close_matches(wanted, [_simplify(name) for name in _ROWS], n=3, cutoff=0.4)
    names = [name for simple in near for name in _ROWS if _simplify(name) == simple]
    raise UserError(
        f"no GPU named {text!r} in the table",
        f"known GPUs are {', '.join(sorted(_ROWS))}",
        f"write {_either(names)}" if names else "write one of these, or detect for this machine",
    )


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def named_hardware(text: str, *, nodes: int | None = None, host_memory_bytes: int | None = None) -> Hardware:
    """Return the machine that `[NODESx][GPUSx]NAME` describes.

    Raises: UserError where the form or the name is wrong.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(?:(\d+)\s*[xX*]\s*)?([A-Za-z].*?)\s*", text)
    if match is None:
        raise UserError(
            f"hardware {text!r} is not in a form that distui reads",
            "it takes [NODESx]GPUSxNAME",
            "write for example 8xA100-40GB, 4x8xH100-80GB, 1xRTX4090, or detect for this machine",
        )
    first, second, name = match.groups()
    num_gpus = int(second or first or 1)
    num_nodes = int(first) if second else (nodes or 1)
    if num_gpus < 1 or num_nodes < 1:
        raise UserError(
            f"hardware {text!r} has no GPU",
            f"{num_nodes} nodes of {num_gpus} GPUs",
            f"write a number of GPUs, as in 8x{text.rsplit('x', 1)[-1]}",
        )
    if num_nodes * num_gpus > MAX_GPUS:
        raise UserError(
            f"hardware {text!r} has {num_nodes * num_gpus:,} GPUs",
            f"plans are made for {MAX_GPUS:,} at most",
            "look at the number: a digit too many?",
        )
    facts = find_gpu(name)

    def gpu(index: int) -> Gpu:
        return Gpu(
            index=index,
            name=facts.name,
            memory_total_bytes=round(facts.memory_gib * GIB),
            compute_capability=facts.compute_capability,
            peak_flops=facts.peak_flops,
            memory_bandwidth=facts.memory_bandwidth,
            nvlink_bandwidth=facts.nvlink_bandwidth if num_gpus > 1 else None,
            pcie_bandwidth=PCIE_LANE_RATES[facts.pcie_generation] * 16,
            pcie_generation=facts.pcie_generation,
            pcie_width=16,
            facts_source=facts.source,
        )

    nic = facts.nic_bits_per_gpu
    return Hardware(
        name=f"{num_nodes}x{num_gpus}x{facts.name}" if num_nodes > 1 else f"{num_gpus}x{facts.name}",
        nodes=num_nodes,
        gpus_per_node=tuple(gpu(index) for index in range(num_gpus)),
        cpu=None,
        memory_total_bytes=host_memory_bytes,
        memory_available_bytes=host_memory_bytes,
        source="named",
        node_bandwidth=nic * num_gpus / 8 if nic else None,
        node_bandwidth_source=facts.nic_source if nic else "",
    )
