"""A run as the daemon would tell it, the same each time: for tests, snapshots and benchmarks only."""

from __future__ import annotations

import math
import random

from distui.proto import telemetry_pb2 as pb

START_S = 1_767_225_600.0
"""1 January 2026, 00:00 UTC."""
GIB = 1 << 30
PHASE_SHARES = (0.03, 0.27, 0.46, 0.13, 0.08)
RUN_ID = "train_bytes-20260101-000000-a1b2"


def step_summary(step: int, num_ranks: int, rng: random.Random, *, slow_rank: int | None = None) -> pb.StepSummary:
    """Return one step: a falling loss, noisy times, one rank that may be slower than the others."""
    step_s = 0.118 * (1 + 0.04 * rng.random()) + (0.9 if step == 1 else 0.0) + (0.06 if step % 50 == 0 else 0.0)
    rank_s = [step_s * (1 + 0.05 * rng.random()) for _ in range(num_ranks)]
    if slow_rank is not None and step > 120:
        rank_s[slow_rank] *= 1.35
    found = pb.StepSummary(
        step=step,
        time_s=START_S + 4 + step * 0.125,
        loss=1.9 + 3.7 * math.exp(-step / 60) + 0.05 * rng.random(),
        grad_norm=0.6 + 2.2 * math.exp(-step / 40) + 0.2 * rng.random(),
        learning_rate=3e-4 * min(1.0, step / 40) * (0.55 + 0.45 * math.cos(step / 400)),
        step_s=step_s,
        tokens_per_s=num_ranks * 4096 / step_s,
        slowest_rank=max(range(num_ranks), key=lambda rank: rank_s[rank]),
        mfu=0.41 + 0.02 * rng.random(),
        rank_step_s=rank_s,
    )
    phases = ("data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s")
    for name, share in zip(phases, PHASE_SHARES, strict=True):
        setattr(found, name, step_s * share)
    return found


def rank_state(rank: int, num_ranks: int, step: int, now_s: float) -> pb.RankState:
    """Return a healthy rank on a node of 4 GPUs."""
    categories = {
        "parameters": int(3.1 * GIB),
        "gradients": int(1.6 * GIB),
        "optimizer_states": int(6.2 * GIB * (8 / num_ranks if num_ranks < 8 else 1)),
        "buffers": 64 << 20,
        "activations": int((9.5 + 0.4 * (rank % 3)) * GIB),
    }
    allocated = sum(categories.values()) + int(1.1 * GIB)
    return pb.RankState(
        rank=rank,
        node=f"node{rank // 4:02d}",
        pid=41200 + rank,
        state="running",
        step=step,
        loss=1.95 + 0.01 * (rank % 5),
        step_s=0.120 + 0.001 * (rank % 4),
        tokens_per_s=34100 + 90 * (rank % 7),
        memory_bytes=allocated,
        last_step=pb.Step(
            step=step,
            step_s=0.121,
            data_wait_s=0.004,
            forward_s=0.033,
            backward_s=0.055,
            exposed_comm_s=0.015,
            optimizer_s=0.010,
            tokens=4096,
            samples=16,
            loss=1.95 + 0.01 * (rank % 5),
            grad_norm=0.713,
            learning_rate=2.9e-4,
        ),
        memory=pb.Memory(
            by_category_bytes=categories,
            allocated_bytes=allocated,
            peak_allocated_bytes=allocated + GIB,
            device_total_bytes=40 * GIB,
        ),
        heartbeat=pb.Heartbeat(
            step=step, phase="backward", phase_since_s=now_s - 0.03, last_seq={"data_parallel": step * 12}
        ),
        last_seen_s=now_s - 0.2,
        device=f"cuda:{rank % 4}",
        device_name="NVIDIA A100-SXM4-40GB",
        num_parameters=1_558_000_000,
    )


