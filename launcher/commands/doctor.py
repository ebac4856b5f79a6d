"""`distui doctor`: what this machine has, what is broken, and on request what it measures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distui.core.errors import EXIT_OK, EXIT_USER, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from distui.core.hardware.detect import Hardware
    from distui.launcher.doctor.findings import Finding


@click.command("doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--measure", is_flag=True, help="Measure the CPU's rates (about 2 s) and keep them for plans.")
@click.option("--disk", "disk_path", type=click.Path(path_type=Path), help="Measure the disk that holds this folder.")
@click.option("--collectives", is_flag=True, help="Measure the bandwidth between ranks of this node.")
@click.option("--nproc", type=click.IntRange(min=2), help="Ranks for --collectives; else one for each GPU, at least 2.")
@click.option("--json", "as_json", is_flag=True, help="For other programs.")
def command(measure: bool, disk_path: Path | None, collectives: bool, nproc: int | None, as_json: bool) -> int:
    """Say what this machine has and what is broken; exit status 2 where distui cannot run."""
    from distui.core.hardware.detect import detect
    from distui.core.hardware.nvml import read_nvml
    from distui.launcher.doctor.checks import examine

    if nproc is not None and not collectives:
        raise UserError("--nproc needs --collectives", "nothing else starts ranks here", "add --collectives")
    started = time.perf_counter()
    hardware = detect()
    assert hardware.cpu is not None
    if measure:
        from distui.core.hardware.measure import measure_cpu_flops

        measure_cpu_flops(hardware.cpu)
    rows: list[dict[str, Any]] = []
    if collectives:
        from distui.launcher.probes.collectives import keep_rank_bandwidth, measure_collectives

        rows = measure_collectives(nproc or max(2, hardware.ranks_per_node))
        keep_rank_bandwidth(rows, hardware.cpu)
    if measure or collectives:
        hardware = detect()
    if disk_path is not None:
        from distui.core.hardware.measure import measure_disk

        disk = measure_disk(disk_path)
        hardware = replace(hardware, disks=(disk, *(each for each in hardware.disks if each.path != disk.path)))
    findings = examine(hardware, read_nvml())
    broken = any(finding.level == "error" for finding in findings)
    if as_json:
        click.echo(json.dumps(as_document(hardware, findings, rows), indent=1))
    else:
        print_report(hardware, findings, rows, time.perf_counter() - started)
    return EXIT_USER if broken else EXIT_OK


def as_document(hardware: Hardware, findings: Sequence[Finding], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `--json` prints; what is not known is null."""
    from distui.launcher.doctor.versions import fits

    facts = asdict(hardware)
    facts |= {"device_kind": hardware.device_kind, "num_devices": hardware.num_devices}
    document: dict[str, Any] = {
        "hardware": facts,
        "fits_together": [{"parts": fit.parts, "fits": fit.fits, "why": fit.why} for fit in fits(hardware)],
        "findings": [asdict(finding) for finding in findings],
    }
    if rows:
        document["collectives"] = list(rows)
    return document


