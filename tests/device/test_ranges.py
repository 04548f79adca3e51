"""Where the device sees ranges of the host's memory, compared with a table of bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.device.ranges import AddressRanges

SPACE = 24


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SPACE - 1), st.integers(1, 6)), max_size=8), st.data())
def test_an_address_is_that_of_the_range_all_bytes_lie_in(wanted: list[tuple[int, int]], data: st.DataObject) -> None:
    ranges, owner, added = AddressRanges(), [-1] * (SPACE + 8), {}
    for number, (start, nbytes) in enumerate(wanted):
        if all(at == -1 for at in owner[start : start + nbytes]):
            ranges.add(start, nbytes, 1000 * number)
            owner[start : start + nbytes] = [number] * nbytes
            added[number] = (start, nbytes)
        else:
            with pytest.raises(AssertionError, match="disjoint"):
                ranges.add(start, nbytes, 0)
    for number in data.draw(st.lists(st.sampled_from(sorted(added)), unique=True)) if added else []:
        start, nbytes = added[number]
        with pytest.raises(AssertionError, match="whole range"):
            ranges.remove(start, nbytes + 1)
        ranges.remove(start, nbytes)
        owner[start : start + nbytes] = [-1] * nbytes
    for start in range(SPACE):
        for nbytes in (1, 3):
            number, *others = set(owner[start : start + nbytes])
            inside = not others and number != -1
            expected = 1000 * number + start - added[number][0] if inside else None
            assert ranges.address(start, nbytes) == expected
