"""The examples of the repository: scripts are run, command lines of deployments go through the real parsers."""

import configparser
import os
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.core import TyperGroup

from tests.e2e.live_engine import LiveEngine
from tests.integration.conftest import Parse
from vllm_moe_offload.cli import app
from vllm_moe_offload.config import resolve
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import write_trace

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPOSE = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))


def compose_commands() -> Iterator[str]:
    for service in COMPOSE["services"].values():
        yield service["command"]
        if "healthcheck" in service:
            yield service["healthcheck"]["test"]


def pods() -> Iterator[dict[str, Any]]:
    for resource in KUBERNETES:
        if "template" in resource["spec"]:
            yield resource["spec"]["template"]["spec"]


def kubernetes_commands() -> Iterator[str]:
    for pod in pods():
        for container in pod["containers"]:
            yield shlex.join(container["command"])
            for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
                if "exec" in container.get(probe, {}):
                    yield shlex.join(container[probe]["exec"]["command"])


def systemd_commands() -> Iterator[str]:
    for path in EXAMPLES.glob("*.service"):
        unit = configparser.ConfigParser(interpolation=None, strict=False)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read(path)
        yield unit["Service"]["ExecStart"]


COMMANDS = [*compose_commands(), *kubernetes_commands(), *systemd_commands()]


def words_of(command: str) -> list[str]:
    """The command line as a shell or systemd would have it, and its program without a folder."""
    program, *words = shlex.split(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", command))
    return [Path(program).name, *words]


def test_there_are_command_lines_of_both_programs() -> None:
    assert len(COMMANDS) == 4 + 3 + 2
    assert {words_of(command)[0] for command in COMMANDS} == {"vllm", "vllm-moe-offload"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_deployments_command_line_is_understood(command: str, engine_args: Parse) -> None:
    program, *words = words_of(command)
    if program == "vllm-moe-offload":
        understand(typer.main.get_command(app), program, words)
        return
    assert words[0] == "serve"
    config, _ = resolve(engine_args(*words[2:]).additional_config, {})
    assert config is not None and config.cache == "16GiB"


def understand(command: Any, name: str, words: list[str]) -> None:
    """Parse a command line down to its last option; what is not known raises ``UsageError``."""
    context = command.make_context(name, words)
    left = [*context._protected_args, *context.args]
    if isinstance(command, TyperGroup) and left:
        name, inner, words = command.resolve_command(context, left)
        understand(inner, name, words)


@pytest.mark.parametrize("wrong", ["daemon --cach 32GiB", "daemon status --sockett here", "daemons"])
def test_a_command_line_that_is_wrong_is_not_understood(wrong: str) -> None:
    with pytest.raises(Exception, match=r"No such (option|command)"):
        understand(typer.main.get_command(app), "vllm-moe-offload", wrong.split())


def test_containers_of_a_pod_mount_volumes_that_it_has_and_selectors_find_their_pods() -> None:
    for pod in pods():
        volumes = {volume["name"] for volume in pod["volumes"]}
        containers = [*pod["containers"], *pod.get("initContainers", [])]
        assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == volumes
    labels = []
    for resource in KUBERNETES:
        if "template" in resource["spec"]:
            labels.append(resource["spec"]["template"]["metadata"]["labels"])
            assert resource["spec"]["selector"]["matchLabels"] == labels[-1]
    (service,) = [resource for resource in KUBERNETES if resource["kind"] == "Service"]
    assert service["spec"]["selector"] in labels


def test_engines_and_daemon_of_a_deployment_name_one_socket_and_one_folder_of_stores() -> None:
    for commands in (compose_commands(), kubernetes_commands()):
        sockets = {word.removeprefix("unix:") for command in commands for word in words_of(command) if ".sock" in word}
        assert sockets == {"/run/vllm-moe-offload/daemon.sock"}
    stores = {words[words.index(flag) + 1] for words, flag in named_stores()}
    assert stores == {"/var/lib/vllm-moe-offload/stores"}


def named_stores() -> Iterator[tuple[list[str], str]]:
    for command in kubernetes_commands():
        words = words_of(command)
        for flag in ("--store", "--moe-offload-store"):
            if flag in words:
                yield words, flag


def test_an_existing_deployment_keeps_its_command_line(tmp_path: Path) -> None:
    vllm = tmp_path / "vllm"
    vllm.write_text('#!/bin/sh\nprintf \'%s\\n\' "$@" "$VLLM_PLUGINS" "$VLLM_MOE_OFFLOAD"\n')
    vllm.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VLLM_PLUGINS": "another"}
    script = [str(EXAMPLES / "existing_deployment.sh"), "a model", "--port", "8001"]
    said = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[:-1] == ["serve", "a model", "--port", "8001", "another,moe-offload"]
    config, _ = resolve({}, {"VLLM_MOE_OFFLOAD": said[-1]})
    assert config is not None and config.cache == "25%"


def test_a_budget_is_chosen_from_a_trace(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    experts = np.argsort(draw.random((60, 2, 8)), axis=-1)[..., :2].astype(np.uint8)
    weights = np.full(experts.shape, 0.5, np.float32)
    trace = Trace(experts=experts, weights=weights, offsets=np.array([0, 30, 60]), num_experts=8)
    write_trace(tmp_path / "mine.npz", trace)
    script = [sys.executable, str(EXAMPLES / "choose_a_budget.py"), str(tmp_path / "mine.npz"), "--budgets", "50%,100%"]
    environment = os.environ | {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    said = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    half, everything = re.findall(r"^ *(\d+)% +([\d.]+)% +([\d.]+)%$", said, re.MULTILINE)
    assert (half[0], everything[0]) == ("50", "100")
    assert float(half[1]) >= float(half[2]) > float(everything[2])


def run_llm_class() -> None:
    example = runpy.run_path(str(EXAMPLES / "llm_class.py"))
    example["main"](example["BUNDLED"].as_posix(), "25%", enforce_eager=True, kv_cache_memory_bytes=16 << 20)
    sys.stdout.flush()


def test_the_llm_class_with_a_quarter_of_the_experts(tmp_path: Path) -> None:
    engine = LiveEngine(tmp_path / "log")
    engine.run(run_llm_class)
    engine.close()
    said = engine.log.read_text()
    assert "'def add(a, b):" in said
    slots, experts, hit = re.search(r"(\d+) slots for (\d+) experts: (\d+)% of \d+ uses hit", said).groups()
    assert int(slots) == int(experts) // 4 and 0 < int(hit) < 100