def machine_rows(hardware: Hardware) -> Iterator[tuple[str, str]]:
    """Yield label and value of everything that was found; n/a for what was not."""
    from distui.launcher.doctor.versions import fits
    from distui.tui.format import NA, num_bytes, si

    for gpu in hardware.gpus_per_node:
        capability = ".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else NA
        yield (
            f"GPU {gpu.index}",
            f"{gpu.name}, {num_bytes(gpu.memory_free_bytes)} free of {num_bytes(gpu.memory_total_bytes)}, "
            f"compute capability {capability}",
        )
        peak = gpu.peak_flops or {}
        link = f"PCIe {gpu.pcie_generation or NA} x{gpu.pcie_width or NA}"
        yield (
            "",
            f"bf16 {si(peak.get('bf16'), 'FLOP/s')}, memory {si(gpu.memory_bandwidth, 'B/s')}, "
            f"NVLink {si(gpu.nvlink_bandwidth, 'B/s')}, {link} {si(gpu.pcie_bandwidth, 'B/s')}",
        )
    if not hardware.gpus_per_node:
        yield "GPU", "none"
    for index, ways in enumerate(hardware.gpu_topology):
        others = [f"{other}: {way}" for other, way in enumerate(ways) if other != index]
        if others:
            yield f"GPU {index} to", ", ".join(others)
    if (cpu := hardware.cpu) is not None:
        yield (
            "CPU",
            f"{cpu.model}, {cpu.num_cores_physical or NA} cores, {cpu.num_cores_usable} usable threads, "
            f"{cpu.num_numa_nodes or NA} NUMA nodes",
        )
        rate = (cpu.peak_flops or {}).get("fp32")
        measured = "" if rate else " (not measured: --measure)"
        for node in cpu.numa_nodes:
            memory = f"{num_bytes(node.memory_free_bytes)} free of {num_bytes(node.memory_total_bytes)}"
            gpus = [str(gpu.index) for gpu in hardware.gpus_per_node if gpu.numa_node == node.index]
            yield (
                "",
                f"NUMA {node.index}: CPUs {node.cpus or NA}, {memory}" + (f", GPUs {', '.join(gpus)}" if gpus else ""),
            )
        yield "", f"fp32 {si(rate, 'FLOP/s')}, memory {si(cpu.memory_bandwidth, 'B/s')}{measured}"
    yield (
        "memory",
        f"{num_bytes(hardware.memory_available_bytes)} available of {num_bytes(hardware.memory_total_bytes)}",
    )
    limit, cores = hardware.memory_limit_cgroup_bytes, hardware.cpu_limit_cgroup
    yield (
        "",
        f"physical {num_bytes(hardware.memory_physical_bytes)}, cgroup limit "
        f"{'none' if limit is None else num_bytes(limit)}, CPU quota {'none' if cores is None else f'{cores:g} cores'}",
    )
    for disk in hardware.disks:
        kind = {True: "NVMe", False: "no NVMe", None: "NVMe n/a"}[disk.is_nvme]
        rates = f"read {si(disk.read_rate, 'B/s')}, write {si(disk.write_rate, 'B/s')}"
        free = f"{num_bytes(disk.free_bytes)} free of {num_bytes(disk.total_bytes)}"
        yield "disk", f"{disk.path}: {disk.file_system or NA}, {kind}, {free}, {rates}"
    for port in hardware.network:
        kind = "InfiniBand, " if port.is_infiniband else ""
        yield "network", f"{port.name}: {kind}{si(port.speed_bits, 'bit/s')}, {'up' if port.is_up else 'down'}"
    yield "scheduler", hardware.scheduler
    yield "versions", ", ".join(f"{name} {version or NA}" for name, version in hardware.software.items())
    for index, fit in enumerate(fits(hardware)):
        word = {True: "yes", False: "no", None: NA}[fit.fits]
        yield "" if index else "together", f"{fit.parts}: {word}, {fit.why}"


def print_report(
    hardware: Hardware, findings: Sequence[Finding], rows: Sequence[dict[str, Any]], seconds: float
) -> None:
    """Print the machine, the measurements and the findings."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, value in machine_rows(hardware):
        table.add_row(label, value)
    console.print(table)
    if rows:
        console.print(collectives_table(rows))
    for finding in findings:
        style = "bold red" if finding.level == "error" else "yellow"
        console.print(f"\n{finding.level}: ", style=style, end="")
        console.print(finding.what, markup=False)
        console.print(f"  why: {finding.why}\n  fix: {finding.fix}", markup=False)
    errors = sum(finding.level == "error" for finding in findings)
    count = (
        f"{errors} error{'' if errors == 1 else 's'}, {len(findings) - errors} warnings"
        if findings
        else "nothing is broken"
    )
    console.print(f"\n{count} ({seconds:.1f} s)", style="bold" if errors else "dim")


def collectives_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a row a size, a column an operation: bus bandwidth as nccl-tests defines it."""
    from rich.box import SIMPLE
    from rich.table import Table

    from distui.tui.format import num_bytes, seconds, si

    first = rows[0]
    operations = list(dict.fromkeys(row["op"] for row in rows))
    table = Table(title=f"{first['backend']}, {first['world_size']} ranks, bus bandwidth", box=SIMPLE, pad_edge=False)
    table.add_column("size", justify="right")
    for op in operations:
        table.add_column(op, justify="right")
    for size in dict.fromkeys(row["bytes"] for row in rows):
        cells = {row["op"]: row for row in rows if row["bytes"] == size}
        table.add_row(
            num_bytes(size),
            *(f"{si(cells[op]['bus_bandwidth'], 'B/s')} ({seconds(cells[op]['seconds'])})" for op in operations),
        )
    return table
