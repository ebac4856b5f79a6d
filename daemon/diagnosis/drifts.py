"""What goes wrong while every rank goes on: losses, data, memory, processors, and a launcher that was stopped."""

from __future__ import annotations

from distui.daemon.diagnosis.hangs import names
from distui.daemon.diagnosis.observe import DEAD, FINISHED, STOPPED, Observed, this_node
from distui.daemon.diagnosis.trends import JUMP_STEPS, Jump
from distui.daemon.node.cgroups import memory_left
from distui.daemon.node.processes import process_state
from distui.daemon.runs.state import MEAN_STEPS, RankRecord, RunState
from distui.proto import telemetry_pb2 as pb

ORIGIN_S = 1.5
"""Steps of several ranks come one after the other within this time."""
SOON_S = 3600.0
"""Memory that lasts for longer is not worth a word."""
DATA_BOUND_S = 10.0
FRESH_S = 60.0
"""What the last steps say holds no longer once they are so old."""
THROTTLED_SHARE = 0.25
LAUNCHER_STOPPED_S = 3.0
_SHOWN = 8


def bad_loss(state: RunState, now_s: float) -> list[pb.Diagnosis]:
    """Return whose loss is no number: on which rank and step it began, and which have followed."""
    bad = sorted((record.bad_since_step, rank) for rank, record in state.ranks.items() if record.bad_since_step)
    if not bad:
        return []
    first = bad[0][0]
    since_s = min(record.bad_since_s for record in state.ranks.values() if record.bad_since_step == first)
    behind = any(record.last_step is None or record.last_step.step < first for record in state.ranks.values())
    if behind and now_s - since_s < ORIGIN_S:
        return []  # whose loss was the first may not have been told yet
    origin = [rank for step, rank in bad if step == first]
    later = [rank for step, rank in bad if step != first]
    followed = f"; {_ranks(later)} followed at step {min(step for step, _ in bad if step != first)}" if later else ""
    return [
        pb.Diagnosis(
            kind="nan_loss",
            ranks=origin,
            since_s=max(0.0, now_s - since_s),
            message=f"the loss of {_ranks(origin)} is {state.ranks[origin[0]].loss} since step {first}{followed}; "
            f"stop, go back to a checkpoint, and look at the learning rate, the batch of step {first}"
            f"{' on ' + _ranks(origin) if later else ''}, or fp16 without loss scaling",
        )
    ]


def loss_spike(state: RunState, now_s: float) -> list[pb.Diagnosis]:
    """Return whose loss has jumped above what it was, and stays there; not where a raised learning rate explains it."""
    jumps = {rank: jump for rank, jump in _jumps(state).items() if jump.rates is None}
    if not jumps:
        return []
    rank, first = min(jumps.items(), key=lambda one: (one[1].step, one[0]))
    told = first.step + JUMP_STEPS - 1
    behind = any(record.last_step is None or record.last_step.step < told for record in state.ranks.values())
    if behind and now_s - first.seen_s < ORIGIN_S:
        return []  # it may have jumped on others too
    whole = len(jumps) == len(state.ranks) and len(jumps) > 1
    whose = "all ranks" if whole else _ranks(list(jumps))
    record = state.ranks[rank]
    step = record.last_step
    more = ""
    if step is not None and step.HasField("grad_norm"):
        more = f", gradient norm {step.grad_norm:.4g}"
    if step is not None and step.HasField("learning_rate"):
        more += f", learning rate {step.learning_rate:.3g}"
    return [
        pb.Diagnosis(
            kind="loss_spike",
            ranks=list(jumps),
            since_s=max(0.0, now_s - first.since_s),
            message=f"the loss of {whose} jumped at step {first.step}, from about {first.usual:.4g} to "
            f"{first.now:.4g}, and has not come back (now step {step.step if step is not None else 'n/a'}{more}); look "
            f"at the batch of step {first.step}, clip gradients, lower the learning rate, or go back to a checkpoint "
            "before it",
        )
    ]


def loss_rise(state: RunState) -> tuple[int, str]:
    """Return at which step the loss rose with the learning rate, and that in words; 0 where it has not."""
    risen = {rank: jump for rank, jump in _jumps(state).items() if jump.rates is not None}
    if not risen:
        return 0, ""
    _, first = min(risen.items(), key=lambda one: (one[1].step, one[0]))
    assert first.rates is not None
    whose = "all ranks" if len(risen) == len(state.ranks) > 1 else _ranks(list(risen))
    before, now = first.rates
    return first.step, (
        f"the loss of {whose} rose at step {first.step}, from about {first.usual:.4g} to {first.now:.4g}, after the "
        f"learning rate was raised from {before:.3g} to {now:.3g}: a warm restart does that, and it comes back"
    )


def _jumps(state: RunState) -> dict[int, Jump]:
    return {rank: jump for rank, record in sorted(state.ranks.items()) if (jump := record.losses.jump) is not None}


