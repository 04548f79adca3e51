"""Who may put a store where engines look for it. Must never trust what just anybody could have written."""

import os
import pwd
import stat
from pathlib import Path

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store.files import ROOT_SETTING
from vllm_moe_offload.users import is_known

SUPERUSER = 0


def require_trusted(path: Path, status: os.stat_result, root: Path) -> None:
    """Refuse a file of `root` that a user might have put there who is not trusted.

    Where not everyone can write to `root`, whoever can is trusted: its permissions say so. Where everyone can, only
    this user, the owner of `root` and the superuser are, and only files that nobody else can change.

    Args:
        path: as users know it, for the message.
        status: of the open file itself, so that it cannot be exchanged afterwards.

    Raises:
        StoreError: it is not trusted.
    """
    folder = root.stat()
    if not folder.st_mode & stat.S_IWOTH:
        return
    if status.st_uid not in (os.geteuid(), SUPERUSER, folder.st_uid) or not is_known(status.st_uid, "uid"):
        problem = f"belongs to {_user(status.st_uid)}"
    elif status.st_mode & stat.S_IWOTH and not stat.S_ISDIR(status.st_mode):
        problem = "can be changed by everyone"
    else:
        return
    raise StoreError(
        f"{path} {problem}, and everyone can write to {root}, so it is not trusted; set {ROOT_SETTING} to a folder "
        "that only trusted users can write to (a group's: mode 2775), or have it removed"
    )


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
