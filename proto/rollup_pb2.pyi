from distui.proto import telemetry_pb2 as _telemetry_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RollUp(_message.Message):
    __slots__ = ("run_id", "number", "sent_s", "nodes", "ranks", "names", "batches", "answers")
    class NamesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SENT_S_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    number: int
    sent_s: float
    nodes: _containers.RepeatedCompositeFieldContainer[RolledNode]
    ranks: RankColumns
    names: _containers.ScalarMap[int, str]
    batches: _containers.RepeatedCompositeFieldContainer[_telemetry_pb2.Batch]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    def __init__(self, run_id: _Optional[str] = ..., number: _Optional[int] = ..., sent_s: _Optional[float] = ..., nodes: _Optional[_Iterable[_Union[RolledNode, _Mapping]]] = ..., ranks: _Optional[_Union[RankColumns, _Mapping]] = ..., names: _Optional[_Mapping[int, str]] = ..., batches: _Optional[_Iterable[_Union[_telemetry_pb2.Batch, _Mapping]]] = ..., answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ...) -> None: ...

class RolledNode(_message.Message):
    __slots__ = ("node", "num_ranks", "num_entered", "num_waiting", "time_s", "hardware", "diagnosis", "skew_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENTERED_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    DIAGNOSIS_FIELD_NUMBER: _ClassVar[int]
    SKEW_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    num_ranks: int
    num_entered: int
    num_waiting: int
    time_s: float
    hardware: _telemetry_pb2.HardwareSample
    diagnosis: _containers.RepeatedCompositeFieldContainer[_telemetry_pb2.Diagnosis]
    skew_s: float
    def __init__(self, node: _Optional[str] = ..., num_ranks: _Optional[int] = ..., num_entered: _Optional[int] = ..., num_waiting: _Optional[int] = ..., time_s: _Optional[float] = ..., hardware: _Optional[_Union[_telemetry_pb2.HardwareSample, _Mapping]] = ..., diagnosis: _Optional[_Iterable[_Union[_telemetry_pb2.Diagnosis, _Mapping]]] = ..., skew_s: _Optional[float] = ...) -> None: ...

class RankColumns(_message.Message):
    __slots__ = ("rank", "pid", "state", "phase", "step", "total_steps", "step_s", "data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s", "tokens_per_s", "samples_per_s", "loss", "grad_norm", "learning_rate", "memory_bytes", "device_bytes", "phase_age_s", "seen_age_s", "entered_rank", "entered_group", "entered_seq", "waiting_rank", "waiting_group", "waiting_op", "waiting_seq", "waiting_age_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    DATA_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_COMM_S_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PHASE_AGE_S_FIELD_NUMBER: _ClassVar[int]
    SEEN_AGE_S_FIELD_NUMBER: _ClassVar[int]
    ENTERED_RANK_FIELD_NUMBER: _ClassVar[int]
    ENTERED_GROUP_FIELD_NUMBER: _ClassVar[int]
    ENTERED_SEQ_FIELD_NUMBER: _ClassVar[int]
    WAITING_RANK_FIELD_NUMBER: _ClassVar[int]
    WAITING_GROUP_FIELD_NUMBER: _ClassVar[int]
    WAITING_OP_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQ_FIELD_NUMBER: _ClassVar[int]
    WAITING_AGE_S_FIELD_NUMBER: _ClassVar[int]
    rank: bytes
    pid: bytes
    state: bytes
    phase: bytes
    step: bytes
    total_steps: bytes
    step_s: bytes
    data_wait_s: bytes
    forward_s: bytes
    backward_s: bytes
    exposed_comm_s: bytes
    optimizer_s: bytes
    tokens_per_s: bytes
    samples_per_s: bytes
    loss: bytes
    grad_norm: bytes
    learning_rate: bytes
    memory_bytes: bytes
    device_bytes: bytes
    phase_age_s: bytes
    seen_age_s: bytes
    entered_rank: bytes
    entered_group: bytes
    entered_seq: bytes
    waiting_rank: bytes
    waiting_group: bytes
    waiting_op: bytes
    waiting_seq: bytes
    waiting_age_s: bytes
    def __init__(self, rank: _Optional[bytes] = ..., pid: _Optional[bytes] = ..., state: _Optional[bytes] = ..., phase: _Optional[bytes] = ..., step: _Optional[bytes] = ..., total_steps: _Optional[bytes] = ..., step_s: _Optional[bytes] = ..., data_wait_s: _Optional[bytes] = ..., forward_s: _Optional[bytes] = ..., backward_s: _Optional[bytes] = ..., exposed_comm_s: _Optional[bytes] = ..., optimizer_s: _Optional[bytes] = ..., tokens_per_s: _Optional[bytes] = ..., samples_per_s: _Optional[bytes] = ..., loss: _Optional[bytes] = ..., grad_norm: _Optional[bytes] = ..., learning_rate: _Optional[bytes] = ..., memory_bytes: _Optional[bytes] = ..., device_bytes: _Optional[bytes] = ..., phase_age_s: _Optional[bytes] = ..., seen_age_s: _Optional[bytes] = ..., entered_rank: _Optional[bytes] = ..., entered_group: _Optional[bytes] = ..., entered_seq: _Optional[bytes] = ..., waiting_rank: _Optional[bytes] = ..., waiting_group: _Optional[bytes] = ..., waiting_op: _Optional[bytes] = ..., waiting_seq: _Optional[bytes] = ..., waiting_age_s: _Optional[bytes] = ...) -> None: ...

class Down(_message.Message):
    __slots__ = ("number", "echo_s", "now_s", "ask")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ECHO_S_FIELD_NUMBER: _ClassVar[int]
    NOW_S_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    number: int
    echo_s: float
    now_s: float
    ask: Ask
    def __init__(self, number: _Optional[int] = ..., echo_s: _Optional[float] = ..., now_s: _Optional[float] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("id", "run_id", "node")
    ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    id: int
    run_id: str
    node: str
    def __init__(self, id: _Optional[int] = ..., run_id: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("id", "snapshot")
    ID_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    id: int
    snapshot: _telemetry_pb2.Snapshot
    def __init__(self, id: _Optional[int] = ..., snapshot: _Optional[_Union[_telemetry_pb2.Snapshot, _Mapping]] = ...) -> None: ...