def collectives(num_ranks: int, step: int) -> list[pb.CollectiveSummary]:
    """Return what ZeRO-2 exchanges, with rank 2 a little late."""
    late = {rank: 0.0004 * (rank % 3) + (0.0031 if rank == 2 else 0.0) for rank in range(num_ranks)}
    last = dict.fromkeys(range(num_ranks), step * 12)
    rows = (
        ("reduce_scatter", 12, 3.1, 0.0087, 0.031, 1.9),
        ("all_gather", 12, 1.6, 0.0051, 0.019, 0.7),
        ("all_reduce", 1, 0.0001, 0.0006, 0.004, 0.05),
    )
    return [
        pb.CollectiveSummary(
            group="data_parallel",
            op=op,
            count=each * step * num_ranks,
            bytes=int(size * GIB * step * num_ranks),
            mean_s=mean_s,
            max_s=max_s,
            blocked_s=blocked_s * step * num_ranks / 60,
            last_seq=last,
            lateness_s=late,
        )
        for op, each, size, mean_s, max_s, blocked_s in rows
    ]


def events() -> list[pb.TimedEvent]:
    """Return a quiet run's events, one warning and one error among them."""
    told: tuple[tuple[float, int, pb.Event.Level, str, str, dict[str, str]], ...] = (
        (0.5, -1, pb.Event.INFO, "run_started", "8 ranks on 2 nodes", {}),
        (12.0, 0, pb.Event.INFO, "checkpoint", "checkpoint of step 64 written in 1.2 s", {"size_bytes": "13314398617"}),
        (21.0, 3, pb.Event.WARNING, "overflow", "gradients overflowed, loss scale halved to 32768", {"step": "136"}),
        (27.5, 0, pb.Event.INFO, "evaluation", "validation loss 2.104 over 512 batches", {}),
        (31.0, 5, pb.Event.ERROR, "ecc", "1 uncorrectable memory error on GPU 1 of node01", {}),
    )
    return [
        pb.TimedEvent(
            time_s=START_S + at, rank=rank, event=pb.Event(level=level, kind=kind, message=text, attributes=more)
        )
        for at, rank, level, kind, text, more in told
    ]


def run_info(num_ranks: int, state: str = "running") -> pb.RunInfo:
    """Return the description of the run."""
    return pb.RunInfo(
        run_id=RUN_ID,
        name="train_bytes",
        state=state,
        strategy="ZeRO-2, bf16, full checkpointing",
        started_s=START_S,
        world_size=num_ranks,
        num_nodes=max(1, math.ceil(num_ranks / 4)),
        command=["train_bytes.py", "--layers", "24"],
        planned_memory_bytes={
            "parameters": int(3.1 * GIB),
            "gradients": int(1.6 * GIB),
            "optimizer_states": int(6.2 * GIB),
            "activations": int(10.4 * GIB),
        },
    )


def sample_update(
    num_ranks: int = 8, num_steps: int = 240, state: str = "running", slow_rank: int | None = None, first_step: int = 1
) -> pb.Update:
    """Return everything kept of a run of `num_steps` steps, as the first update of a Watch."""
    rng = random.Random(7)
    steps = [step_summary(step, num_ranks, rng, slow_rank=slow_rank) for step in range(1, num_steps + 1)]
    now_s = START_S + 4 + num_steps * 0.125 + 0.1
    update = pb.Update(server_time_s=now_s, steps=steps[first_step - 1 :], events=events())
    snapshot = update.snapshot
    snapshot.run.CopyFrom(run_info(num_ranks, state))
    if num_steps:
        snapshot.ranks.extend(rank_state(rank, num_ranks, num_steps, now_s) for rank in range(num_ranks))
        snapshot.collectives.extend(collectives(num_ranks, num_steps))
    for node in range(snapshot.run.num_nodes):
        sample = pb.HardwareSample(cpu_percent=37.5 + node, memory_used_bytes=91 * GIB, memory_total_bytes=512 * GIB)
        for index in range(4):
            sample.gpus.add(index=index, name="NVIDIA A100-SXM4-40GB", utilization_percent=96 - index, power_w=372.0)
        snapshot.nodes.add(node=f"node{node:02d}", hardware=sample, last_seen_s=now_s)
    for step in range(20, num_steps + 1, 20):
        metrics = pb.Metrics(step=step, values={"accuracy": 0.2 + 0.5 * (1 - math.exp(-step / 90)), "lr_scale": 1.0})
        update.metrics.add(time_s=START_S + 4 + step * 0.125, rank=0, metrics=metrics)
    return update


