import numpy as np
from test_trace_file import make_trace, same
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace_file import read_trace, write_trace

SHAPE = (4, 8, 2)


def filled(seed=0):
    store = HistoryStore(SHAPE)
    store.extend(make_trace((3, 2, 5), seed=seed).requests())
    return store


def test_a_history_is_there_after_a_restart(tmp_path):
    archive, store = HistoryArchive(tmp_path), filled()
    archive.save("aa", store)
    loaded, trouble = archive.load("aa", SHAPE)
    assert trouble is None
    assert np.array_equal(loaded.to_trace().experts, store.to_trace().experts)
    assert [entry.fingerprint for entry in archive.entries()] == ["aa"]


def test_without_a_file_the_history_is_empty(tmp_path):
    store, trouble = HistoryArchive(tmp_path).load("aa", SHAPE)
    assert store.num_tokens == 0 and trouble is None


def test_damaged_and_foreign_files_are_set_aside_by_name(tmp_path):
    archive = HistoryArchive(tmp_path)
    path = archive.save("aa", filled())
    foreign = path.read_bytes()
    for content, shape, words in (
        (foreign[:-200], SHAPE, "not a readable npz"),
        (foreign, (5, 8, 2), "shape"),
        (archive.save("bb", filled()).read_bytes(), SHAPE, "belongs to model 'bb'"),
    ):
        path.write_bytes(content)
        store, trouble = archive.load("aa", shape)
        assert store.num_tokens == 0
        assert words in trouble and str(path) in trouble and "set aside as" in trouble
        assert not path.exists()
        assert archive.load("aa", shape)[1] is None
    assert len(list(path.parent.glob("*.unusable-*"))) == 3


def test_a_killed_writer_leaves_the_old_history(tmp_path):
    archive, store = HistoryArchive(tmp_path), filled()
    path = archive.save("aa", store)
    path.with_name(f"{path.name}.123.tmp").write_bytes(b"half")
    loaded, trouble = archive.load("aa", SHAPE)
    assert trouble is None and loaded.num_tokens == store.num_tokens


def run(*arguments):
    return CliRunner().invoke(app, ["history", *map(str, arguments)])


def test_the_commands_move_histories_in_and_out(tmp_path):
    folder, trace = tmp_path / "histories", make_trace((3, 2, 5))
    write_trace(tmp_path / "in.npz", trace)
    assert run("import", tmp_path / "in.npz", "--history", folder).exit_code == 0
    listed = run("ls", "--history", folder)
    assert trace.fingerprint[:8] in listed.output
    assert run("export", "ff", tmp_path / "out.npz", "--history", folder).exit_code == 0
    exported = read_trace(tmp_path / "out.npz")
    assert np.array_equal(exported.experts, trace.experts) and exported.fingerprint == trace.fingerprint
    assert "6 requests" in run("import", tmp_path / "in.npz", "--history", folder).output
    assert run("prune", "ff", "--keep", 0, "--history", folder).exit_code == 0
    assert "no histories" in run("ls", "--history", folder).output


def test_the_commands_say_what_is_wrong(tmp_path):
    missing = run("export", "zz", tmp_path / "out.npz", "--history", tmp_path)
    assert missing.exit_code == 2 and "'zz' names 0 histories" in missing.output
    np.savez(
        tmp_path / "anonymous.npz",
        **{name: getattr(make_trace(), name) for name in ("experts", "weights", "offsets", "num_experts")},
    )
    anonymous = run("import", tmp_path / "anonymous.npz", "--history", tmp_path)
    assert anonymous.exit_code == 2 and "--fingerprint" in anonymous.output


def test_same_compares_all_fields():
    assert same(make_trace(), make_trace()) and not same(make_trace(), make_trace(seed=1))
