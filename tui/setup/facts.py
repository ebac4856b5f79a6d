"""What was found or chosen, as tables of label and value. What is not available is n/a."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from distui.core.config.imports.carried import KINDS, Carried
from distui.core.hardware.detect import Gpu, Hardware
from distui.core.plan.types import ModelSpec, Plan, Term
from distui.tui.format import NA, count, num_bytes, seconds, si

Row = tuple[str, str]

OPTIMIZER_BYTES_SOURCE = "Rajbhandari et al., ZeRO, SC 2020, section 3.1"


def grid(rows: Sequence[Row], label_width: int = 13) -> Table:
    """Return a two-column table that wraps its values."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=label_width, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for label, value in rows:
        table.add_row(Text(label, style="dim"), Text(value))
    return table


def note_rows(carried: Carried) -> Iterator[tuple[str, list[str]]]:
    """Yield what became of the keys of an imported file, the gravest first: the outcome, and `keys: reason` lines."""
    for kind, words in KINDS.items():
        reasons: dict[str, list[str]] = {}
        for note in carried.notes:
            if note.kind == kind:
                reasons.setdefault(note.why, []).append(note.key)
        if reasons:
            yield words, [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in reasons.items()]


def hardware_rows(hardware: Hardware) -> list[Row]:
    """Return every item of the hardware with its value or n/a."""
    where = "this machine" if hardware.source == "detected" else "by name; facts from datasheets"
    nodes = f", {hardware.nodes} nodes" if hardware.nodes > 1 else ""
    rows = [("Machine", f"{hardware.name} ({where}){nodes}")]
    rows += _gpu_rows(hardware.gpus_per_node)
    rows.append(("Ranks", _ranks(hardware)))
    rows += _host_rows(hardware)
    rows += _disk_rows(hardware)
    rows += _network_rows(hardware)
    rows.append(("Scheduler", hardware.scheduler))
    software = [f"{name} {version or NA}" for name, version in hardware.software.items()]
    rows.append(("Software", ", ".join(software) or NA))
    return rows


def _ranks(hardware: Hardware) -> str:
    what = "one for each GPU" if hardware.gpus_per_node else "half of the physical cores; they compute on the CPU"
    return f"nproc = auto starts {hardware.ranks_per_node} on a node: {what}"


def _gpu_rows(gpus: Sequence[Gpu]) -> Iterator[Row]:
    if not gpus:
        yield "GPUs", "none found"
        return
    index = 0
    for _, same in groupby(gpus, key=lambda gpu: (gpu.name, gpu.memory_total_bytes)):
        group = list(same)
        gpu = group[0]
        numbers = f"GPU {index}" if len(group) == 1 else f"GPUs {index}-{index + len(group) - 1}"
        index += len(group)
        free = [one.memory_free_bytes for one in group]
        least = min(size for size in free if size is not None) if all(size is not None for size in free) else None
        capability = ".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else NA
        free_text = f" ({num_bytes(least)} free)" if least is not None else ""
        yield numbers, f"{gpu.name}{' (MIG slice)' if gpu.is_mig else ''}"
        yield "  memory", f"{num_bytes(gpu.memory_total_bytes)} each{free_text}, {si(gpu.memory_bandwidth, 'B/s')}"
        peak = gpu.peak_flops or {}
        rates = ", ".join(f"{dtype} {si(peak.get(dtype), 'FLOP/s')}" for dtype in ("fp32", "bf16", "fp16"))
        yield "  compute", f"{rates}, capability {capability}"
        pcie = f"PCIe {gpu.pcie_generation or NA} x{gpu.pcie_width or NA}, {si(gpu.pcie_bandwidth, 'B/s')}"
        yield "  links", f"NVLink {si(gpu.nvlink_bandwidth, 'B/s')}; {pcie}"


def _host_rows(hardware: Hardware) -> Iterator[Row]:
    if (cpu := hardware.cpu) is None:
        yield "CPU", NA
    else:
        numa = f", {cpu.num_numa_nodes} NUMA node{'s' if cpu.num_numa_nodes != 1 else ''}" if cpu.num_numa_nodes else ""
        physical = NA if cpu.num_cores_physical is None else str(cpu.num_cores_physical)
        cores = f"{physical} physical, {cpu.num_cores_logical} logical, {cpu.num_cores_usable} usable cores"
        yield "CPU", f"{cpu.model}: {cores}{numa}"
    total, free = hardware.memory_total_bytes, hardware.memory_available_bytes
    yield "Memory", f"{num_bytes(total)}, {num_bytes(free)} available" if total is not None else NA
    if (limit := hardware.memory_limit_cgroup_bytes) is not None:
        yield "  limit", f"{num_bytes(limit)} by cgroup, of {num_bytes(hardware.memory_physical_bytes)} physical"
    if cpu is not None and len(cpu.numa_nodes) > 1:
        for node in cpu.numa_nodes:
            yield f"  NUMA {node.index}", f"CPUs {node.cpus or NA}, {num_bytes(node.memory_total_bytes)}"


