"""The one schema of distui's settings: it feeds `distui.toml`, `--set`, `DISTUI_*`, `--help`, the wizard and the docs.

Torch-free. Reading files and precedence live in `distui.core.config.settings`; what cannot work together is found by
`distui.core.config.check.check`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


def _field(default: Any, description: str, unit: str | None = None) -> Any:
    return Field(default, description=description, json_schema_extra={"unit": unit} if unit else None)


class Section(BaseModel):
    """A table of the TOML file; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class RunSection(Section):
    """What the run is called and where it is kept."""

    name: str = _field("", "name of the run; empty takes the script's name")
    model: str = _field(
        "", "model that is trained, for plans: a preset, a config.json, a count such as 7B, or train.py:build_model"
    )
    hardware: str = _field("", "machine that was planned for, such as 8xA100-40GB; empty is the one that launches")
    device: Literal["auto", "cpu", "cuda"] = _field(
        "auto",
        "what ranks train on: cpu leaves GPUs alone, cuda refuses to start without; auto takes GPUs where there are",
    )
    dir: str = _field("", "folder that holds the runs; empty takes the user's state folder")
    mask_arguments: Literal["secrets", "all", "none"] = _field(
        "secrets",
        "values of the script's arguments that the run does not keep: those named like secrets, all, or none",
    )
    seed: NonNegativeInt = _field(0, "seed of the data order, and of every rank's generators under engine.set_seed")


class ClusterSection(Section):
    """On which machines and how many ranks."""

    nproc: PositiveInt | Literal["auto"] = _field(
        "auto", "ranks on each node; auto takes the GPUs, or half of the physical cores where there is none"
    )
    nodes: PositiveInt = _field(1, "number of nodes that take part")
    min_nodes: NonNegativeInt = _field(
        0, "so many hosts are enough to go on with once others are lost; 0 waits for all of them"
    )
    spare_nodes: NonNegativeInt = _field(
        0, "so many of the hosts, the last ones, are there and checked, and take the place of one that is lost"
    )
    node_rank: NonNegativeInt = _field(0, "this node's place among them, from 0")
    master_addr: str = _field("127.0.0.1", "address of node 0, where ranks meet")
    master_port: NonNegativeInt = _field(0, "port on node 0 where ranks meet; 0 takes a free one (one node only)")
    max_restarts: NonNegativeInt = _field(0, "how often a failed job is started again from its last checkpoint")
    on_preempt: Literal["stop", "save"] = _field(
        "stop", "what SIGTERM to the launcher means: stop, or save at the next common step and end with 75, as SIGUSR1"
    )
    threads_per_rank: NonNegativeInt = _field(0, "CPU threads of each rank; 0 divides the physical cores")
    hosts: str = _field("", "hosts that one command starts the job on, as a,b:4 (4 ranks on b, nproc on a)")
    hostfile: str = _field("", "file that lists the hosts instead, a line each: b slots=4 (DeepSpeed), or b:4 (MPI)")
    starter: str = _field(
        "ssh",
        "how hosts are reached: ssh, slurm (srun), kubernetes, ray, local (all this machine), or a plug-in's name",
    )
    k8s_image: str = _field("", "image of the pods of --k8s, with Python, distui and the script in it")
    k8s_namespace: str = _field("", "namespace that --k8s makes its JobSet in; empty is that of the context")
    k8s_gpus: bool = _field(True, "each pod of --k8s asks for as many nvidia.com/gpu as it has ranks")
    k8s_pod: str = _field("", "YAML file that is put over the pods' spec: volumes, tolerations, nodeSelector, ...")
    ray_address: str = _field("auto", "Ray cluster of --ray, as HEAD:6379; auto is the one that this machine is in")
    ray_resources: str = _field(
        "", "what each node asks of Ray, as GPU=8,CPU=64; empty is a CPU a rank, and a GPU where Ray has any"
    )
    ssh_args: str = _field("", "further arguments of ssh, such as -p 2222; the user's own ssh config holds anyway")
    interface: str = _field("", "network interface that hosts reach each other by; empty is that of the route")
    env: str = _field(
        "PATH,PYTHON*,VIRTUAL_ENV,CONDA*,LD_LIBRARY_PATH,LD_PRELOAD,CUDA_*,NCCL_*,GLOO_*,TORCH*,OMP_*,MKL_*,HF_*,"
        "TRANSFORMERS_*,WANDB_*,TRITON_*,DISTUI_*",
        "variables of this side's environment that the ranks on hosts get, as names and patterns",
    )
    roll_up_hosts: NonNegativeInt = _field(
        33, "from so many hosts on, a daemon on each sums its ranks up once a second; 0 never: all telemetry comes here"
    )
    retry_s: NonNegativeFloat = _field(
        30.0,
        "a host that the job goes on without is tried again each so many seconds; once back it is a spare, or the job "
        "saves and grows (min_nodes); 0 never",
        "s",
    )
    meet_s: PositiveFloat = _field(300.0, "time within which all hosts must have come", "s")
    slurm_partition: str = _field("", "partition that --slurm submits to; empty is the cluster's default")
    slurm_time: str = _field("", "time limit that --slurm submits with, as 4:00:00; empty is the partition's")
    slurm_args: str = _field("", "further options of sbatch, such as --gpus-per-node=8 --account=me")
    slurm_signal_s: PositiveInt = _field(
        120, "so long before its time limit a submitted job saves and gives way; a save must fit into it", "s"
    )
    slurm_requeue: bool = _field(
        True, "put a Slurm batch job that gave way into the queue again, to go on from what it has saved"
    )

    def ranks_by_host(self) -> dict[str, int]:
        """Return the ranks of each of `hosts` but the spares; `nproc` where a host says none, 1 while that is auto."""
        default = self.nproc if isinstance(self.nproc, int) else 1
        found = {}
        for entry in filter(None, self.hosts.split(",")):
            host, colon, count = entry.strip().rpartition(":")
            numbered = bool(colon) and count.isdecimal()
            found[host if numbered else entry.strip()] = int(count) if numbered else default
        return dict(list(found.items())[: max(0, len(found) - self.spare_nodes)])

    def world_size(self) -> int:
        """Return how many ranks there are; `nproc` has been decided."""
        assert isinstance(self.nproc, int)
        return sum(self.ranks_by_host().values()) if self.hosts else self.nproc * self.nodes


