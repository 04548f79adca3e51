"""``--plugin`` and ``--moe-offload-*`` through the parser of ``vllm serve``."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_offload.config import OffloadConfig, resolve
from vllm_moe_offload.plan.planning import Question, make_plan
from vllm_moe_offload.replay.hardware import HardwareProfile

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"

EngineArguments = Callable[..., Any]


def settings(arguments: Any) -> OffloadConfig | None:
    return resolve(arguments.additional_config, os.environ)[0]


def complaint(capsys: pytest.CaptureFixture[str], parse: Callable[..., Any], *words: str) -> str:
    """The last line of what a command line that is refused leaves on stderr."""
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_help_has_a_group_with_one_flag_per_setting(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help=all"])
    group = capsys.readouterr().out.partition("\nMoE offloading:\n")[2]
    assert end.value.code == 0
    assert "Serve MoE models larger than fast memory" in group
    settings = (
        f"--moe-offload-{name.replace('_', '-')}" + ("" if field.annotation is bool else f" {name.upper()}")
        for name, field in OffloadConfig.model_fields.items()
    )
    for flag in ("--plugin NAME", *settings):
        assert f"  {flag} " in group or f"  {flag}\n" in group
    assert "like '25%'" in group


def test_no_flag_means_off_and_changes_nothing(engine_args: EngineArguments) -> None:
    assert engine_args().additional_config == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--plugin", "moe-offload"], OffloadConfig()),
        (["--plugin=moe-offload", "--moe-offload-cache", "25%"], OffloadConfig(cache="25%")),
        (["--moe-offload-cache=4GiB"], OffloadConfig(cache="4GiB")),
        (["--moe_offload_policy", "lru"], OffloadConfig(policy="lru")),
        (["--moe-offload-store", "/a"], OffloadConfig(store=Path("/a"))),
        (["--moe-offload-page"], OffloadConfig(page=True)),
        (["--additional-config.moe_offload.page", "true"], OffloadConfig(page=True)),
        (["--additional-config.moe_offload.cache", "25%"], OffloadConfig(cache="25%")),
        (["--additional-config", '{"moe_offload": {"cache": "25%"}}'], OffloadConfig(cache="25%")),
        (["--additional-config", '{"moe_offload": true}'], OffloadConfig()),
        (
            ["--additional-config.moe_offload.policy", "lru", "--moe-offload-cache", "25%"],
            OffloadConfig(cache="25%", policy="lru"),
        ),
    ],
)
def test_every_spelling_arrives(engine_args: EngineArguments, words: list[str], expected: OffloadConfig) -> None:
    assert settings(engine_args(*words)) == expected


def test_flags_may_stand_in_a_configuration_file(engine_args: EngineArguments, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("moe-offload-cache: 25%\nmoe-offload-policy: lru\n")
    assert settings(engine_args("--config", str(file))) == OffloadConfig(cache="25%", policy="lru")


def test_plugin_may_be_repeated(engine_args: EngineArguments) -> None:
    arguments = engine_args("--plugin", "lora_filesystem_resolver", "--plugin", "moe-offload")
    assert settings(arguments) == OffloadConfig()
    assert settings(engine_args("--plugin", "lora_filesystem_resolver")) is None


def test_a_flag_wins_over_additional_config_and_says_so(
    engine_args: EngineArguments, warnings_of_vllm: pytest.LogCaptureFixture
) -> None:
    arguments = engine_args("--moe-offload-cache", "50%", "--additional-config.moe_offload.cache", "25%")
    assert settings(arguments) == OffloadConfig(cache="50%")
    assert "cache is '50%' in the --moe-offload flags and '25%' in --additional-config" in warnings_of_vllm.text


def test_other_additional_configuration_is_left_alone(engine_args: EngineArguments) -> None:
    arguments = engine_args("--additional-config.other.key", "1", "--moe-offload-cache", "25%")
    assert arguments.additional_config["other"] == {"key": 1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--moe-offload-cache", "nonsense"], "argument --moe-offload-cache: 'nonsense' is not a share like '25%'"),
        (["--moe-offload-cache", "0%"], "argument --moe-offload-cache: '0%' must be above 0%"),
        (["--moe-offload-policy", "best"], "argument --moe-offload-policy: choose 'lfu', "),
        (["--plugin", "nope"], "argument --plugin: no vLLM plugin 'nope' is installed; installed: "),
        (["--additional-config.moe_offload.cahce", "25%"], "unknown key 'cahce'; did you mean 'cache'?"),
        (["--additional-config.moe_offload.cache", "x"], "additional_config['moe_offload']: cache = 'x': 'x' is not"),
        (["--additional-config.moe_offload", "25%"], "is not a dict of settings; write for example"),
    ],
)
def test_a_bad_value_ends_with_one_line_and_2(
    engine_args: EngineArguments, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in complaint(capsys, engine_args, *words)


def test_an_unknown_plugin_is_refused_naming_those_installed(
    engine_args: EngineArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "moe-offload" in complaint(capsys, engine_args, "--plugin", "nope").partition("installed: ")[2].split(", ")


def test_a_bad_environment_variable_ends_with_one_line_and_2(
    engine_args: EngineArguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MOE_OFFLOAD", "25%")
    assert "error: ConfigError: VLLM_MOE_OFFLOAD='25%' is not a JSON object" in complaint(capsys, engine_args)


def test_what_a_server_cannot_offload_ends_with_one_line_and_2(
    engine_args: EngineArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = engine_args("--moe-offload-cache", "25%", "--enable-lora")
    said = complaint(capsys, arguments.create_engine_config)
    assert said.startswith("error: UnsupportedError: moe-offload does not work with LoRA (--enable-lora)")


@pytest.mark.parametrize("setting", ["predictor", "policy"])
def test_a_class_that_is_not_there_ends_with_one_line_and_2_before_a_worker_starts(
    engine_args: EngineArguments, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    said = complaint(capsys, engine_args(f"--moe-offload-{setting}", "no.such:Class").create_engine_config)
    assert said.startswith(f"error: ConfigError: {setting} = 'no.such:Class' cannot be imported (ModuleNotFoundError")


def test_a_vllm_with_a_plugin_flag_of_its_own_is_asked(
    monkeypatch: pytest.MonkeyPatch, engine_args: EngineArguments
) -> None:
    """``requested_plugins`` is what patches/ adds to vLLM."""
    monkeypatch.setattr("vllm.plugins.requested_plugins", lambda: ["moe-offload"], raising=False)
    config = engine_args().create_engine_config()
    assert resolve(config.additional_config, {})[0] == OffloadConfig()


def test_the_server_itself_shows_no_traceback(tiny_moe: Path) -> None:
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_moe)]
    environment = os.environ | {"VLLM_MOE_OFFLOAD": '{"cache": "lots"}'}
    result = subprocess.run(
        [sys.executable, *server],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: ConfigError: VLLM_MOE_OFFLOAD: cache = 'lots': 'lots' is not a share like '25%'" in result.stderr


@pytest.mark.parametrize(
    ("hardware", "mebibytes"), [("rtx4090-pcie4", 700), ("rtx4090-nvme4", 700), ("cpu.json", 1460)]
)
def test_the_command_that_plan_prints_is_understood(
    engine_args: EngineArguments, tmp_path: Path, hardware: str, mebibytes: int
) -> None:
    if hardware.endswith(".json"):
        hardware = str(tmp_path / hardware)
        Path(hardware).write_text(json.dumps(asdict(HardwareProfile("a CPU", 1e9, 1e-4, 1e10, 1e11, 1e-3))))
    made = make_plan(Question(str(TINY_MOE), mebibytes << 20, 8 << 20, 1, 512, hardware, shares=(0.5,)))
    assert made.chosen is not None and made.tiers.slots < 512
    program, serve, model, *words = shlex.split(made.command)
    assert (program, serve, model) == ("vllm", "serve", str(TINY_MOE))
    given = engine_args(*words)
    assert (given.max_model_len, given.max_num_seqs) == (512, 1)
    found = settings(given)
    assert found is not None
    assert found.budget.given(made.model.expert_bytes) == made.points[made.chosen].nbytes >> 20 << 20
