"""What machine this is: names, datasheets, cgroup limits, disks, measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distui.core.errors import UserError
from distui.core.hardware import host as hardware_host
from distui.core.hardware import measure as hardware_measure
from distui.core.hardware.detect import GIB, Cpu, Gpu, Hardware, NumaNode, NvmlReport, detect, parse_hardware
from distui.core.hardware.disks import nvme_mounts, read_disks
from distui.core.hardware.host import detect_host, read_network, read_numa
from distui.core.hardware.known import KNOWN_GPUS, gpu_facts


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTUI_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# ---- named machines


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "gpu"),
    [
        ("8xA100-40GB", 1, 8, "A100-40GB"),
        ("4x8xH100-80GB", 4, 8, "H100-80GB"),
        ("1xRTX4090", 1, 1, "RTX4090-24GB"),
        ("RTX 4090", 1, 1, "RTX4090-24GB"),
        ("2xh100", 1, 2, "H100-80GB"),
        ("16 x V100-32GB", 1, 16, "V100-32GB"),
    ],
)
def test_a_named_machine(text: str, nodes: int, per_node: int, gpu: str) -> None:
    found = parse_hardware(text)
    assert (found.nodes, len(found.gpus_per_node), found.gpus_per_node[0].name) == (nodes, per_node, gpu)
    assert found.num_devices == nodes * per_node
    assert found.source == "named"
    assert found.memory_available_bytes is None, "host memory of a named machine is not known"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("8xA100", "A100-40GB or A100-80GB"),
        ("8xA10O-40GB", "A100-40GB"),
        ("8x", "8xA100-40GB"),
        ("", "detect"),
        ("0xA100-40GB", "as in 8x"),
        ("99999999xA100-40GB", "a digit too many"),
        ("2xRTX4O90", "RTX4090-24GB"),
    ],
)
def test_a_wrong_name_says_what_to_write(text: str, fix: str) -> None:
    if text == "":
        assert parse_hardware(text).source == "detected"
        return
    with pytest.raises(UserError) as caught:
        parse_hardware(text)
    assert fix in caught.value.fix


def test_every_row_of_the_table_is_found_by_its_name_and_has_a_source() -> None:
    for facts in KNOWN_GPUS:
        assert parse_hardware(f"2x{facts.name}").gpus_per_node[1].name == facts.name
        assert facts.source
        size = float(facts.name.rsplit("-", 1)[1].removesuffix("GB"))
        assert 0.9 * size / 1.074 < facts.memory_gib < 1.0 * size, facts.name
        assert ("bf16" in facts.peak_flops) == (facts.compute_capability is None or facts.compute_capability >= (8, 0))


@pytest.mark.parametrize(
    ("nvml_name", "row"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA A10G", "A10G-24GB"),
        ("NVIDIA A10", "A10-24GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("Tesla T4", "T4-16GB"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090-24GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_drivers_names_lead_to_the_datasheet(nvml_name: str, row: str | None) -> None:
    facts = gpu_facts(nvml_name)
    assert (facts.name if facts else None) == row


# ---- a rank's share


def gpu(index: int, gib: float = 40, **facts: object) -> Gpu:
    return Gpu(index=index, name="X", memory_total_bytes=round(gib * GIB), **facts)  # type: ignore[arg-type]


def machine(gpus: tuple[Gpu, ...] = (), **facts: object) -> Hardware:
    cpu = Cpu("cpu", num_cores_physical=8, num_cores_logical=16, num_cores_usable=16)
    values: dict[str, object] = {"memory_total_bytes": 64 * GIB, "memory_available_bytes": 48 * GIB, "cpu": cpu}
    return Hardware(name="m", nodes=1, gpus_per_node=gpus, **(values | facts))  # type: ignore[arg-type]


def test_a_gpu_rank_has_the_smallest_gpu_and_a_cpu_rank_its_share() -> None:
    assert machine((gpu(0, 40), gpu(1, 24))).memory_limit_bytes() == 24 * GIB
    cpu_only = machine()
    assert cpu_only.device_kind == "cpu"
    assert cpu_only.ranks_per_node == 4
    assert cpu_only.memory_limit_bytes() == 12 * GIB
    assert cpu_only.memory_limit_bytes(2) == 24 * GIB


def test_a_quota_below_the_physical_cores_limits_the_ranks() -> None:
    cpu = Cpu("cpu", num_cores_physical=64, num_cores_logical=128, num_cores_usable=2)
    assert machine(cpu=cpu).ranks_per_node == 1


def test_an_unknown_rate_of_one_gpu_makes_the_rate_unknown() -> None:
    known = gpu(0, peak_flops={"fp32": 1e12})
    assert machine((known, known)).peak_flops("fp32") == 1e12
    assert machine((known, gpu(1))).peak_flops("fp32") is None
    assert machine((known,)).peak_flops("bf16") is None
    assert machine().peak_flops("fp32") is None


# ---- this machine


def test_detect_never_raises_and_never_gives_zero_for_unknown() -> None:
    found = detect()
    assert found.source == "detected"
    assert found.cpu is not None and found.cpu.num_cores_usable >= 1
    assert found.memory_available_bytes is not None and found.memory_available_bytes > 0
    assert found.memory_total_bytes is not None and found.memory_available_bytes <= found.memory_total_bytes
    assert all(interface.speed_bits != 0 for interface in found.network)
    assert all(disk.read_rate is None for disk in found.disks), "nobody asked for a measurement"


def test_detect_loads_no_torch() -> None:
    code = (
        "import sys, distui.core.hardware.detect as h; h.detect(); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nodes_multiply_the_devices() -> None:
    report = NvmlReport(gpus=(gpu(0), gpu(1)))
    assert detect_host(report, nodes=4).num_devices == 8


# ---- cgroups


def test_cgroup_v2_takes_the_least_limit_of_all_levels_and_gives_cache_back(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/job/step\n")
    base = "sys/fs/cgroup"
    write(tmp_path, f"{base}/job/memory.max", f"{8 * GIB}")
    write(tmp_path, f"{base}/job/memory.current", f"{5 * GIB}")
    write(tmp_path, f"{base}/job/memory.stat", f"anon 1\ninactive_file {2 * GIB}\n")
    write(tmp_path, f"{base}/job/step/memory.max", "max")
    write(tmp_path, f"{base}/job/step/memory.current", f"{1 * GIB}")
    write(tmp_path, f"{base}/job/step/cpu.max", "250000 100000")
    assert hardware_host.cgroup_memory_limit(tmp_path) == 8 * GIB
    assert hardware_host.cgroup_memory_left(tmp_path) == 5 * GIB
    assert hardware_host.cgroup_cpu_quota(tmp_path) == 2.5


def test_cgroup_v1_and_its_way_of_writing_no_limit(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    memory = "sys/fs/cgroup/memory/docker/x"
    write(tmp_path, f"{memory}/memory.limit_in_bytes", "9223372036854771712")
    write(tmp_path, f"{memory}/memory.usage_in_bytes", "1000")
    assert hardware_host.cgroup_memory_limit(tmp_path) is None
    write(tmp_path, f"{memory}/memory.limit_in_bytes", f"{4 * GIB}")
    write(tmp_path, f"{memory}/memory.usage_in_bytes", f"{1 * GIB}")
    write(tmp_path, f"{memory}/memory.stat", f"total_inactive_file {GIB // 2}\n")
    assert hardware_host.cgroup_memory_left(tmp_path) == 3 * GIB + GIB // 2
    assert hardware_host.cgroup_cpu_quota(tmp_path) is None


def test_a_container_whose_cgroup_path_is_not_mounted_takes_the_mounts_root(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/host/path/that/is/not/here\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{2 * GIB}")
    write(tmp_path, "sys/fs/cgroup/memory.current", f"{3 * GIB}")
    assert hardware_host.cgroup_memory_left(tmp_path) == 0


def test_no_cgroup_files_mean_no_limit(tmp_path: Path) -> None:
    assert hardware_host.cgroup_memory_limit(tmp_path) is None
    assert hardware_host.cgroup_memory_left(tmp_path) is None


def test_the_cgroup_limit_wins_over_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_host, "cgroup_memory_limit", lambda root: 3 << 20)
    monkeypatch.setattr(hardware_host, "cgroup_memory_left", lambda root: 2 << 20)
    found = detect_host(NvmlReport())
    assert (found.memory_total_bytes, found.memory_available_bytes) == (3 << 20, 2 << 20)
    assert found.memory_limit_cgroup_bytes == 3 << 20 and (found.memory_physical_bytes or 0) > 3 << 20


# ---- disks, network, scheduler


def test_numa_nodes_come_with_their_processors_and_memory(tmp_path: Path) -> None:
    for index, cpus in ((10, "8-15"), (2, "0-7")):
        folder = tmp_path / f"sys/devices/system/node/node{index}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
        (folder / "meminfo").write_text(f"Node {index} MemTotal:  2048 kB\nNode {index} MemFree:  {index} kB\n")
    (tmp_path / "sys/devices/system/node/node10/meminfo").unlink()
    assert read_numa(tmp_path) == (NumaNode(2, "0-7", 2 << 20, 2 << 10), NumaNode(10, "8-15", None, None))
    assert read_numa(tmp_path / "absent") == ()


def test_a_disk_is_nvme_by_its_block_device(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    root = tmp_path / "root"
    write(root, "proc/self/mountinfo", f"22 1 {number} / /mnt rw shared:1 - xfs /dev/nvme0n1p2 rw\n")
    assert read_disks([tmp_path], root)[0].is_nvme is None
    (root / "sys/devices/pci/nvme0n1/nvme0n1p2").mkdir(parents=True)
    (root / "sys/dev/block").mkdir(parents=True)
    (root / f"sys/dev/block/{number}").symlink_to(root / "sys/devices/pci/nvme0n1/nvme0n1p2")
    if os.major(device) != 0:
        assert read_disks([tmp_path], root)[0].is_nvme is True
    assert read_disks([tmp_path], root)[0].file_system == "xfs"
    scratch = tmp_path / "fast scratch"
    scratch.mkdir()
    (root / "sys/dev/block/259:7").symlink_to(root / "sys/devices/pci/nvme0n1/nvme0n1p2")
    lines = [
        f"30 1 259:7 / {str(scratch).replace(' ', chr(92) + '040')} rw - ext4 /dev/nvme0n1p2 rw",
        "31 1 259:7 / /no/such/folder rw - ext4 /dev/nvme0n1p2 rw",
        f"32 1 0:44 / {tmp_path} rw - tmpfs tmpfs rw",
        "garbled",
    ]
    write(root, "proc/self/mountinfo", "\n".join(lines) + "\n")
    assert nvme_mounts(root) == [scratch]


def test_one_disk_is_listed_once_and_a_missing_folder_counts_as_its_parent(tmp_path: Path) -> None:
    found = read_disks([tmp_path, tmp_path / "a" / "b"])
    assert len(found) == 1 and found[0].free_bytes is not None


def test_infiniband_ports_come_from_the_kernel(tmp_path: Path) -> None:
    write(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/rate", "400 Gb/sec (4X NDR)\n")
    write(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n")
    first = read_network(tmp_path)[0]
    assert (first.name, first.speed_bits, first.is_up, first.is_infiniband) == ("mlx5_0:1", 400e9, True, True)


def test_the_scheduler_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert hardware_host.find_scheduler({}) == "none"
    assert hardware_host.find_scheduler({"SLURM_JOB_ID": "7"}) == "slurm"
    assert hardware_host.find_scheduler({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == "kubernetes"


# ---- measurements


def test_a_measurement_is_kept_for_this_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_measure, "MATRIX_SIZE", 64)
    monkeypatch.setattr(hardware_measure, "COPY_BYTES", 1 << 16)
    before = detect()
    assert before.cpu is not None and before.cpu.peak_flops is None
    rates = hardware_measure.measure_cpu_flops(before.cpu, seconds=0.01)
    assert rates["fp32"] > 0
    after = detect()
    assert after.cpu is not None and after.cpu.peak_flops == rates and after.cpu.memory_bandwidth
    assert after.peak_flops("bf16") is None, "numpy cannot measure it"
    assert after.peak_flops("fp32", 2) == rates["fp32"] / 2
    kept = json.loads(hardware_measure.calibration_path().read_text())
    hardware_measure.save_calibration(cpu=["another", kept["cpu"][1]])
    again = detect()
    assert again.cpu is not None and again.cpu.peak_flops is None


def test_a_broken_calibration_file_counts_as_none(state_dir: Path) -> None:
    state_dir.mkdir()
    hardware_measure.calibration_path().write_text("{not json")
    assert hardware_measure.load_calibration() == {}
    assert detect().cpu is not None


def test_a_disk_is_measured_on_request(tmp_path: Path) -> None:
    disk = hardware_measure.measure_disk(tmp_path, num_bytes=16 << 20)
    assert disk.read_rate and disk.write_rate
    assert [path for path in tmp_path.iterdir() if path.name != "state"] == [], "the test file is gone"


def test_a_disk_test_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        hardware_measure.measure_disk(tmp_path / "nowhere")
    with pytest.raises(UserError, match="MiB are free"):
        hardware_measure.measure_disk(tmp_path, num_bytes=1 << 60)


def test_rates_of_equal_gpus_do_not_depend_on_their_number() -> None:
    one, eight = parse_hardware("1xA100-40GB"), parse_hardware("8xA100-40GB")
    assert one.peak_flops("bf16") == eight.peak_flops("bf16") == 312e12
    assert one.gpus_per_node[0].nvlink_bandwidth is None, "one GPU has nobody to link to"
    assert replace(eight, nodes=2).num_devices == 16
