"""With ``--group`` users share experts and where requests were routed to, and nothing of what those said."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from tests.daemon.past import FINGERPRINT, SHAPE, WIDTH, past_request, same
from tests.daemon.served_daemon import STORE, ServedDaemon
from tests.daemon.test_socket_file import as_root, open_to_all
from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.daemon.history import DaemonHistory
from vllm_moe_offload.ipc.protocol import OpenHistory, Remember, Search
from vllm_moe_offload.ipc.trace_codec import pack_embedding, pack_trace, unpack_trace
from vllm_moe_offload.predict.base import UNKNOWN_TOKEN
from vllm_moe_offload.trace.trace import Trace

GROUP = 4321
ANN, BOB = 65533, 65534
EMBEDDINGS = np.eye(WIDTH, dtype=np.float32)


@contextmanager
def engine(path: Path, user: int) -> Iterator[Connection]:
    """An engine of a member of the group."""
    os.setegid(GROUP)
    os.seteuid(user)
    try:
        connection = Connection.connect(path, "history", 10)
    finally:
        os.seteuid(0)
        os.setegid(0)
    with closing(connection):
        connection.request(OpenHistory(FINGERPRINT, SHAPE, STORE))
        yield connection


def found(connection: Connection, axis: int | None) -> Trace:
    embedding = None if axis is None else EMBEDDINGS[axis]
    return unpack_trace(connection.request(Search(pack_embedding(embedding), 1000)).trace, SHAPE)


def says_nothing(trace: Trace) -> bool:
    assert trace.tokens is not None and trace.embeddings is not None
    return bool((trace.tokens == UNKNOWN_TOKEN).all() and not trace.embeddings.any())


@as_root
def test_of_another_user_s_request_nothing_but_its_experts_is_told(tmp_path: Path) -> None:
    open_to_all(tmp_path)
    requests = {0: past_request(0), ANN: past_request(1), BOB: past_request(2)}
    with ServedDaemon(tmp_path / "socket", group=GROUP) as served:
        for user, trace in requests.items():
            with engine(served.path, user) as connection:
                connection.request(Remember(pack_trace(trace)))
        for asker in requests:
            for axis in (None, 0, 1, 2):
                with engine(served.path, asker) as connection:
                    answer = found(connection, axis)
                assert answer.num_requests == len(requests)
                for told in answer.requests():
                    (owner,) = [u for u, trace in requests.items() if np.array_equal(trace.experts, told.experts)]
                    assert same(told, requests[owner]) if owner == asker else says_nothing(told)
        with engine(served.path, BOB) as connection:
            first = found(connection, 1).request(0)
            assert np.array_equal(first.experts, requests[ANN].experts), "what resembles is found all the same"


def test_whose_a_request_is_is_known_for_as_long_as_it_is_remembered() -> None:
    history = DaemonHistory(None, FINGERPRINT, SHAPE)
    history._history.budget_bytes = 4 * 16 * past_request(0).experts.nbytes
    for number in range(40):
        history.remember(past_request(number), user=ANN if number % 2 else BOB)
        told = {user: history.search(None, 1000, user) for user in (ANN, BOB)}
        for index in range(told[ANN].num_requests):
            assert [says_nothing(told[user].request(index)) for user in (ANN, BOB)].count(True) == 1
        assert len(history._others) == history.size.requests
    assert history.size.requests < 40, "some were forgotten"
