"""Whether driver, CUDA, NCCL, torch and GPUs fit together. Rules and their sources are data; torch is not imported.

What is not known (no GPU, no driver, a build that does not say its CUDA) fits neither way: n/a.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass

from distui.core.hardware.detect import Hardware
from distui.launcher.doctor.findings import Finding, version_numbers

MIN_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""The oldest Linux driver that runs any minor version of a CUDA major version.
Source: CUDA Compatibility, table "CUDA Toolkit and minimum required driver for minor version compatibility"."""

CAPABILITIES = {
    11: ((3, 5), (9, 0)),
    12: ((5, 0), (12, 1)),
    13: ((7, 5), (12, 1)),
}
"""The oldest and newest compute capability that the last minor version of each CUDA compiles for.
Source: release notes of CUDA 11.8, 12.9 and 13.0."""

MIN_CUDA = {(8, 9): "11.8", (9, 0): "11.8", (10, 0): "12.8", (12, 0): "12.8", (10, 3): "12.9", (12, 1): "12.9"}
"""The first CUDA that compiles for a capability newer than 8.6 (the same release notes)."""

BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Fit:
    """Two parts that must go together: which, whether they do (None: not known), and by which rule."""

    parts: str
    fits: bool | None
    why: str
    fix: str = ""


def fits(hardware: Hardware) -> list[Fit]:
    """Return every pair of parts that must go together, as found on this machine."""
    return [*_driver(hardware), *_devices(hardware), *_nccl(hardware), *_pins(hardware)]


def check_fits(hardware: Hardware) -> Iterator[Finding]:
    """Find parts that do not go together; without a GPU only what torch itself pins."""
    for fit in fits(hardware):
        if fit.fits is False:
            yield Finding("error", f"{fit.parts} do not go together", fit.why, fit.fix)


def _driver(hardware: Hardware) -> Iterator[Fit]:
    software = hardware.software
    cuda, driver, limit = software.get("cuda"), software.get("driver"), software.get("driver_cuda")
    if not hardware.gpus_per_node or cuda is None:
        return
    parts = f"driver {driver or 'n/a'} and CUDA {cuda}"
    major = version_numbers(cuda)[0]
    least = MIN_DRIVERS.get(major)
    update = f"update the driver, or install a torch built for CUDA {limit.split('.')[0] if limit else 'of the driver'}"
    if driver and least:
        is_new = version_numbers(driver) >= version_numbers(least)
        yield Fit(parts, is_new, f"CUDA {major} needs driver {least} or newer", update)
    elif limit:
        is_new = version_numbers(limit)[0] >= major
        yield Fit(parts, is_new, f"the driver supports CUDA up to {limit}", update)
    else:
        yield Fit(parts, None, "NVML does not tell the driver's version")


def _devices(hardware: Hardware) -> Iterator[Fit]:
    cuda = hardware.software.get("cuda")
    if cuda is None:
        return
    major = version_numbers(cuda)[0]
    for name, capability in sorted({(gpu.name, gpu.compute_capability) for gpu in hardware.gpus_per_node}, key=str):
        parts = f"{name} and CUDA {cuda}"
        if capability is None or major not in CAPABILITIES:
            yield Fit(parts, None, "the compute capability is not known")
            continue
        text = ".".join(map(str, capability))
        oldest = CAPABILITIES[major][0]
        first = MIN_CUDA.get(capability)
        if capability < oldest:
            why = f"compute capability {text}; CUDA {major} has dropped what is older than {oldest[0]}.{oldest[1]}"
            yield Fit(parts, False, why, f"install a torch built for CUDA {major - 1}")
        elif first and version_numbers(cuda)[:2] < version_numbers(first):
            why = f"compute capability {text} needs CUDA {first} or newer"
            yield Fit(parts, False, why, f"install a torch built for CUDA {first} or newer")
        else:
            yield Fit(parts, True, f"compute capability {text} is one that CUDA {major} compiles for")


def _nccl(hardware: Hardware) -> Iterator[Fit]:
    cuda, nccl, built = (hardware.software.get(name) for name in ("cuda", "nccl", "nccl_cuda"))
    if cuda is None or nccl is None or built is None:
        return
    major = str(version_numbers(cuda)[0])
    fix = f"pip uninstall nvidia-nccl-cu{built} && pip install nvidia-nccl-cu{major}"
    yield Fit(f"NCCL {nccl} (for CUDA {built}) and CUDA {cuda}", built == major, "NCCL is built for one CUDA", fix)


def _pins(hardware: Hardware) -> Iterator[Fit]:
    """Compare what torch's own metadata pins (its CUDA libraries, NCCL, Triton) with what is installed."""
    from packaging.requirements import InvalidRequirement, Requirement

    torch = hardware.software.get("torch")
    if torch is None:
        return
    wrong, right = [], 0
    for text in importlib.metadata.requires("torch") or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((f"{requirement.name}{requirement.specifier}", "none"))
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            right += 1
        else:
            wrong.append((f"{requirement.name}{requirement.specifier}", installed))
    if not wrong:
        yield Fit(f"torch {torch} and its {right} packages", True, "each is of a version that torch asks for")
    for wanted, installed in wrong:
        parts = f"torch {torch} and {wanted}"
        yield Fit(parts, False, f"torch asks for {wanted}, installed is {installed}", f"pip install '{wanted}'")
