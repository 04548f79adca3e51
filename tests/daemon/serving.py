"""A daemon in this process, with the models of a real store."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vllm_moe_offload.daemon.histories import DaemonHistories
from vllm_moe_offload.daemon.models import DaemonModels
from vllm_moe_offload.daemon.server import DaemonServer
from vllm_moe_offload.daemon.socket_file import SocketFile


@contextmanager
def serving(path: Path, stores: Path) -> Iterator[DaemonModels]:
    """Serves the stores of a folder at a path, with room for 1 MiB of experts."""
    with ExitStack() as stack:
        place = SocketFile.claim(path, None)
        stack.callback(place.release)
        models = DaemonModels(stores, 1 << 20, {}, "lfu", None)
        stack.callback(models.close)
        histories = DaemonHistories(None)
        stack.callback(histories.close)
        server = DaemonServer(place, models, histories, 1 << 20, None, None)
        thread = threading.Thread(target=server.serve)
        thread.start()
        stack.callback(thread.join, 60)
        stack.callback(server.stop, "the test is over")
        yield models
