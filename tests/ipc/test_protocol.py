"""What the messages promise: they survive the wire, and nothing else is taken for one."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.ipc.protocol import (
    Attach,
    Attached,
    Demand,
    FailedLoad,
    Found,
    GetStatus,
    Hello,
    Hint,
    HistoryOpened,
    HistorySize,
    ImportSlots,
    Message,
    ModelStatus,
    OpenHistory,
    PackedTrace,
    PoolInfo,
    Refused,
    Remember,
    Remembered,
    Reply,
    Request,
    Search,
    SlotsImported,
    StatusReport,
    Stop,
    Stopping,
    Supplied,
    Welcome,
    WorkerStatus,
    pack_ids,
    unpack_ids,
)

REQUESTS = [
    Hello(1, "worker"),
    Attach("fingerprint", 4711, 1 << 34, True, "engine 1", 3),
    Demand(7, 1, pack_ids(np.arange(8)), stream=True),
    Hint(0, pack_ids(np.arange(3))),
    ImportSlots(1, b"\1\0\0\0", b"\2\0\0\0"),
    OpenHistory("ab" * 16, (3, 8, 2), "fingerprint"),
    Remember(PackedTrace(b"\1\0\0\0", b"\1", b"\0\x3c", phase=b"\0"), maybe_duplicate=True),
    Search(b"\0\0\x80\x3f", 1000),
    GetStatus(),
    Stop(),
]
REPLIES = [
    Welcome(1, 4711),
    Attached(63, False, [PoolInfo(1536, 300, 1 << 40, 1 << 20), PoolInfo(8, 8, 1 << 30, 1 << 20)]),
    Supplied(7, pack_ids(np.array([5, -1])), 1, 0, [FailedLoad(9, "unreadable", False)]),
    SlotsImported(1200),
    HistoryOpened(HistorySize(3, 700), None),
    Remembered(HistorySize(4, 900)),
    Found(PackedTrace(b"", b"", b""), HistorySize(4, 900)),
    StatusReport(
        1,
        2.5,
        3,
        [ModelStatus("f", "m", {"loads": 7, "stall_seconds": 0.5}, [WorkerStatus(0, 1, "g", 0, False, {})])],
        ["keeper: OSError: x"],
    ),
    Stopping(),
    Refused("no"),
]


@pytest.mark.parametrize(("messages", "kind"), [(REQUESTS, Request), (REPLIES, Reply)])
def test_every_message_survives_the_wire(messages: list[Message], kind: type) -> None:
    decoder = msgspec.msgpack.Decoder(kind)
    for message in messages:
        assert decoder.decode(msgspec.msgpack.encode(message)) == message
    assert {type(message) for message in messages} == set(kind.__args__)  # type: ignore[attr-defined]


def test_requests_are_no_replies_and_the_reverse() -> None:
    for messages, other in ((REQUESTS, Reply), (REPLIES, Request)):
        for message in messages:
            with pytest.raises(msgspec.ValidationError):
                msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=other)


@pytest.mark.parametrize("message", [m for m in REQUESTS if not isinstance(m, Hello)], ids=lambda m: type(m).__name__)
def test_unknown_fields_are_refused(message: Message) -> None:
    fields = msgspec.to_builtins(message, builtin_types=(bytes,)) | {"surprise": 1}
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Request)


def test_a_later_hello_is_understood_well_enough_to_name_its_version() -> None:
    later = msgspec.msgpack.encode({"type": "Hello", "version": 9, "role": "worker", "surprise": 1})
    assert msgspec.msgpack.decode(later, type=Request) == Hello(9, "worker")


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_ids_travel_as_they_are(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(np.array(ids, np.int64))).tolist() == ids


def test_half_an_id_is_none() -> None:
    with pytest.raises(ValueError):
        unpack_ids(b"\1\2\3")