def _disk_rows(hardware: Hardware) -> Iterator[Row]:
    if not hardware.disks:
        yield "Disk", NA
    for disk in hardware.disks:
        kind = NA if disk.is_nvme is None else "yes" if disk.is_nvme else "no"
        rate = f"read {si(disk.read_rate, 'B/s')}" if disk.read_rate else "speed n/a (not measured)"
        yield "Disk", f"{disk.path}: {num_bytes(disk.free_bytes)} free, NVMe {kind}, {rate}"


def _network_rows(hardware: Hardware) -> Iterator[Row]:
    for port in hardware.network:
        kind = " InfiniBand" if port.is_infiniband else ""
        yield "Network", f"{port.name}{kind}: {si(port.speed_bits, 'bit/s')}, {'up' if port.is_up else 'down'}"
    if not hardware.network:
        yield "Network", NA
    if hardware.nodes > 1 or hardware.node_bandwidth is not None:
        source = f" ({hardware.node_bandwidth_source})" if hardware.node_bandwidth_source else ""
        yield "Between nodes", f"{si(hardware.node_bandwidth, 'B/s')}{source}"


def model_rows(model: ModelSpec) -> list[Row]:
    """Return a model's size and shape, and what its states need before anything is sharded."""
    heads = f"{model.num_heads} heads" + (
        f", {model.num_kv_heads} for keys" if model.num_kv_heads != model.num_heads else ""
    )
    rows = [
        ("Parameters", f"{si(model.num_parameters)} ({count(model.num_parameters)})"),
        ("Layers", f"{model.num_layers} of {si(model.block_parameters)} each"),
        ("Shape", f"hidden {model.hidden_size}, {heads}, feed-forward {model.intermediate_size}"),
        ("Vocabulary", count(model.vocab_size) + (", tied embeddings" if model.tied_embeddings else "")),
        ("Sequence", f"{count(model.sequence_length)} tokens"),
    ]
    if model.num_experts > 1:
        active = (
            f"{model.experts_per_token} of {model.num_experts} for each token, {si(model.active_parameters)} active"
        )
        rows.append(("Experts", active))
    rows.append(("From", model.source or NA))
    return rows + state_rows(model.num_parameters)


def state_rows(num_parameters: int) -> list[Row]:
    """Return the bytes of the model states, unsharded, under AdamW. Source: ZeRO, section 3.1."""
    fp32, mixed = 16 * num_parameters, 16 * num_parameters
    return [
        ("Model states", "unsharded, AdamW:"),
        ("  fp32", f"4 + 4 + 8 = 16 B x parameters = {num_bytes(fp32)}"),
        ("  bf16, fp16", f"2 + 2 + 12 = 16 B x parameters = {num_bytes(mixed)}"),
    ]


UNKNOWN_MODEL_ROWS: list[Row] = [
    ("Parameters", NA),
    ("Model states", NA),
    ("", ""),
    ("What follows", "Memory and speed cannot be predicted. The next step offers the ZeRO stages, the safe one first."),
    ("Better", "Type a preset's name, a size such as 350M or 7B, or the path of a Hugging Face config.json."),
]


def term_value(term: Term) -> str:
    """Return a term's value with its unit."""
    if term.unit == "bytes":
        return num_bytes(term.value)
    if term.unit == "s":
        return seconds(term.value)
    return si(term.value, "" if term.unit == "1" else term.unit)


def plan_rows(plan: Plan, terms: Sequence[Term]) -> list[Row]:
    """Return a plan's memory by category, its time, and every term with formula and source."""
    limit = num_bytes(plan.memory_limit_bytes)
    rows = [("Memory a rank", f"{num_bytes(plan.memory_per_rank_bytes)} of {limit}")]
    rows += [(f"  {name.replace('_', ' ')}", num_bytes(size)) for name, size in plan.memory.items() if size]
    if plan.host_memory_bytes:
        rows.append(("Host memory", f"{num_bytes(plan.host_memory_bytes)} a node"))
    if plan.nvme_bytes:
        rows.append(("NVMe", f"{num_bytes(plan.nvme_bytes)} a node"))
    rows.append(("Step", f"{seconds(plan.step_s)}, {si(plan.tokens_per_s, 'tokens/s')}"))
    if plan.smallest_change:
        rows.append(("To make it fit", plan.smallest_change))
    for term in terms:
        formula = f" = {term.formula}" if term.formula else ""
        rows.append(
            (term.name.replace("_", " "), term_value(term) + formula + (f" ({term.source})" if term.source else ""))
        )
    return rows
