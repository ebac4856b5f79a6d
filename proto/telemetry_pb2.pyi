from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Source(_message.Message):
    __slots__ = ("rank", "node", "pid", "incarnation")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: str
    pid: int
    incarnation: int
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("run_id", "run_dir", "source", "records", "dropped", "last")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_DIR_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    run_dir: str
    source: Source
    records: _containers.RepeatedCompositeFieldContainer[Record]
    dropped: int
    last: bool
    def __init__(self, run_id: _Optional[str] = ..., run_dir: _Optional[str] = ..., source: _Optional[_Union[Source, _Mapping]] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., dropped: _Optional[int] = ..., last: _Optional[bool] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("seq", "flush_s")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    FLUSH_S_FIELD_NUMBER: _ClassVar[int]
    seq: int
    flush_s: float
    def __init__(self, seq: _Optional[int] = ..., flush_s: _Optional[float] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("seq", "time_s", "run_started", "run_finished", "rank_started", "rank_finished", "step", "memory", "heartbeat", "collective", "event", "metrics", "hardware", "all_ranks")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    RUN_STARTED_FIELD_NUMBER: _ClassVar[int]
    RUN_FINISHED_FIELD_NUMBER: _ClassVar[int]
    RANK_STARTED_FIELD_NUMBER: _ClassVar[int]
    RANK_FINISHED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    ALL_RANKS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    time_s: float
    run_started: RunStarted
    run_finished: RunFinished
    rank_started: RankStarted
    rank_finished: RankFinished
    step: Step
    memory: Memory
    heartbeat: Heartbeat
    collective: Collective
    event: Event
    metrics: Metrics
    hardware: HardwareSample
    all_ranks: StepSummary
    def __init__(self, seq: _Optional[int] = ..., time_s: _Optional[float] = ..., run_started: _Optional[_Union[RunStarted, _Mapping]] = ..., run_finished: _Optional[_Union[RunFinished, _Mapping]] = ..., rank_started: _Optional[_Union[RankStarted, _Mapping]] = ..., rank_finished: _Optional[_Union[RankFinished, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., collective: _Optional[_Union[Collective, _Mapping]] = ..., event: _Optional[_Union[Event, _Mapping]] = ..., metrics: _Optional[_Union[Metrics, _Mapping]] = ..., hardware: _Optional[_Union[HardwareSample, _Mapping]] = ..., all_ranks: _Optional[_Union[StepSummary, _Mapping]] = ...) -> None: ...

class RunStarted(_message.Message):
    __slots__ = ("name", "command", "strategy", "config_toml", "world_size", "num_nodes", "planned_memory_bytes")
    class PlannedMemoryBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_TOML_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_FIELD_NUMBER: _ClassVar[int]
    PLANNED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    command: _containers.RepeatedScalarFieldContainer[str]
    strategy: str
    config_toml: str
    world_size: int
    num_nodes: int
    planned_memory_bytes: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., command: _Optional[_Iterable[str]] = ..., strategy: _Optional[str] = ..., config_toml: _Optional[str] = ..., world_size: _Optional[int] = ..., num_nodes: _Optional[int] = ..., planned_memory_bytes: _Optional[_Mapping[str, int]] = ...) -> None: ...

class RunFinished(_message.Message):
    __slots__ = ("state", "exit_status", "message")
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    state: str
    exit_status: int
    message: str
    def __init__(self, state: _Optional[str] = ..., exit_status: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class RankStarted(_message.Message):
    __slots__ = ("world_size", "local_rank", "device", "device_name", "num_parameters", "peak_flops", "device_uuid", "own_strategy", "strategy", "layout")
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PEAK_FLOPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    OWN_STRATEGY_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    world_size: int
    local_rank: int
    device: str
    device_name: str
    num_parameters: int
    peak_flops: float
    device_uuid: str
    own_strategy: bool
    strategy: str
    layout: Layout
    def __init__(self, world_size: _Optional[int] = ..., local_rank: _Optional[int] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., num_parameters: _Optional[int] = ..., peak_flops: _Optional[float] = ..., device_uuid: _Optional[str] = ..., own_strategy: _Optional[bool] = ..., strategy: _Optional[str] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("pp", "dp", "cp", "tp", "pipeline_schedule", "pipeline_micro_batches")
    PP_FIELD_NUMBER: _ClassVar[int]
    DP_FIELD_NUMBER: _ClassVar[int]
    CP_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    pp: int
    dp: int
    cp: int
    tp: int
    pipeline_schedule: str
    pipeline_micro_batches: int
    def __init__(self, pp: _Optional[int] = ..., dp: _Optional[int] = ..., cp: _Optional[int] = ..., tp: _Optional[int] = ..., pipeline_schedule: _Optional[str] = ..., pipeline_micro_batches: _Optional[int] = ...) -> None: ...

class RankFinished(_message.Message):
    __slots__ = ("exit_status", "error")
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    exit_status: int
    error: str
    def __init__(self, exit_status: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "step_s", "data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s", "tokens", "samples", "loss", "grad_norm", "learning_rate", "loss_scale", "flops", "micro_batches", "skipped", "total_steps")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    DATA_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_COMM_S_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    step: int
    step_s: float
    data_wait_s: float
    forward_s: float
    backward_s: float
    exposed_comm_s: float
    optimizer_s: float
    tokens: int
    samples: int
    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    flops: float
    micro_batches: int
    skipped: bool
    total_steps: int
    def __init__(self, step: _Optional[int] = ..., step_s: _Optional[float] = ..., data_wait_s: _Optional[float] = ..., forward_s: _Optional[float] = ..., backward_s: _Optional[float] = ..., exposed_comm_s: _Optional[float] = ..., optimizer_s: _Optional[float] = ..., tokens: _Optional[int] = ..., samples: _Optional[int] = ..., loss: _Optional[float] = ..., grad_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., loss_scale: _Optional[float] = ..., flops: _Optional[float] = ..., micro_batches: _Optional[int] = ..., skipped: _Optional[bool] = ..., total_steps: _Optional[int] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("by_category_bytes", "allocated_bytes", "reserved_bytes", "peak_allocated_bytes", "rss_bytes", "peak_rss_bytes", "device_total_bytes", "file_bytes")
    class ByCategoryBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    BY_CATEGORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    by_category_bytes: _containers.ScalarMap[str, int]
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    device_total_bytes: int
    file_bytes: int
    def __init__(self, by_category_bytes: _Optional[_Mapping[str, int]] = ..., allocated_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., peak_allocated_bytes: _Optional[int] = ..., rss_bytes: _Optional[int] = ..., peak_rss_bytes: _Optional[int] = ..., device_total_bytes: _Optional[int] = ..., file_bytes: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("step", "phase", "phase_since_s", "waiting_in", "waiting_since_s", "last_seq", "log_bytes")
    class LastSeqEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PHASE_SINCE_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_IN_FIELD_NUMBER: _ClassVar[int]
    WAITING_SINCE_S_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    phase: str
    phase_since_s: float
    waiting_in: str
    waiting_since_s: float
    last_seq: _containers.ScalarMap[str, int]
    log_bytes: int
    def __init__(self, step: _Optional[int] = ..., phase: _Optional[str] = ..., phase_since_s: _Optional[float] = ..., waiting_in: _Optional[str] = ..., waiting_since_s: _Optional[float] = ..., last_seq: _Optional[_Mapping[str, int]] = ..., log_bytes: _Optional[int] = ...) -> None: ...

class Collective(_message.Message):
    __slots__ = ("group", "seq", "op", "dtype", "bytes", "enqueued_s", "started_s", "finished_s", "group_size", "blocked_s", "is_root")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ENQUEUED_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_S_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_S_FIELD_NUMBER: _ClassVar[int]
    IS_ROOT_FIELD_NUMBER: _ClassVar[int]
    group: str
    seq: int
    op: str
    dtype: str
    bytes: int
    enqueued_s: float
    started_s: float
    finished_s: float
    group_size: int
    blocked_s: float
    is_root: bool
    def __init__(self, group: _Optional[str] = ..., seq: _Optional[int] = ..., op: _Optional[str] = ..., dtype: _Optional[str] = ..., bytes: _Optional[int] = ..., enqueued_s: _Optional[float] = ..., started_s: _Optional[float] = ..., finished_s: _Optional[float] = ..., group_size: _Optional[int] = ..., blocked_s: _Optional[float] = ..., is_root: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("level", "kind", "message", "attributes")
    class Level(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        INFO: _ClassVar[Event.Level]
        WARNING: _ClassVar[Event.Level]
        ERROR: _ClassVar[Event.Level]
    INFO: Event.Level
    WARNING: Event.Level
    ERROR: Event.Level
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    level: Event.Level
    kind: str
    message: str
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, level: _Optional[_Union[Event.Level, str]] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("step", "values")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    step: int
    values: _containers.ScalarMap[str, float]
    def __init__(self, step: _Optional[int] = ..., values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class HardwareSample(_message.Message):
    __slots__ = ("cpu_percent", "memory_used_bytes", "memory_total_bytes", "gpus", "network_sent_bytes", "network_received_bytes", "cpu_nice_percent")
    CPU_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NETWORK_RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_NICE_PERCENT_FIELD_NUMBER: _ClassVar[int]
    cpu_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    gpus: _containers.RepeatedCompositeFieldContainer[Gpu]
    network_sent_bytes: int
    network_received_bytes: int
    cpu_nice_percent: float
    def __init__(self, cpu_percent: _Optional[float] = ..., memory_used_bytes: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., gpus: _Optional[_Iterable[_Union[Gpu, _Mapping]]] = ..., network_sent_bytes: _Optional[int] = ..., network_received_bytes: _Optional[int] = ..., cpu_nice_percent: _Optional[float] = ...) -> None: ...

class Gpu(_message.Message):
    __slots__ = ("index", "name", "utilization_percent", "memory_used_bytes", "memory_total_bytes", "power_w", "temperature_c", "ecc_corrected", "ecc_uncorrected", "nvlink_errors", "pcie_replays", "xid_errors", "last_xid", "uuid", "throttle_reasons")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    POWER_W_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    ECC_CORRECTED_FIELD_NUMBER: _ClassVar[int]
    ECC_UNCORRECTED_FIELD_NUMBER: _ClassVar[int]
    NVLINK_ERRORS_FIELD_NUMBER: _ClassVar[int]
    PCIE_REPLAYS_FIELD_NUMBER: _ClassVar[int]
    XID_ERRORS_FIELD_NUMBER: _ClassVar[int]
    LAST_XID_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    THROTTLE_REASONS_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    utilization_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    power_w: float
    temperature_c: float
    ecc_corrected: int
    ecc_uncorrected: int
    nvlink_errors: int
    pcie_replays: int
    xid_errors: int
    last_xid: int
    uuid: str
    throttle_reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., utilization_percent: _Optional[float] = ..., memory_used_bytes: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., power_w: _Optional[float] = ..., temperature_c: _Optional[float] = ..., ecc_corrected: _Optional[int] = ..., ecc_uncorrected: _Optional[int] = ..., nvlink_errors: _Optional[int] = ..., pcie_replays: _Optional[int] = ..., xid_errors: _Optional[int] = ..., last_xid: _Optional[int] = ..., uuid: _Optional[str] = ..., throttle_reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunInfo]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunInfo, _Mapping]]] = ...) -> None: ...

class RunInfo(_message.Message):
    __slots__ = ("run_id", "run_dir", "name", "state", "strategy", "started_s", "finished_s", "world_size", "num_nodes", "command", "exit_status", "message", "config_toml", "planned_memory_bytes", "restarts", "layout")
    class PlannedMemoryBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_DIR_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_S_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_TOML_FIELD_NUMBER: _ClassVar[int]
    PLANNED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    run_dir: str
    name: str
    state: str
    strategy: str
    started_s: float
    finished_s: float
    world_size: int
    num_nodes: int
    command: _containers.RepeatedScalarFieldContainer[str]
    exit_status: int
    message: str
    config_toml: str
    planned_memory_bytes: _containers.ScalarMap[str, int]
    restarts: int
    layout: Layout
    def __init__(self, run_id: _Optional[str] = ..., run_dir: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[str] = ..., strategy: _Optional[str] = ..., started_s: _Optional[float] = ..., finished_s: _Optional[float] = ..., world_size: _Optional[int] = ..., num_nodes: _Optional[int] = ..., command: _Optional[_Iterable[str]] = ..., exit_status: _Optional[int] = ..., message: _Optional[str] = ..., config_toml: _Optional[str] = ..., planned_memory_bytes: _Optional[_Mapping[str, int]] = ..., restarts: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("run_id", "node")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    node: str
    def __init__(self, run_id: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class RankState(_message.Message):
    __slots__ = ("rank", "node", "pid", "state", "step", "loss", "step_s", "tokens_per_s", "memory_bytes", "last_step", "memory", "heartbeat", "last_seen_s", "device", "device_name", "num_parameters", "error", "busy", "samples_per_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_S_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: str
    pid: int
    state: str
    step: int
    loss: float
    step_s: float
    tokens_per_s: float
    memory_bytes: int
    last_step: Step
    memory: Memory
    heartbeat: Heartbeat
    last_seen_s: float
    device: str
    device_name: str
    num_parameters: int
    error: str
    busy: str
    samples_per_s: float
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., step: _Optional[int] = ..., loss: _Optional[float] = ..., step_s: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., last_step: _Optional[_Union[Step, _Mapping]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., last_seen_s: _Optional[float] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., num_parameters: _Optional[int] = ..., error: _Optional[str] = ..., busy: _Optional[str] = ..., samples_per_s: _Optional[float] = ...) -> None: ...

class Diagnosis(_message.Message):
    __slots__ = ("kind", "ranks", "collective", "group", "seq", "since_s", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    collective: str
    group: str
    seq: int
    since_s: float
    message: str
    def __init__(self, kind: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., collective: _Optional[str] = ..., group: _Optional[str] = ..., seq: _Optional[int] = ..., since_s: _Optional[float] = ..., message: _Optional[str] = ...) -> None: ...

class CollectiveSummary(_message.Message):
    __slots__ = ("group", "op", "count", "bytes", "mean_s", "max_s", "blocked_s", "last_seq", "lateness_s")
    class LastSeqEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    class LatenessSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    GROUP_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MEAN_S_FIELD_NUMBER: _ClassVar[int]
    MAX_S_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_S_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    LATENESS_S_FIELD_NUMBER: _ClassVar[int]
    group: str
    op: str
    count: int
    bytes: int
    mean_s: float
    max_s: float
    blocked_s: float
    last_seq: _containers.ScalarMap[int, int]
    lateness_s: _containers.ScalarMap[int, float]
    def __init__(self, group: _Optional[str] = ..., op: _Optional[str] = ..., count: _Optional[int] = ..., bytes: _Optional[int] = ..., mean_s: _Optional[float] = ..., max_s: _Optional[float] = ..., blocked_s: _Optional[float] = ..., last_seq: _Optional[_Mapping[int, int]] = ..., lateness_s: _Optional[_Mapping[int, float]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("run", "ranks", "diagnosis", "dropped", "collectives", "nodes", "step", "total_steps", "left_s", "effort", "hosts")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DIAGNOSIS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVES_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    EFFORT_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    run: RunInfo
    ranks: _containers.RepeatedCompositeFieldContainer[RankState]
    diagnosis: _containers.RepeatedCompositeFieldContainer[Diagnosis]
    dropped: int
    collectives: _containers.RepeatedCompositeFieldContainer[CollectiveSummary]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeState]
    step: int
    total_steps: int
    left_s: float
    effort: Effort
    hosts: _containers.RepeatedCompositeFieldContainer[Host]
    def __init__(self, run: _Optional[_Union[RunInfo, _Mapping]] = ..., ranks: _Optional[_Iterable[_Union[RankState, _Mapping]]] = ..., diagnosis: _Optional[_Iterable[_Union[Diagnosis, _Mapping]]] = ..., dropped: _Optional[int] = ..., collectives: _Optional[_Iterable[_Union[CollectiveSummary, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[NodeState, _Mapping]]] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., left_s: _Optional[float] = ..., effort: _Optional[_Union[Effort, _Mapping]] = ..., hosts: _Optional[_Iterable[_Union[Host, _Mapping]]] = ...) -> None: ...

class Host(_message.Message):
    __slots__ = ("node", "row", "num_ranks", "first_rank", "sick")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    SICK_FIELD_NUMBER: _ClassVar[int]
    node: str
    row: int
    num_ranks: int
    first_rank: int
    sick: bool
    def __init__(self, node: _Optional[str] = ..., row: _Optional[int] = ..., num_ranks: _Optional[int] = ..., first_rank: _Optional[int] = ..., sick: _Optional[bool] = ...) -> None: ...

class Effort(_message.Message):
    __slots__ = ("wall_s", "effective", "start_s", "notice_s", "waiting_s", "restart_s", "replay_s")
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    NOTICE_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_S_FIELD_NUMBER: _ClassVar[int]
    RESTART_S_FIELD_NUMBER: _ClassVar[int]
    REPLAY_S_FIELD_NUMBER: _ClassVar[int]
    wall_s: float
    effective: float
    start_s: float
    notice_s: float
    waiting_s: float
    restart_s: float
    replay_s: float
    def __init__(self, wall_s: _Optional[float] = ..., effective: _Optional[float] = ..., start_s: _Optional[float] = ..., notice_s: _Optional[float] = ..., waiting_s: _Optional[float] = ..., restart_s: _Optional[float] = ..., replay_s: _Optional[float] = ...) -> None: ...

class NodeState(_message.Message):
    __slots__ = ("node", "hardware", "last_seen_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    hardware: HardwareSample
    last_seen_s: float
    def __init__(self, node: _Optional[str] = ..., hardware: _Optional[_Union[HardwareSample, _Mapping]] = ..., last_seen_s: _Optional[float] = ...) -> None: ...

class StepSummary(_message.Message):
    __slots__ = ("step", "time_s", "loss", "grad_norm", "learning_rate", "step_s", "data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s", "tokens_per_s", "slowest_rank", "mfu", "skipped", "rank_step_s", "samples_per_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    DATA_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_COMM_S_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SLOWEST_RANK_FIELD_NUMBER: _ClassVar[int]
    MFU_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    RANK_STEP_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    time_s: float
    loss: float
    grad_norm: float
    learning_rate: float
    step_s: float
    data_wait_s: float
    forward_s: float
    backward_s: float
    exposed_comm_s: float
    optimizer_s: float
    tokens_per_s: float
    slowest_rank: int
    mfu: float
    skipped: bool
    rank_step_s: _containers.RepeatedScalarFieldContainer[float]
    samples_per_s: float
    def __init__(self, step: _Optional[int] = ..., time_s: _Optional[float] = ..., loss: _Optional[float] = ..., grad_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., step_s: _Optional[float] = ..., data_wait_s: _Optional[float] = ..., forward_s: _Optional[float] = ..., backward_s: _Optional[float] = ..., exposed_comm_s: _Optional[float] = ..., optimizer_s: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., slowest_rank: _Optional[int] = ..., mfu: _Optional[float] = ..., skipped: _Optional[bool] = ..., rank_step_s: _Optional[_Iterable[float]] = ..., samples_per_s: _Optional[float] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("run_id", "interval_s", "max_points", "node")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    MAX_POINTS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    interval_s: float
    max_points: int
    node: str
    def __init__(self, run_id: _Optional[str] = ..., interval_s: _Optional[float] = ..., max_points: _Optional[int] = ..., node: _Optional[str] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("snapshot", "steps", "events", "metrics", "server_time_s")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_S_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    steps: _containers.RepeatedCompositeFieldContainer[StepSummary]
    events: _containers.RepeatedCompositeFieldContainer[TimedEvent]
    metrics: _containers.RepeatedCompositeFieldContainer[TimedMetrics]
    server_time_s: float
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[StepSummary, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[TimedEvent, _Mapping]]] = ..., metrics: _Optional[_Iterable[_Union[TimedMetrics, _Mapping]]] = ..., server_time_s: _Optional[float] = ...) -> None: ...

class TimedEvent(_message.Message):
    __slots__ = ("time_s", "rank", "event")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    rank: int
    event: Event
    def __init__(self, time_s: _Optional[float] = ..., rank: _Optional[int] = ..., event: _Optional[_Union[Event, _Mapping]] = ...) -> None: ...

class TimedMetrics(_message.Message):
    __slots__ = ("time_s", "rank", "metrics")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    rank: int
    metrics: Metrics
    def __init__(self, time_s: _Optional[float] = ..., rank: _Optional[int] = ..., metrics: _Optional[_Union[Metrics, _Mapping]] = ...) -> None: ...

class ReadLogRequest(_message.Message):
    __slots__ = ("run_id", "rank", "offset", "max_bytes")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    rank: int
    offset: int
    max_bytes: int
    def __init__(self, run_id: _Optional[str] = ..., rank: _Optional[int] = ..., offset: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class ReadLogResponse(_message.Message):
    __slots__ = ("data", "next_offset", "size")
    DATA_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    next_offset: int
    size: int
    def __init__(self, data: _Optional[bytes] = ..., next_offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class DaemonInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DaemonInfo(_message.Message):
    __slots__ = ("version", "pid", "started_s", "cpu_s", "rss_bytes", "num_runs", "num_watchers", "addresses")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    CPU_S_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNS_FIELD_NUMBER: _ClassVar[int]
    NUM_WATCHERS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    started_s: float
    cpu_s: float
    rss_bytes: int
    num_runs: int
    num_watchers: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., started_s: _Optional[float] = ..., cpu_s: _Optional[float] = ..., rss_bytes: _Optional[int] = ..., num_runs: _Optional[int] = ..., num_watchers: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("run_id", "verb", "arguments", "deadline_s")
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    verb: str
    arguments: _containers.ScalarMap[str, str]
    deadline_s: float
    def __init__(self, run_id: _Optional[str] = ..., verb: _Optional[str] = ..., arguments: _Optional[_Mapping[str, str]] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class ControlReply(_message.Message):
    __slots__ = ("rank", "state", "message", "payload")
    RANK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    rank: int
    state: str
    message: str
    payload: bytes
    def __init__(self, rank: _Optional[int] = ..., state: _Optional[str] = ..., message: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...
