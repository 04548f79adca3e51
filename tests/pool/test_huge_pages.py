"""What the kernel's settings say of large pages."""

from pathlib import Path

import pytest

from vllm_moe_offload.pool.huge_pages import private_huge_pages, shared_page_bytes

KIB, MIB = 2**10, 2**20


def settings(folder: Path, enabled: str = "", shared: str = "", **sizes: str) -> Path:
    """A folder as the kernel's, with the words chosen."""

    def write(name: str, words: str, chosen: str) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(f"[{word}]" if word == chosen else word for word in words.split()) + "\n")

    if enabled:
        write("enabled", "always madvise never", enabled)
    if shared:
        write("shmem_enabled", "always within_size advise never deny force", shared)
    for size, chosen in sizes.items():
        write(f"hugepages-{size.strip('_')}kB/shmem_enabled", "always inherit within_size advise never", chosen)
    return folder


@pytest.mark.parametrize(("enabled", "given"), [("always", True), ("madvise", True), ("never", False), ("", False)])
def test_private_memory_gets_huge_pages_unless_that_is_forbidden(tmp_path: Path, enabled: str, given: bool) -> None:
    assert private_huge_pages(settings(tmp_path, enabled=enabled)) == given


@pytest.mark.parametrize(
    ("shared", "sizes", "smallest"),
    [
        ("", {}, 0),
        ("never", {}, 0),
        ("advise", {}, 2 * MIB),
        ("within_size", {}, 2 * MIB),
        ("deny", {"_64": "advise"}, 0),
        ("never", {"_2048": "inherit", "_64": "never"}, 0),
        ("advise", {"_2048": "inherit", "_64": "never"}, 2 * MIB),
        ("never", {"_2048": "inherit", "_64": "advise"}, 64 * KIB),
        ("always", {"_2048": "inherit", "_256": "inherit", "_64": "never"}, 256 * KIB),
        ("never", {"_2048": "never", "_16": "advise"}, 0),
        ("never", {"_1024": "within_size", "_16": "advise"}, MIB),
    ],
)
def test_shared_memory_gets_the_sizes_that_are_allowed(
    tmp_path: Path, shared: str, sizes: dict[str, str], smallest: int
) -> None:
    assert shared_page_bytes(settings(tmp_path, shared=shared, **sizes)) == smallest