class StrategySection(Section):
    """Who holds which model state, and who computes what."""

    backend: str = _field(
        "native", "engine under the script: native, ddp, fsdp2, deepspeed, or a name that a plug-in registers"
    )
    zero_stage: Literal[0, 1, 2, 3] = _field(
        0, "what is sharded over the data-parallel ranks: 1 optimizer states, 2 gradients too, 3 parameters too"
    )
    find_unused_parameters: bool = _field(
        False, "ddp: look in each forward for parameters that take no part in it; the other backends need no word"
    )
    tensor_parallel: PositiveInt = _field(1, "ranks that share each matrix multiplication")
    tensor_plan: str = _field(
        "",
        "how modules are cut, as name=style,... with * for one part of a name; empty takes the model's own plan, or "
        "that of a family that is known",
    )
    gather_logits: bool = _field(
        False, "tensor parallelism: whole logits in training too, for scripts that read output.logits beside the loss"
    )
    shard_size: NonNegativeInt = _field(
        0, "data-parallel ranks that hold one copy of what is sharded, the rest being replicas; 0 is all of them"
    )
    pipeline_parallel: PositiveInt = _field(1, "stages that the layers are cut into")
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zbv"] = _field(
        "1f1b", "the order of a pipeline's forwards and backwards"
    )
    pipeline_chunks: PositiveInt = _field(
        2, "stages that each rank has under interleaved; the others have their own number"
    )
    sequence_parallel: bool = _field(
        False,
        "tensor-parallel ranks also cut, along the sequence, the hidden state between attention and feed-forward",
    )
    context_parallel: PositiveInt = _field(1, "ranks that share each sequence")
    context_method: Literal["auto", "ring", "ulysses"] = _field(
        "auto",
        "how they attend: ulysses gives each rank the whole sequence of its heads, in a ring keys go around; auto "
        "takes ulysses where the heads divide",
    )
    expert_parallel: PositiveInt = _field(1, "ranks that share the experts of a mixture-of-experts model")


