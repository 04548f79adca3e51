"""`vllm-moe-offload …`: what can be done without serving.

Importing it must never import vLLM or torch: every offline command works on a machine that has neither.
"""

import typer

from .bench import bench
from .daemon import daemon
from .doctor import doctor
from .errors import PlainErrors
from .history import history
from .plan import plan
from .prepare import prepare
from .replay import replay
from .selftest import selftest
from .store import store
from .top import top

app = typer.Typer(
    name="vllm-moe-offload",
    cls=PlainErrors,
    help="Serve MoE models that are larger than fast memory with stock vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(store)
app.add_typer(history)
app.add_typer(daemon)
app.command()(plan)
app.command()(prepare)
app.command()(doctor)
app.command()(replay)
app.command()(selftest)
app.command()(bench)
app.command()(top)