def data_bound(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    """Return that every rank waits for its data for a large part of each step."""
    records = [state.ranks[rank.rank] for rank in ranks if rank.process not in (DEAD, FINISHED)]
    fresh = [one for one in records if len(one.recent) >= MEAN_STEPS and now_s - one.last_step_s < FRESH_S]
    if not fresh or len(fresh) < len(records) or len(ranks) < state.world_size():
        state.data_bound.look(0.0, now_s)
        return []
    shares = [_data_share(one) for one in fresh]
    since_s = state.data_bound.look(min(share for share, _, _ in shares), now_s)
    if since_s < DATA_BOUND_S:
        return []
    share, data_s, step_s = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    whose = "all ranks wait" if len(fresh) > 1 else "the rank waits"
    return [
        pb.Diagnosis(
            kind="data_bound",
            ranks=[record.rank for record in fresh],
            since_s=since_s,
            message=f"{whose} for data {share:.0%} of each step ({data_s * 1e3:.0f} of {step_s * 1e3:.0f} ms); more "
            "loader workers (num_workers), persistent_workers, faster storage, or less work a sample",
        )
    ]


def _data_share(record: RankRecord) -> tuple[float, float, float]:
    """Return the share of the last steps spent waiting for data, and both times of one step. Units: seconds."""
    number = len(record.recent)
    step_s = sum(recent[0] for recent in record.recent) / number
    data_s = sum(parts[0] for _, parts in record.last_parts) / max(1, len(record.last_parts))
    return (data_s / step_s if step_s > 0 else 0.0), data_s, step_s


def memory_growth(state: RunState, ranks: list[Observed]) -> list[pb.Diagnosis]:
    """Return whose memory grows all the time and will be used up soon, on a device or on a host."""
    living = [rank for rank in ranks if rank.process not in (DEAD, FINISHED)]
    for rank in living:
        record = state.ranks[rank.rank]
        memory, rate = record.memory, record.device_growth.bytes_per_s
        if memory is None or not rate or not memory.HasField("device_total_bytes"):
            continue
        free = max(0, memory.device_total_bytes - max(memory.allocated_bytes, memory.reserved_bytes))
        if free / rate <= SOON_S:
            return [_grows([rank], rate, memory.allocated_bytes, free, "on its device")]
    by_node: dict[str, list[Observed]] = {}
    for rank in living:
        if state.ranks[rank.rank].host_growth.bytes_per_s:
            by_node.setdefault(rank.node, []).append(rank)
    for node, growing in by_node.items():
        left, where = _host_left(state, node, growing)
        rate = sum(state.ranks[rank.rank].host_growth.bytes_per_s for rank in growing)
        held = sum(memory.rss_bytes for rank in growing if (memory := state.ranks[rank.rank].memory) is not None)
        if left is not None and left / rate <= SOON_S:
            return [_grows(growing, rate, held, left, where)]
    return []


def _host_left(state: RunState, node: str, ranks: list[Observed]) -> tuple[int | None, str]:
    found: list[tuple[int, str]] = []
    if node in state.nodes and state.nodes[node].HasField("hardware"):
        hardware = state.nodes[node].hardware
        found.append((max(0, hardware.memory_total_bytes - hardware.memory_used_bytes), "on the host"))
    if node == this_node():
        for rank in ranks:
            if (left := memory_left(rank.pid)) is not None:
                found.append((left, "in its control group"))
    return min(found, default=(None, ""))


def _grows(ranks: list[Observed], rate: float, held: int, left: int, where: str) -> pb.Diagnosis:
    left_s = left / rate
    until = f"{left_s / 60:.0f} min" if left_s >= 90 else f"{left_s:.0f} s"
    return pb.Diagnosis(
        kind="memory_growth",
        ranks=[rank.rank for rank in ranks],
        message=f"the memory of {names(ranks)} grows all the time, by {rate / 2**20:.1f} MiB/s "
        f"({held / 2**30:.2f} GiB now); {left / 2**30:.2f} GiB are left {where}, for about {until}; look for what is "
        "kept over steps: losses without .item() or detach(), lists of outputs, a cache in the dataset",
    )


def cpu_throttled(state: RunState, ranks: list[Observed]) -> list[pb.Diagnosis]:
    """Return the ranks of this node that their control group keeps from the processors."""
    mine = {
        rank.pid: rank for rank in ranks if rank.node == this_node() and rank.process not in (DEAD, FINISHED, STOPPED)
    }
    held = [one for one in state.throttling.look(mine) if one.share >= THROTTLED_SHARE]
    if not held:
        return []
    worst = max(held, key=lambda one: one.share)
    blamed = [mine[pid] for pid in worst.pids if pid in mine]
    if not blamed:
        return []
    return [
        pb.Diagnosis(
            kind="cpu_throttled",
            ranks=sorted(rank.rank for rank in blamed),
            message=f"{names(blamed)} may use {worst.cores:g} cores by their control group, and were kept waiting in "
            f"{worst.share:.0%} of its periods; raise the limit (cpu.max, --cpus, resources.limits.cpu, "
            "--cpus-per-task), or start fewer ranks, threads and loader workers",
        )
    ]


def launcher_stopped(state: RunState, now_s: float) -> list[pb.Diagnosis]:
    """Return that the launcher is stopped, as by Ctrl-Z, while its ranks train on."""
    launcher = state.launcher
    stopped = (
        launcher is not None
        and launcher.node == this_node()
        and process_state(launcher.pid, launcher.began_s) == STOPPED
    )
    since_s = state.launcher_stopped.look(float(stopped), now_s)
    if launcher is None or since_s < LAUNCHER_STOPPED_S:
        return []
    return [
        pb.Diagnosis(
            kind="launcher_stopped",
            since_s=since_s,
            message=f"distui launch (pid {launcher.pid}) is stopped, as by Ctrl-Z; its ranks go on; fg, or kill -CONT "
            f"{launcher.pid}, shows the job again",
        )
    ]


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"rank{'s' * (len(numbers) > 1)} {shown}{more}"