class PrecisionSection(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16", "fp16"] = _field(
        "fp32", "format of parameters and compute; bf16 and fp16 keep fp32 master copies for the optimizer"
    )
    reduce_dtype: Literal["fp32", "same"] = _field(
        "fp32", "format in which gradients are accumulated and summed over ranks; same takes the compute format"
    )
    initial_loss_scale: PositiveFloat = _field(65536.0, "fp16: first loss scale")
    loss_scale_window: PositiveInt = _field(2000, "fp16: steps without overflow before the loss scale doubles", "steps")


class OffloadSection(Section):
    """Where model states live when they are not on the device."""

    optimizer: Literal["none", "cpu", "nvme"] = _field("none", "home of optimizer states")
    params: Literal["none", "cpu", "nvme"] = _field("none", "home of sharded parameters (stage 3)")
    nvme_path: str = _field("", "folder on a local NVMe disk for the nvme home")


class ActivationCheckpointingSection(Section):
    """What is computed again in backward instead of kept."""

    mode: Literal["none", "selective", "full"] = _field(
        "none", "full recomputes every block in backward, selective every second one"
    )
    mlp_tile: NonNegativeInt = _field(
        0, "tokens of a batch that a feed-forward computes at a time, and again in backward; 0 is all", "tokens"
    )
    loss_tile: NonNegativeInt = _field(
        0,
        "tokens of a batch of which there are logits at a time, in transformers' causal models given labels; 0 is all",
        "tokens",
    )


class BatchSection(Section):
    """global_size = micro_size x accumulation x data-parallel ranks: any two give the third."""

    global_size: PositiveInt | None = _field(None, "samples in one optimizer step over all ranks", "samples")
    micro_size: PositiveInt | None = _field(
        None, "samples in one forward on one rank; unset keeps the loader's own batch size", "samples"
    )
    accumulation: PositiveInt | None = _field(None, "micro-batches in one optimizer step; unset is 1")


class OptimizerSection(Section):
    """What the planner assumes of the script's optimizer, and what the engine adds to it."""

    name: Literal["adamw", "adam", "sgd", "sgd_momentum", "lion", "adafactor", "muon"] = _field(
        "adamw", "optimizer that the plan counts states for; the script's own one is what runs"
    )
    max_grad_norm: NonNegativeFloat = _field(
        0.0, "clip gradients to this norm where the script does not clip; 0 leaves them"
    )
    zero_missing_gradients: bool = _field(
        False, "step parameters without a gradient as if it were zero; plain torch leaves them as they are"
    )
    state_bits: Literal[8, 32] = _field(
        32, "format of Adam's two moments; 8 keeps them block by block in a quarter of the memory", "bits"
    )


class CompressionSection(Section):
    """What travels between ranks."""

    gradients: Literal["none", "onebit", "int8", "fp8"] = _field(
        "none", "format of gradients on the wire; onebit is 1-bit Adam (stage 0)"
    )
    weights: Literal["none", "int8", "fp8"] = _field("none", "format of gathered parameters on the wire (stage 3)")
    warmup_steps: PositiveInt = _field(100, "onebit: exact steps before the variance is frozen", "steps")
    block_size: PositiveInt = _field(256, "int8 and fp8: neighbours that share a scale", "elements")


class CheckpointSection(Section):
    """Where and when states are saved."""

    dir: str = _field("", "folder of checkpoints; empty takes the run's own folder")
    every_steps: NonNegativeInt = _field(0, "save each so many optimizer steps; 0 only where the script asks", "steps")
    memory_every_steps: NonNegativeInt = _field(
        0,
        "keep each so many optimizer steps in host memory, by the agents of the rank's host and of the next one, to go "
        "on from when a rank or a host is lost (cluster.max_restarts); 0 keeps none; takes 4 times the states",
        "steps",
    )
    async_save: bool = _field(True, "write automatic checkpoints while training goes on; costs a copy in host memory")
    keep: PositiveInt = _field(3, "newest checkpoints that are kept")
    resume: Literal["restart", "always"] = _field(
        "restart",
        "when the newest automatic checkpoint is loaded by itself: once a job is started again (cluster.max_restarts), "
        "or always, so that a new run goes on from what is in checkpoint.dir",
    )


