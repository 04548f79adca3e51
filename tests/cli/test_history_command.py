"""`history ls|export|import|prune` as a user meets it, with files as users have them."""

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.learning.heads_file import LEARNED_FILES
from vllm_moe_offload.trace.archive import HISTORY_FILE
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace, write_trace

TRACE = Trace(
    experts=np.tile(np.array([[0, 1], [2, 3]], np.uint8), (6, 1, 1)),
    weights=np.full((6, 2, 2), 0.5, np.float16),
    offsets=np.array([0, 4, 6]),
    num_experts=8,
    model="some/model",
    fingerprint="feed01",
    tokens=np.arange(6, dtype=np.int32),
    embeddings=np.eye(2, dtype=np.float16),
)


def run(*arguments):
    return CliRunner().invoke(app, ["history", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path):
    write_trace(tmp_path / "in.npz", TRACE)
    assert run("import", tmp_path / "in.npz", "--history", tmp_path / "kept").output == "feed01: 2 requests, 6 tokens\n"
    return tmp_path / "kept"


def test_the_default_folder_is_where_engines_keep_histories(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_OFFLOAD_STORE_ROOT", str(tmp_path / "stores"))
    assert run("ls").output == f"no histories in {tmp_path / 'history'}, which does not exist\n"
    write_trace(tmp_path / "in.npz", TRACE)
    assert run("import", tmp_path / "in.npz").exit_code == 0
    assert (tmp_path / "history" / "feed01" / HISTORY_FILE).is_file()


def test_what_cannot_be_used_is_listed_with_the_reason(folder):
    (folder / "dead02").mkdir()
    (folder / "dead02" / HISTORY_FILE).write_bytes((folder / "feed01" / HISTORY_FILE).read_bytes()[:100])
    (folder / "beef03").mkdir()
    (folder / "beef03" / HISTORY_FILE).write_bytes((folder / "feed01" / HISTORY_FILE).read_bytes())
    aside = folder / "feed01" / f"{HISTORY_FILE}.unusable-7-0"
    aside.write_bytes(b"old")
    listed = run("ls", "--history", folder).output
    assert f"set aside as unusable: {aside}" in listed
    assert "dead02/history.npz: not a readable npz" in listed
    assert "belongs to model 'feed01', not to 'beef03'" in listed
    assert "some/model" in listed


def test_removing_a_history_removes_what_was_learned_from_it(folder):
    for name in LEARNED_FILES:
        (folder / "feed01" / name).write_bytes(b"learned")
    assert run("prune", "fee", "--keep", 0, "--history", folder).output == "feed01: removed\n"
    assert list(folder.iterdir()) == []


def test_a_damaged_history_can_be_removed_but_not_shortened(folder):
    (folder / "feed01" / HISTORY_FILE).write_bytes(b"PK nothing")
    for arguments in (("prune", "feed01", "--keep", "1MiB"), ("export", "feed01", folder / "out.npz")):
        failed = run(*arguments, "--history", folder)
        assert failed.exit_code == 2 and "not a readable npz" in failed.output
    assert run("prune", "feed01", "--keep", 0, "--history", folder).exit_code == 0


def test_the_whole_fingerprint_names_one_history_though_another_begins_like_it(folder, tmp_path):
    write_trace(tmp_path / "longer.npz", replace(TRACE, fingerprint="feed0123"))
    assert run("import", tmp_path / "longer.npz", "--history", folder).exit_code == 0
    assert run("export", "feed01", tmp_path / "out.npz", "--history", folder).exit_code == 0
    assert read_trace(tmp_path / "out.npz").fingerprint == "feed01"
    assert "names 2 histories" in run("export", "feed", tmp_path / "out.npz", "--history", folder).output


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({}, ("--fingerprint", "beef03"), "is of model 'feed01', not of 'beef03'"),
        ({"fingerprint": ""}, (), "names no model"),
        ({"fingerprint": ""}, ("--fingerprint", "../feed01"), "'../feed01' is none"),
        ({"num_experts": 9}, (), "holds 2 layers of 9 experts, top-2"),
        ({"tokens": None}, (), "has token numbers; they cannot be kept together"),
        ({"embeddings": None}, (), "has embeddings; they cannot be kept together"),
        ({"embeddings": np.eye(2, 5, dtype=np.float16)}, (), "embeddings have 5 numbers"),
    ],
)
def test_a_file_that_does_not_belong_is_refused_and_nothing_changes(folder, tmp_path, change, arguments, words):
    before = (folder / "feed01" / HISTORY_FILE).read_bytes()
    write_trace(tmp_path / "other.npz", replace(TRACE, **change))
    failed = run("import", tmp_path / "other.npz", *arguments, "--history", folder)
    assert failed.exit_code == 2 and words in failed.output
    assert (folder / "feed01" / HISTORY_FILE).read_bytes() == before


def test_paths_that_cannot_be_written_or_are_no_folder_are_said(folder, tmp_path):
    nowhere = run("export", "feed01", tmp_path / "absent" / "out.npz", "--history", folder)
    assert nowhere.exit_code == 2 and "cannot be written (No such file or directory)" in nowhere.output
    for command in (("ls",), ("import", tmp_path / "in.npz")):
        failed = run(*command, "--history", tmp_path / "in.npz")
        assert failed.exit_code == 2 and "is a file; name the folder" in failed.output


def test_a_trace_without_tokens_is_refused(tmp_path):
    write_trace(tmp_path / "none.npz", TRACE.select([]))
    failed = run("import", tmp_path / "none.npz", "--history", tmp_path / "kept")
    assert failed.exit_code == 2 and "holds no tokens" in failed.output
    assert not (tmp_path / "kept").exists()
