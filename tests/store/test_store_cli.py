"""`vllm-moe-offload store ls|verify|prune`, as typed by a user."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from store_samples import EXPERTS, LAYERS, build
from test_store_processes import expect_line
from typer.testing import CliRunner, Result

from vllm_moe_offload.cli import app
from vllm_moe_offload.store import Store, StoreIdentity, StoreRoot

RECORDS = EXPERTS * len(LAYERS)


@pytest.fixture
def run(root: StoreRoot, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("VLLM_MOE_OFFLOAD_STORE_ROOT", str(root.path))
    return lambda *words, **options: CliRunner().invoke(app, ["store", *words], **options)


def test_ls_shows_model_size_age_and_fingerprint(
    run: Callable[..., Result], root: StoreRoot, identity: StoreIdentity
) -> None:
    build(root, identity)
    result = run("ls")
    assert result.exit_code == 0
    heading, row = result.stdout.splitlines()
    assert heading.split() == ["MODEL", "SIZE", "AGE", "UNUSED", "FINGERPRINT", "STATE"]
    assert re.fullmatch(rf"checkpoint +12\d\.\d KiB +\d+ s +\d+ s +{identity.fingerprint} +complete", row)


def test_ls_names_hub_models_as_their_users_do(run: Callable[..., Result], root: StoreRoot) -> None:
    build(root, StoreIdentity({"a": 1}, "/cache/hub/models--Qwen--Qwen3-30B-A3B/snapshots/ab12"))
    assert "Qwen/Qwen3-30B-A3B  " in run("ls").stdout
    assert "complete, checkpoint gone" in run("ls").stdout


def test_ls_of_nothing(run: Callable[..., Result], root: StoreRoot) -> None:
    result = run("ls")
    assert (result.exit_code, result.stdout) == (0, f"no stores in {root.path}\n")


def test_verify_is_silent_about_sound_records_and_names_damaged_ones(
    run: Callable[..., Result], root: StoreRoot, identity: StoreIdentity
) -> None:
    sound = build(root, replace(identity, facts={"other": 1}))
    store = build(root, identity)
    result = run("verify")
    assert result.exit_code == 0
    assert sorted(result.stdout.splitlines()) == sorted(
        f"{one.path.name}: {RECORDS} of {RECORDS} records are intact" for one in (store, sound)
    )
    with (store.path / "records.bin").open("r+b") as file:
        file.seek(store.offset(1, 2))
        file.write(b"\0\1\2\3\4\5")
    result = run("verify", identity.fingerprint[:8])
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{identity.fingerprint}: damaged: {LAYERS[1]}, expert 2",
        f"{identity.fingerprint}: {RECORDS - 1} of {RECORDS} records are intact",
    ]
    assert run("verify", sound.path.name).exit_code == 0
    assert run("verify").exit_code == 1


def test_verify_reports_a_store_that_does_not_open(
    run: Callable[..., Result], root: StoreRoot, identity: StoreIdentity
) -> None:
    (build(root, identity).path / "records.bin").unlink()
    result = run("verify")
    assert result.exit_code == 1
    assert "records.bin is missing" in result.stdout


def test_verify_of_an_unknown_fingerprint_is_an_error(run: Callable[..., Result]) -> None:
    result = run("verify", "abc")
    assert result.exit_code == 2
    assert "named 'abc'" in result.stderr


def test_prune_removes_leftovers_damage_and_orphans_and_nothing_else(
    run: Callable[..., Result], root: StoreRoot, identity: StoreIdentity, tmp_path: Path
) -> None:
    kept = build(root, identity)
    orphan = build(root, StoreIdentity({"a": 1}, str(tmp_path / "deleted")))
    damaged = build(root, StoreIdentity({"a": 2}, identity.model))
    root.set_aside(damaged, "wrong checksum")
    relative = build(root, StoreIdentity({"a": 4}, "models/mine"))
    leftover = root.path / f"{StoreIdentity({'a': 3}).fingerprint}.building-1-0badcafe"
    leftover.mkdir()
    (leftover / "records.bin").write_bytes(bytes(4096))
    foreign = root.path / "notes"
    foreign.mkdir()

    result = run("prune", input="n\n")
    assert result.exit_code == 1 and orphan.path.exists() and leftover.exists()
    result = run("prune", input="y\n")
    assert result.exit_code == 0 and "remove 3 from" in result.stdout
    assert re.search(r"freed 2\d\d\.\d KiB", result.stdout)
    names = [kept.path.name, relative.path.name]
    assert sorted(info.path.name for info in root.ls()) == sorted(names)
    assert sorted(path.name for path in root.path.iterdir()) == sorted(
        [*names, *(f"{name}.lock" for name in names), "notes"]
    )
    assert run("prune").stdout == f"nothing to prune in {root.path}\n"


def aged(root: StoreRoot, store: Store, days: float) -> None:
    """Make a store as old, and as long unused, as that."""
    then = time.time() - days * 86400
    for path in [*store.path.iterdir(), store.path]:
        os.utime(path, (then, then))


def removed_by(run: Callable[..., Result], root: StoreRoot, *options: str) -> set[str]:
    before = {info.fingerprint for info in root.ls()}
    result = run("prune", "--yes", *options)
    assert result.exit_code == 0, result.output
    return before - {info.fingerprint for info in root.ls()}


def test_prune_offers_what_a_newer_store_of_the_same_settings_has_superseded(
    run: Callable[..., Result], root: StoreRoot, identity: StoreIdentity
) -> None:
    upgraded = StoreIdentity({**identity.facts, "vllm": "0.33.0"}, identity.model)
    other_dtype = StoreIdentity({**identity.facts, "dtype": "float32"}, identity.model)
    for one, days in ((identity, 3), (other_dtype, 2), (upgraded, 1)):
        aged(root, build(root, one), days)
    assert run("ls").stdout.count("complete, superseded") == 1
    assert run("prune").stdout == f"nothing to prune in {root.path}\n"
    assert removed_by(run, root, "--superseded") == {identity.fingerprint}


@pytest.mark.usefixtures("silent")
def test_opening_a_store_makes_it_used_and_no_newer(root: StoreRoot, identity: StoreIdentity) -> None:
    store = build(root, identity)
    aged(root, store, 3)
    (before,) = root.ls()
    opened = root.open_or_build(identity)
    assert isinstance(opened, Store)
    opened.close()
    (after,) = root.ls()
    assert after.built == before.built and after.used > before.used


@pytest.mark.usefixtures("silent")
def test_prune_by_time_unused_and_by_size_takes_the_longest_unused(
    run: Callable[..., Result], root: StoreRoot, tmp_path: Path
) -> None:
    kinds = [StoreIdentity({"kind": number}, str(tmp_path)) for number in range(4)]
    for number, one in enumerate(kinds):
        aged(root, build(root, one), 10 * (4 - number))
    opened = root.open_or_build(kinds[0])
    assert isinstance(opened, Store)
    assert removed_by(run, root, "--unused-for", "25") == {kinds[1].fingerprint}
    size = next(info.size for info in root.ls())
    assert removed_by(run, root, "--keep", f"{2 * size}B") == {kinds[2].fingerprint}
    assert removed_by(run, root, "--keep", f"{2 * size}B") == set()
    assert removed_by(run, root, "--keep", f"{2 * size - 1}B") == {kinds[3].fingerprint}


@pytest.mark.parametrize("size", ["25%", "auto", "much", "9" * 400 + "TiB"])
def test_prune_down_to_what_is_no_size_is_refused(run: Callable[..., Result], size: str) -> None:
    result = run("prune", "--keep", size)
    assert result.exit_code == 2 and "is not a size like '4GiB'" in result.stderr


@pytest.mark.usefixtures("silent")
def test_prune_all_removes_stores_in_use_too(
    run: Callable[..., Result], root: StoreRoot, identity: StoreIdentity
) -> None:
    store = build(root, identity)
    assert run("prune", "--all", "--yes").exit_code == 0
    assert root.ls() == [] and list(root.path.iterdir()) == []
    assert store.verify() == []
    build(root, identity)


def test_prune_spares_a_running_build(
    run: Callable[..., Result], root: StoreRoot, spawn: Callable[..., "subprocess.Popen[str]"]
) -> None:
    builder = spawn(root.path, 1, 10, "hold")
    expect_line(builder, "building")
    assert run("ls").stdout.splitlines()[1].endswith("building")
    assert run("prune", "--all", "--yes").stdout == f"nothing to prune in {root.path}\n"
    assert builder.communicate("go\n")[0].splitlines()[-1].startswith("built")