class TelemetrySection(Section):
    """What each rank sends to the daemon of its node."""

    enabled: bool = _field(True, "send telemetry to the daemon")
    flush_s: PositiveFloat = _field(0.5, "time between two sends", "s")
    ring_size: PositiveInt = _field(16384, "records that wait in a rank before the oldest are dropped", "records")
    collectives: bool = _field(True, "record every collective")
    heartbeat_s: PositiveFloat = _field(1.0, "time between two signs of life", "s")
    keep_days: NonNegativeFloat = _field(30.0, "telemetry of ended runs is deleted after so long; 0 keeps it", "days")
    keep_gib: NonNegativeFloat = _field(10.0, "the oldest telemetry is deleted above so much; 0 keeps it", "GiB")
    control: bool = _field(True, "let distui control act on the job; false: read-only, only stacks can be asked for")
    profile_flops: bool = _field(False, "write FLOPs and forward time of every module after the second step")


class MonitorSection(Section):
    """How the dashboard looks."""

    theme: str = _field("textual-dark", "colour theme")
    refresh_hz: PositiveFloat = _field(2.0, "repaints a second", "Hz")
    idle_s: PositiveFloat = _field(300.0, "time after which a daemon without runs and watchers ends", "s")


class NotifySection(Section):
    """Who is told that a job has ended; the run keeps none of it."""

    terminal: Literal["none", "bell", "osc9"] = _field(
        "none", "what the launcher's terminal does: ring, or show a message (OSC 9: iTerm2, kitty, WezTerm, Windows)"
    )
    command: str = _field("", "line of shell; it finds NOTIFY_TEXT, NOTIFY_RUN, NOTIFY_STATE, ... in its environment")
    webhook: str = _field("", "http(s) address that gets a POST with text, run, state, ... as JSON; keep it secret")
    after_s: NonNegativeFloat = _field(0.0, "jobs that were shorter end quietly", "s")


class Config(Section):
    """All settings of a run, as `distui.toml` holds them."""

    run: RunSection = Field(default_factory=RunSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    strategy: StrategySection = Field(default_factory=StrategySection)
    precision: PrecisionSection = Field(default_factory=PrecisionSection)
    offload: OffloadSection = Field(default_factory=OffloadSection)
    activation_checkpointing: ActivationCheckpointingSection = Field(default_factory=ActivationCheckpointingSection)
    batch: BatchSection = Field(default_factory=BatchSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    compression: CompressionSection = Field(default_factory=CompressionSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    telemetry: TelemetrySection = Field(default_factory=TelemetrySection)
    monitor: MonitorSection = Field(default_factory=MonitorSection)
    notify: NotifySection = Field(default_factory=NotifySection)

    def summary(self) -> str:
        """Return the strategy in a few words, such as `ZeRO-2, bf16, offload cpu`."""
        backend, stage = self.strategy.backend, self.strategy.zero_stage
        words = [f"ZeRO-{stage}" if backend == "native" else f"{backend} ZeRO-{stage}" if stage else backend]
        words.append(self.precision.dtype)
        for axis, word in (("tensor", "TP"), ("pipeline", "PP"), ("context", "CP"), ("expert", "EP")):
            if (size := getattr(self.strategy, f"{axis}_parallel")) > 1:
                words.append(f"{word} {size}")
        if self.offload.optimizer != "none":
            words.append(f"optimizer on {self.offload.optimizer}")
        if self.offload.params != "none":
            words.append(f"parameters on {self.offload.params}")
        if self.activation_checkpointing.mode != "none":
            words.append(f"{self.activation_checkpointing.mode} checkpointing")
        if self.compression.gradients != "none":
            words.append(f"{self.compression.gradients} gradients")
        if self.compression.weights != "none":
            words.append(f"{self.compression.weights} weights on the wire")
        return ", ".join(words)


def keys() -> dict[str, Any]:
    """Return every key as `section.key` with its pydantic field, in the file's order."""
    found = {}
    for section, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for key, inner in field.annotation.model_fields.items():
            found[f"{section}.{key}"] = inner
    return found