def starting_update(num_ranks: int = 2) -> pb.Update:
    """Return a run of which no rank has been heard."""
    update = pb.Update(server_time_s=START_S + 2.0)
    update.snapshot.run.CopyFrom(run_info(num_ranks, "starting"))
    return update


def hang_update(num_ranks: int = 8, missing: int = 5) -> pb.Update:
    """Return a run in which all wait for one rank."""
    update = sample_update(num_ranks)
    snapshot = update.snapshot
    snapshot.run.state = "stalled"
    seq = 240 * 12 + 1
    for rank in snapshot.ranks:
        if rank.rank == missing:
            rank.state = "stopped"
            rank.heartbeat.phase = "data"
        else:
            rank.state = "waiting"
            rank.heartbeat.waiting_in = "reduce_scatter"
            rank.heartbeat.waiting_since_s = update.server_time_s - 12.4
            rank.heartbeat.last_seq["data_parallel"] = seq
    snapshot.diagnosis.add(
        kind="hang",
        ranks=[missing],
        collective="reduce_scatter",
        group="data_parallel",
        seq=seq,
        since_s=12.4,
        message=f"rank {missing} on node01 has not entered reduce_scatter #{seq:,} of data_parallel; "
        f"{num_ranks - 1} ranks wait for it",
    )
    return update


def axes_update(num_ranks: int = 8, schedule: str = "1f1b", num_micro: int = 4) -> pb.Update:
    """Return a run of two stages, two copies and tensor parallelism over the rest."""
    update = sample_update(num_ranks)
    run = update.snapshot.run
    run.strategy = f"ZeRO-1, pp 2 ({schedule}), tp {num_ranks // 4}, bf16"
    run.layout.CopyFrom(
        pb.Layout(pp=2, dp=2, cp=1, tp=num_ranks // 4, pipeline_schedule=schedule, pipeline_micro_batches=num_micro)
    )
    return update


def cpu_update(num_ranks: int = 2, num_steps: int = 60) -> pb.Update:
    """Return a run on CPUs of a script that counts no tokens and times no phases: much is n/a."""
    update = sample_update(num_ranks, num_steps)
    update.snapshot.run.planned_memory_bytes.clear()
    update.snapshot.run.num_nodes = 1
    del update.snapshot.nodes[1:]
    for step in update.steps:
        for name in ("data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s", "tokens_per_s"):
            setattr(step, name, 0.0)
        step.samples_per_s = num_ranks * 16 / step.step_s
        step.ClearField("mfu")
        step.ClearField("grad_norm")
        step.ClearField("learning_rate")
    for rank in update.snapshot.ranks:
        rank.ClearField("memory")
        rank.ClearField("tokens_per_s")
        rank.samples_per_s = 16 / 0.12
        rank.memory_bytes = 512 << 20
        rank.device, rank.device_name = "cpu", ""
        rank.last_step.CopyFrom(pb.Step(step=num_steps, step_s=0.12, samples=16, loss=2.5))
    return update


def log_text(rank: int, num_lines: int = 300) -> bytes:
    """Return a rank's log."""
    lines = [f"[rank {rank}] step {step:4d}  loss {5.6 - step * 0.01:.4f}  118 ms" for step in range(1, num_lines + 1)]
    lines[40] = "UserWarning: the data loader has fewer workers than there are CPUs"
    return ("\n".join(lines) + "\n").encode()
