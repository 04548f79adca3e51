"""Several users, one folder of stores: what anybody could have written is not believed, locks exclude across users.

Run as root, which can act as anybody; otherwise skipped.
"""

import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_samples import build
from test_store_processes import expect_line

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import Store, StoreIdentity, StoreRoot

Spawn = Callable[..., "subprocess.Popen[str]"]
OWNER, OTHER, THIRD = 54321, 54322, 54323
GROUP = 54400

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")


@contextmanager
def acting_as(uid: int, group: int | None = None) -> Iterator[None]:
    groups = os.getgroups()
    os.setgroups([] if group is None else [group])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of OWNER's that every user can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        (shared := Path(path) / "stores").mkdir()
        os.chown(shared, OWNER, GROUP)
        yield shared


@pytest.fixture
def public(folder: Path) -> StoreRoot:
    """Everyone can write to it, as to /tmp."""
    folder.chmod(0o1777)
    return StoreRoot(folder)


@pytest.fixture
def team(folder: Path) -> StoreRoot:
    """Members of GROUP can write to it."""
    folder.chmod(0o2775)
    return StoreRoot(folder)


IDENTITY = StoreIdentity({"a": 1}, "/models/mine")


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("reader", [OWNER, THIRD, 0])
def test_a_store_that_anybody_could_have_put_there_is_not_believed(public: StoreRoot, reader: int) -> None:
    with acting_as(OTHER):
        build(public, IDENTITY).close()
    with acting_as(reader), pytest.raises(StoreError) as refused:
        public.open_or_build(IDENTITY)
    assert f"belongs to uid {OTHER}, and everyone can write to {public.path}, so it is not trusted" in str(
        refused.value
    )
    assert "VLLM_MOE_OFFLOAD_STORE_ROOT" in str(refused.value)
    with acting_as(reader):
        (info,) = public.ls()
    assert info.state == "unreadable" and "not trusted" in info.detail


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("builder", [OWNER, 0, THIRD])
def test_stores_of_the_folders_owner_of_the_superuser_and_of_oneself_are(public: StoreRoot, builder: int) -> None:
    with acting_as(builder):
        build(public, IDENTITY).close()
    with acting_as(THIRD):
        store = public.open_or_build(IDENTITY)
        assert isinstance(store, Store) and store.verify() == []
        store.close()


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", ["records.bin", "manifest.json"])
def test_a_trusted_users_file_that_everyone_can_change_is_not_believed(public: StoreRoot, name: str) -> None:
    with acting_as(OWNER):
        path = build(public, IDENTITY).path
    (path / name).chmod(0o666)
    with acting_as(THIRD), pytest.raises(StoreError, match="can be changed by everyone"):
        public.open_or_build(IDENTITY)


@pytest.mark.usefixtures("silent")
def test_where_only_a_group_can_write_its_members_trust_each_other(team: StoreRoot) -> None:
    with acting_as(OTHER, GROUP):
        build(team, IDENTITY).close()
    with acting_as(THIRD, GROUP):
        store = team.open_or_build(IDENTITY)
        assert isinstance(store, Store)
        store.close()


def test_another_users_build_is_waited_for_and_then_used(team: StoreRoot, spawn: Spawn) -> None:
    first = spawn(team.path, 2, 5000, "hold", env={**os.environ, "ACT_AS": f"{OTHER}:{GROUP}"})
    expect_line(first, "building")
    second = spawn(team.path, 2, 5000, env={**os.environ, "ACT_AS": f"{THIRD}:{GROUP}"})
    assert f"is being built by process {first.pid} on" in expect_line(second, "say")
    built, _ = first.communicate("go\n")
    opened, _ = second.communicate()
    assert opened.splitlines()[-1].split() == ["opened", built.split()[-1]]


def test_what_another_users_killed_build_left_is_in_nobodys_way(team: StoreRoot, spawn: Spawn) -> None:
    killed = spawn(team.path, 2, 5000, "hold", env={**os.environ, "ACT_AS": f"{OTHER}:{GROUP}"})
    expect_line(killed, "building")
    killed.kill()
    killed.wait()
    again = spawn(team.path, 2, 5000, env={**os.environ, "ACT_AS": f"{THIRD}:{GROUP}"})
    output, _ = again.communicate()
    assert output.splitlines()[-1].startswith("built")


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_a_lock_that_anybody_could_have_put_there_is_named_instead_of_waited_for(public: StoreRoot, mode: int) -> None:
    lock = public.path / f"{IDENTITY.fingerprint}.lock"
    lock.touch()
    os.chown(lock, OTHER, OTHER)
    lock.chmod(mode)
    said = "not trusted" if mode == 0o666 else "permission denied"
    with acting_as(THIRD), pytest.raises(StoreError, match=said):
        public.open_or_build(IDENTITY)


@pytest.mark.usefixtures("silent")
def test_a_lock_that_is_a_link_does_not_lead_to_somebodys_file(public: StoreRoot, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("words")
    (public.path / f"{IDENTITY.fingerprint}.lock").symlink_to(precious)
    with pytest.raises(StoreError, match="cannot build a store"):
        public.open_or_build(IDENTITY)
    assert precious.read_text() == "words"


def test_ls_and_prune_of_other_users_stores_say_what_they_cannot(folder: Path) -> None:
    root = StoreRoot(folder)
    with acting_as(OWNER):
        private = build(root, StoreIdentity({"a": 2}, f"{folder}/private/model")).path
        build(root, IDENTITY).close()
    (folder / "private").mkdir(mode=0o700)
    private.chmod(0o700)
    with acting_as(OTHER):
        infos = {info.fingerprint: info for info in root.ls()}
        freed, problems = root.prune(root.prunable(everything=True))
        assert freed == 0
    assert infos[private.name].state == "unreadable" and "Permission denied" in infos[private.name].detail
    assert infos[IDENTITY.fingerprint].state == "complete"
    assert len(problems) == 2 and all("permission denied" in problem for problem in problems)
    private.chmod(stat.S_IRWXU | stat.S_IROTH | stat.S_IXOTH)
    with acting_as(OTHER):
        assert not next(info for info in root.ls() if info.path == private).orphaned


def test_looking_at_a_running_build_takes_no_right_to_write(folder: Path, spawn: Spawn) -> None:
    builder = spawn(folder, 1, 10, "hold", env={**os.environ, "ACT_AS": f"{OWNER}:{OWNER}"})
    expect_line(builder, "building")
    with acting_as(OTHER):
        assert [info.state for info in StoreRoot(folder).ls()] == ["building"]
    builder.communicate("go\n")
