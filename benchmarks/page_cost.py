"""What an open live page costs a decode step: token latencies of a running server, with and without its questions.

vllm serve MODEL --plugin moe-offload --moe-offload-page
python benchmarks/page_cost.py http://localhost:8000 --tokens 200 --rounds 10

Every round streams one request twice, in turn with the page closed and open. Open means what a browser's tab asks,
every two seconds, from this process; a browser that draws on the server's own cores costs besides.
"""

import argparse
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from urllib.parse import urlsplit

import numpy as np

SECONDS_BETWEEN_QUESTIONS = 2.0


def latencies(host: str, model: str, prompt: list[int], tokens: int) -> list[float]:
    """Seconds between the tokens of one streamed request."""
    connection = http.client.HTTPConnection(host, timeout=600)
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    times = [time.perf_counter() for line in connection.getresponse() if line.startswith(b"data: {")]
    connection.close()
    return np.diff(times).tolist()


@contextmanager
def open_page(host: str, answers: list[tuple[float, int]]) -> Iterator[None]:
    """Ask what an open tab asks, until the block ends. Seconds and bytes of every answer are added to ``answers``."""
    closed = threading.Event()

    def ask() -> None:
        since = 0.0
        connection = http.client.HTTPConnection(host, timeout=60)
        while not closed.is_set():
            asked = time.perf_counter()
            connection.request("GET", f"/moe-offload/data?since={since}")
            answer = connection.getresponse().read()
            answers.append((time.perf_counter() - asked, len(answer)))
            model = json.loads(answer)["model"]
            since = model["series"]["time"][-1] if model["series"]["time"] else since
            closed.wait(SECONDS_BETWEEN_QUESTIONS)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    host = urlsplit(options.url).netloc
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/v1/models")
    model = json.load(connection.getresponse())["data"][0]["id"]

    answers: list[tuple[float, int]] = []
    rounds: dict[bool, list[list[float]]] = {False: [], True: []}
    for number in range(-1, options.rounds):
        for is_open in (False, True) if number % 2 else (True, False):
            with open_page(host, answers) if is_open else nullcontext():
                measured = latencies(host, model, list(range(1, 33)), options.tokens)
            if number >= 0:
                rounds[is_open].append(measured)
    for is_open, name in ((False, "closed"), (True, "open")):
        p50, p95 = (1e3 * np.percentile(np.concatenate(rounds[is_open]), share) for share in (50, 95))
        print(f"page {name:6}  p50 {p50:.2f} ms  p95 {p95:.2f} ms  of {sum(map(len, rounds[is_open]))} tokens")
    seconds, nbytes = np.median(answers, axis=0)
    print(f"an answer to the page took {1e3 * seconds:.2f} ms and had {nbytes:.0f} bytes (medians of {len(answers)})")
    for share in (50, 95):
        ratios = [
            np.percentile(after, share) / np.percentile(before, share)
            for before, after in zip(rounds[False], rounds[True], strict=True)
        ]
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        print(f"p{share} open / closed, by round: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
