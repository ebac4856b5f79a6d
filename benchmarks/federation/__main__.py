"""What the head of a job on many nodes costs: simulated node daemons, real relays, a real head, one dashboard's watch.

    python -m benchmarks.federation [--nodes 1000] [--ranks 8] [--seconds 30] [--fan-in 32] [--sick 417]

Each simulated node rolls up its ranks once a second as `daemon/tree/columns.py` makes it, with two groups of
collectives a rank; the relays between (one for every `--fan-in` nodes) and the head are the daemon's own code, the head
a process of its own. A watcher asks for updates each half second, as the dashboard does, and says how old what it gets
is. CPU is the head's alone, without its start; that of a dashboard's overview, on a terminal of its own, stands beside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import psutil

from benchmarks.dashboard import Screen
from benchmarks.federation.simulated import Fleet
from distui.core.paths import RunFolder, daemon_socket
from distui.core.telemetry.endpoint import Endpoint
from distui.daemon.serve.live import LiveRuns
from distui.daemon.tree.relay import Relay
from distui.proto import rollup_pb2_grpc
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

WARM_UP_S = 12.0


async def relays(folder: Path, number: int) -> None:
    """Serve `number` relays, each on a socket of its own, until the process is ended."""
    servers, tasks = [], []
    for at in range(number):
        relay = Relay(LiveRuns(), Endpoint.unix(daemon_socket()))
        server = grpc.aio.server()
        rollup_pb2_grpc.add_FederationServicer_to_server(relay, server)
        server.add_insecure_port(f"unix:{folder}/relay{at}.sock")
        await server.start()
        servers.append(server)
        tasks.append(asyncio.create_task(relay.serve()))
    print("ready", flush=True)
    await asyncio.gather(*tasks)


async def watch(run_id: str, seconds: float) -> dict[str, object]:
    """Watch the run as a dashboard does; return how old the steps of its hosts were, and what was said to be wrong."""
    ages: list[float] = []
    sizes: list[int] = []
    last = pb.Update()
    async with Endpoint.unix(daemon_socket()).aio_channel() as channel:
        call = rpc.MonitorStub(channel).Watch(pb.WatchRequest(run_id=run_id, interval_s=0.5))
        until = time.monotonic() + seconds
        async for last in call:
            now_s = time.time()
            sizes.append(last.ByteSize())
            ages += [now_s - node.last_seen_s for node in last.snapshot.nodes]
            if time.monotonic() > until:
                break
        call.cancel()
    ages.sort()
    first = next(iter(last.snapshot.hosts), pb.Host())
    return {
        "hosts": len(last.snapshot.hosts),
        "age_median_s": round(ages[len(ages) // 2], 2) if ages else math.nan,
        "age_p99_s": round(ages[int(0.99 * len(ages))], 2) if ages else math.nan,
        "age_worst_s": round(ages[-1], 2) if ages else math.nan,
        "update_bytes": sorted(sizes)[len(sizes) // 2],
        "updates_per_s": round(len(sizes) / seconds, 2),
        "first_host": f"{first.node}{' (sick)' if first.sick else ''}",
        "diagnosis": [found.message for found in last.snapshot.diagnosis][:3],
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Start everything, measure, and end it."""
    run = RunFolder(Path(os.environ["DISTUI_STATE_DIR"]) / "runs" / "federation-1")
    run.create()
    world = options.nodes * options.ranks
    spec = {"run_id": run.run_id, "world_size": world, "num_nodes": options.nodes, "started_s": time.time()}
    run.spec.write_text(json.dumps(spec))
    reader, writer = os.pipe()
    head = subprocess.Popen([sys.executable, "-m", "distui.daemon", "--ready-fd", str(writer)], pass_fds=[writer])
    os.close(writer)
    with open(reader, "rb") as ready:
        ready.readline()
    processes = [head]
    num_relays = math.ceil(options.nodes / options.fan_in)
    try:
        for part, number in (("relays", num_relays), ("nodes", options.nodes)):
            command = [sys.executable, "-m", "benchmarks.federation", f"--be-{part}", str(folder), str(number)]
            command += ["--ranks", str(options.ranks), "--fan-in", str(options.fan_in), "--sick", str(options.sick)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            process.stdout.readline()
        screen = Screen(Path(__file__).resolve().parents[2], "--watch", str(daemon_socket()))
        processes.append(screen.process)
        time.sleep(WARM_UP_S)
        known = [psutil.Process(process.pid) for process in processes]
        before, began = [one.cpu_times() for one in known], time.monotonic()
        watched = asyncio.run(watch(run.run_id, options.seconds))
        took_s = time.monotonic() - began
        cpu = [
            round(100 * (now.user + now.system - then.user - then.system) / took_s, 1)
            for now, then in zip([one.cpu_times() for one in known], before, strict=True)
        ]
        return {
            "nodes": options.nodes,
            "ranks": world,
            "relays": num_relays,
            "head_cpu_percent_of_a_core": cpu[0],
            "head_rss_mib": round(known[0].memory_info().rss / 2**20),
            "dashboard_cpu_percent_of_a_core": cpu[3],
            "dashboard_bytes_drawn": screen.num_bytes,
            "relays_cpu_percent_of_a_core": cpu[1],
            "simulated_nodes_cpu_percent": cpu[2],
            "load": round(os.getloadavg()[0], 1),
            **watched,
        }
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    """Measure in folders of its own and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=8, help="on each node")
    parser.add_argument("--fan-in", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--sick", type=int, default=417, help="this node's first rank is slow")
    parser.add_argument("--be-relays", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--be-nodes", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_relays:
        asyncio.run(relays(Path(options.be_relays[0]), int(options.be_relays[1])))
    elif options.be_nodes:
        fleet = Fleet(int(options.be_nodes[1]), options.ranks, options.sick)
        asyncio.run(fleet.serve(Path(options.be_nodes[0]), options.fan_in))
    else:
        folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
        (folder / "r").mkdir(mode=0o700)
        os.environ.update(DISTUI_STATE_DIR=str(folder / "s"), DISTUI_RUNTIME_DIR=str(folder / "r"))
        try:
            print(json.dumps(measure(options, folder), indent=1))
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
