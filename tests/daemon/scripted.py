"""Something that listens like a daemon and answers what a test wants it to."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from vllm_moe_offload.ipc.protocol import VERSION, Hello, Message, Request, Welcome
from vllm_moe_offload.ipc.transport import Channel

Answer = Callable[[Request], Message | None]


class ScriptedDaemon:
    """Welcomes everybody, then sends what ``answer`` returns for each request; None keeps the peer waiting."""

    def __init__(self, path: Path, answer: Answer):
        self.roles: list[str] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._connections: list[Channel[Request]] = []
        self._threads[0].start()

    def __enter__(self) -> "ScriptedDaemon":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for channel in self._connections:
            channel.shut_down()
        for thread in self._threads:
            thread.join(60)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            channel = Channel(peer, msgspec.msgpack.Decoder(Request), 1)
            self._connections.append(channel)
            self._threads.append(threading.Thread(target=self._serve, args=(channel,), daemon=True))
            self._threads[-1].start()

    def _serve(self, channel: Channel[Request]) -> None:
        hello = channel.receive()
        if isinstance(hello, Hello):
            self.roles.append(hello.role)
            channel.send(Welcome(VERSION, os.getpid()))
        while (request := channel.receive()) is not None:
            reply = self._answer(request)
            if reply is not None:
                channel.send(reply)
        channel.close()
