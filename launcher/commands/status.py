"""`distui status`: one snapshot of a run, as a table or as JSON."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distui.launcher.cluster.remote import remote_and_run, remote_options

if TYPE_CHECKING:
    from rich.table import Table

    from distui.proto import telemetry_pb2 as pb


MAX_ROWS = 40
"""Of hosts, the sickest first; who wants all has --json."""


@click.command("status", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[HOST:PORT] [RUN]")
@click.option("--json", "as_json", is_flag=True, help="For other programs.")
@click.option("--node", default="", metavar="NAME", help="All ranks of this host, where a job has too many to show.")
@remote_options
def command(
    names: tuple[str, ...], as_json: bool, node: str, token_file: Path | None, ca: Path | None, plaintext: bool
) -> None:
    """Print one snapshot of RUN (an id, a unique beginning of one, or ./a/folder); without RUN, of the newest.

    HOST:PORT asks the daemon of another node, or a head daemon with all nodes' runs.
    """
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.daemon_client import get_snapshot, snapshot_of
    from distui.launcher.job.launch import configured_runs_dir

    endpoint, run = remote_and_run(names, token_file, ca, plaintext)
    if endpoint is not None:
        snapshot = get_snapshot(endpoint, run or "", node=node)
    else:
        snapshot = snapshot_of(find_run(run, configured_runs_dir()), node)
    if node and snapshot.hosts:
        only_node(snapshot, node)
    if as_json:
        from distui.daemon.runs.snapshot import snapshot_json

        click.echo(json.dumps(snapshot_json(snapshot), indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for line in summary_lines(snapshot):
        console.print(line, markup=False, soft_wrap=True)
    if snapshot.ranks:
        console.print(rank_table(snapshot))


def only_node(snapshot: pb.Snapshot, node: str) -> None:
    """Leave the ranks of one host in a snapshot. Raises: UserError where there is no such host."""
    from distui.core.errors import UserError

    if node not in {host.node for host in snapshot.hosts}:
        near = difflib.get_close_matches(node, [host.node for host in snapshot.hosts], n=3)
        hint = f"near are {', '.join(near)}" if near else f"the sickest is {snapshot.hosts[0].node}"
        raise UserError(f"the run has no host {node}", f"it has {len(snapshot.hosts)}; {hint}", "name one of them")
    kept = [rank for rank in snapshot.ranks if rank.node == node]
    del snapshot.ranks[:]
    snapshot.ranks.extend(kept)
    del snapshot.hosts[:]


def summary_lines(snapshot: pb.Snapshot) -> list[str]:
    """Return what is said above the table: the run, its state, and each diagnosis."""
    from distui.tui.format import clock, count, duration

    run = snapshot.run
    ended = f", lasted {duration(run.finished_s - run.started_s)}" if run.HasField("finished_s") else ""
    lines = [
        f"{run.run_id}: {run.state}{f' ({run.message})' if run.message else ''}",
        f"{run.strategy}; {run.world_size} ranks on {run.num_nodes} node{'s' if run.num_nodes != 1 else ''}; "
        f"started {clock(run.started_s)}{ended}",
        f"kept in {run.run_dir}",
    ]
    if snapshot.HasField("total_steps"):
        left = f", {duration(snapshot.left_s)} left" if snapshot.HasField("left_s") else ""
        share = snapshot.step / snapshot.total_steps
        lines.append(f"step {count(snapshot.step)} of {count(snapshot.total_steps)}, {share:.0%}{left}")
    if run.restarts:
        lines.append(f"started again {run.restarts} time{'s' * (run.restarts > 1)}{effort_words(snapshot)}")
    if snapshot.dropped:
        lines.append(f"{count(snapshot.dropped)} telemetry records were dropped under load")
    lines += [f"{found.kind}: {found.message}" for found in snapshot.diagnosis]
    if snapshot.hosts and (hidden := sum(host.num_ranks for host in snapshot.hosts) - len(snapshot.ranks)) > 0:
        sick = sum(host.sick for host in snapshot.hosts)
        lines.append(
            f"{len(snapshot.hosts)} hosts, {sick or 'none'} of them sick; of each the sickest rank is shown, and "
            f"{hidden:,} are not: --node NAME shows all of one host"
        )
    lines += [f"rank {rank.rank} is busy, and others wait: {rank.busy}" for rank in snapshot.ranks if rank.busy]
    return lines


def effort_words(snapshot: pb.Snapshot) -> str:
    """Return `; 93% of 2m 10s was training, lost: start 4 s, ...`; "" where that is not known."""
    from distui.tui.format import lost_time

    return f"; {lost_time(snapshot.effort)}" if snapshot.HasField("effort") else ""


def rate_of(snapshot: pb.Snapshot) -> str:
    """Return `tokens/s`, or `samples/s` where no rank counts tokens."""
    tokens = any(rank.HasField("tokens_per_s") for rank in snapshot.ranks)
    samples = any(rank.HasField("samples_per_s") for rank in snapshot.ranks)
    return "samples/s" if samples and not tokens else "tokens/s"


def rank_table(snapshot: pb.Snapshot) -> Table:
    """Return a row a rank; what is not known is n/a."""
    from rich.table import Table

    from distui.tui.format import count, num_bytes, scalar, seconds, si

    table = Table(box=None, pad_edge=False)
    unit = rate_of(snapshot)
    for title in ("rank", "node", "pid", "state", "step", "loss", "step time", unit, "memory"):
        is_word = title in ("node", "state")
        table.add_column(title, justify="left" if is_word else "right", no_wrap=not is_word)
    places = {host.node: place for place, host in enumerate(snapshot.hosts)}
    ranks = sorted(snapshot.ranks, key=lambda rank: places.get(rank.node, 0))
    for rank in ranks[:MAX_ROWS] if places else ranks:

        def known(name: str, state: pb.RankState = rank) -> float | None:
            return getattr(state, name) if state.HasField(name) else None

        table.add_row(
            str(rank.rank),
            rank.node or "n/a",
            str(rank.pid) if rank.pid else "n/a",
            "busy" if rank.busy else rank.state,
            count(known("step")),
            scalar(known("loss")),
            seconds(known("step_s")),
            si(known(unit.replace("/s", "_per_s"))),
            num_bytes(known("memory_bytes")),
        )
    return table
