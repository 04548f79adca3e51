"""Matrix products of prediction stay on the thread that asks for them."""

import os
import subprocess
import sys

SHARE_OF_OTHER_THREADS = """
import time
import numpy as np
from vllm_moe_offload.threads import keep_blas_on_one_thread

assert keep_blas_on_one_thread()
matrix = np.ones((900, 900), np.float32)
process, thread = time.process_time(), time.thread_time()
for _ in range(30):
    matrix @ matrix
process, thread = time.process_time() - process, time.thread_time() - thread
print((process - thread) / process)
"""


def test_a_product_takes_no_other_threads_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARE_OF_OTHER_THREADS],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "2"},
    )
    assert float(done.stdout) < 0.25, "two threads would share the time"
