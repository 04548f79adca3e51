"""sizes.py: every spelling that the docs promise, and what pydantic alone would read wrongly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.sizes import parse_size, size_setting, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        (" 512 MiB ", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("4GB", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("4g", 4 * 10**9),
        ("500MB", 500 * 10**6),
        ("96KiB", 96 << 10),
        ("5TiB", 5 << 40),
        ("4096", 4096),
        ("4096B", 4096),
        ("0", 0),
    ],
)
def test_accepted_spellings(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "lots", "-1G", "25%", "25 %", "4GiB more", "25,5GiB", "1 000 000", "4Gi", "1e3", "1_000", "inf", "\u0664GiB"],
)
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size like '4GiB', '500MB' or '4096' \(bytes\)") as refusal:
        parse_size(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "9" * 5000 + "B"])
def test_a_number_of_any_length_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"9… \(\d+ characters\)' is not a size|is not a size"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_setting_holds_what_it_must(nbytes: int) -> None:
    assert nbytes <= parse_size(size_setting(nbytes)) < nbytes + (1 << 20)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (4 << 30, "4.0 GiB"), (0.5, "0 B")]
)
def test_sizes_for_a_person(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text
