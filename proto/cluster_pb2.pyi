from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KeptFile(_message.Message):
    __slots__ = ("save", "name")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    save: str
    name: str
    def __init__(self, save: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class KeptPiece(_message.Message):
    __slots__ = ("save", "name", "data")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    save: SaveFacts
    name: str
    data: bytes
    def __init__(self, save: _Optional[_Union[SaveFacts, _Mapping]] = ..., name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class KeptAll(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Piece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class AgentSays(_message.Message):
    __slots__ = ("hello", "beat", "store", "ended", "done", "file", "dialled", "daemon", "kept")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    DIALLED_FIELD_NUMBER: _ClassVar[int]
    DAEMON_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    hello: str
    beat: Beat
    store: StoreAt
    ended: RankEnded
    done: Done
    file: FilePiece
    dialled: Dialled
    daemon: DaemonAt
    kept: Kept
    def __init__(self, hello: _Optional[str] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., store: _Optional[_Union[StoreAt, _Mapping]] = ..., ended: _Optional[_Union[RankEnded, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., file: _Optional[_Union[FilePiece, _Mapping]] = ..., dialled: _Optional[_Union[Dialled, _Mapping]] = ..., daemon: _Optional[_Union[DaemonAt, _Mapping]] = ..., kept: _Optional[_Union[Kept, _Mapping]] = ...) -> None: ...

class SupervisorSays(_message.Message):
    __slots__ = ("beat", "open_store", "start", "alone", "end", "preempt", "open_daemon", "settled", "dial")
    BEAT_FIELD_NUMBER: _ClassVar[int]
    OPEN_STORE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PREEMPT_FIELD_NUMBER: _ClassVar[int]
    OPEN_DAEMON_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    DIAL_FIELD_NUMBER: _ClassVar[int]
    beat: Beat
    open_store: OpenStore
    start: Start
    alone: Alone
    end: End
    preempt: Preempt
    open_daemon: OpenDaemon
    settled: Settled
    dial: Dial
    def __init__(self, beat: _Optional[_Union[Beat, _Mapping]] = ..., open_store: _Optional[_Union[OpenStore, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., alone: _Optional[_Union[Alone, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., preempt: _Optional[_Union[Preempt, _Mapping]] = ..., open_daemon: _Optional[_Union[OpenDaemon, _Mapping]] = ..., settled: _Optional[_Union[Settled, _Mapping]] = ..., dial: _Optional[_Union[Dial, _Mapping]] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class OpenStore(_message.Message):
    __slots__ = ("attempt", "probe")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    probe: bool
    def __init__(self, attempt: _Optional[int] = ..., probe: _Optional[bool] = ...) -> None: ...

class OpenDaemon(_message.Message):
    __slots__ = ("parent", "certificate", "token", "serves", "name")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SERVES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    parent: str
    certificate: str
    token: str
    serves: bool
    name: str
    def __init__(self, parent: _Optional[str] = ..., certificate: _Optional[str] = ..., token: _Optional[str] = ..., serves: _Optional[bool] = ..., name: _Optional[str] = ...) -> None: ...

class DaemonAt(_message.Message):
    __slots__ = ("address", "certificate", "token", "problem")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    address: str
    certificate: str
    token: str
    problem: str
    def __init__(self, address: _Optional[str] = ..., certificate: _Optional[str] = ..., token: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class Dial(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Dialled(_message.Message):
    __slots__ = ("failed",)
    FAILED_FIELD_NUMBER: _ClassVar[int]
    failed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, failed: _Optional[_Iterable[str]] = ...) -> None: ...

class StoreAt(_message.Message):
    __slots__ = ("attempt", "port", "problem", "probe")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    port: int
    problem: str
    probe: bool
    def __init__(self, attempt: _Optional[int] = ..., port: _Optional[int] = ..., problem: _Optional[str] = ..., probe: _Optional[bool] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("attempt", "max_restarts", "node", "num_nodes", "first_rank", "num_ranks", "world_size", "address", "port", "partner", "restore")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PARTNER_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    max_restarts: int
    node: int
    num_nodes: int
    first_rank: int
    num_ranks: int
    world_size: int
    address: str
    port: int
    partner: str
    restore: Restore
    def __init__(self, attempt: _Optional[int] = ..., max_restarts: _Optional[int] = ..., node: _Optional[int] = ..., num_nodes: _Optional[int] = ..., first_rank: _Optional[int] = ..., num_ranks: _Optional[int] = ..., world_size: _Optional[int] = ..., address: _Optional[str] = ..., port: _Optional[int] = ..., partner: _Optional[str] = ..., restore: _Optional[_Union[Restore, _Mapping]] = ...) -> None: ...

class SaveFacts(_message.Message):
    __slots__ = ("save", "step", "world_size", "ranks")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    save: str
    step: int
    world_size: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, save: _Optional[str] = ..., step: _Optional[int] = ..., world_size: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class Kept(_message.Message):
    __slots__ = ("save", "copy", "pending", "problem")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    save: SaveFacts
    copy: bool
    pending: bool
    problem: str
    def __init__(self, save: _Optional[_Union[SaveFacts, _Mapping]] = ..., copy: _Optional[bool] = ..., pending: _Optional[bool] = ..., problem: _Optional[str] = ...) -> None: ...

class Settled(_message.Message):
    __slots__ = ("save",)
    SAVE_FIELD_NUMBER: _ClassVar[int]
    save: str
    def __init__(self, save: _Optional[str] = ...) -> None: ...

class Holder(_message.Message):
    __slots__ = ("address", "ranks")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    address: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, address: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class Restore(_message.Message):
    __slots__ = ("save", "holders")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    save: SaveFacts
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    def __init__(self, save: _Optional[_Union[SaveFacts, _Mapping]] = ..., holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ...) -> None: ...

class Alone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class End(_message.Message):
    __slots__ = ("leave", "forgets_preemption")
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    FORGETS_PREEMPTION_FIELD_NUMBER: _ClassVar[int]
    leave: bool
    forgets_preemption: bool
    def __init__(self, leave: _Optional[bool] = ..., forgets_preemption: _Optional[bool] = ...) -> None: ...

class Preempt(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankEnded(_message.Message):
    __slots__ = ("attempt", "rank", "pid", "exit_status", "signal", "age_s", "report", "report_age_s", "step")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    rank: int
    pid: int
    exit_status: int
    signal: int
    age_s: float
    report: str
    report_age_s: float
    step: int
    def __init__(self, attempt: _Optional[int] = ..., rank: _Optional[int] = ..., pid: _Optional[int] = ..., exit_status: _Optional[int] = ..., signal: _Optional[int] = ..., age_s: _Optional[float] = ..., report: _Optional[str] = ..., report_age_s: _Optional[float] = ..., step: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("attempt", "stopped", "problem", "swept")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    SWEPT_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    stopped: str
    problem: str
    swept: bool
    def __init__(self, attempt: _Optional[int] = ..., stopped: _Optional[str] = ..., problem: _Optional[str] = ..., swept: _Optional[bool] = ...) -> None: ...

class FilePiece(_message.Message):
    __slots__ = ("name", "offset", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    data: bytes
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
