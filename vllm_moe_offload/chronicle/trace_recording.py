"""``--moe-offload-trace FILE``: all requests of an engine, as a trace file that grows while it serves."""

from dataclasses import replace
from pathlib import Path

from ..errors import TraceError
from ..history.joining import join
from ..history.trace import Trace
from ..history.trace_file import read_trace, write_trace


class TraceRecording:
    """The requests that have ended, and the file they are written to.

    A sound file of the same model is continued, so that a restart loses nothing.

    Args:
        shape: layers, experts per layer, experts per token.
        model: what people call it.
        fingerprint: of its weights.

    Raises:
        TraceError: the file is there and is not a trace of this model, or its folder cannot be written.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], model: str, fingerprint: str):
        self.path = path
        self._shape, self._model, self._fingerprint = shape, model, fingerprint
        self._requests: list[Trace] = []
        self._written = -1
        if path.exists():
            self._requests.append(self._earlier())
        self.write()

    def add(self, request: Trace) -> None:
        """A request has ended. Seen by the next ``write``."""
        self._requests.append(request)

    def write(self) -> None:
        """Replace the file by one that has all requests that have ended, if there are new ones."""
        requests = list(self._requests)
        if len(requests) == self._written:
            return
        trace = join(requests, self._shape)
        try:
            write_trace(self.path, replace(trace, model=self._model, fingerprint=self._fingerprint), compress=False)
        except OSError as error:
            raise TraceError(f"trace = {self.path} cannot be written ({error.strerror})") from error
        self._written = len(requests)

    def _earlier(self) -> Trace:
        earlier = read_trace(self.path)
        if earlier.fingerprint != self._fingerprint or (earlier.num_tokens and earlier.shape != self._shape):
            raise TraceError(
                f"trace = {self.path} holds a trace of {earlier.model or 'an unknown model'}; give another file, or "
                "move that one away"
            )
        return earlier
