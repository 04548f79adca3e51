"""What has been written into a layer's tensors, seen through whatever view vLLM's loaders write."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.integration.coverage import Coverage, WrittenParts, block_of, volume

blocks = st.lists(st.integers(1, 4), min_size=1, max_size=3).flatmap(
    lambda shape: st.tuples(
        st.just(shape),
        st.lists(
            st.tuples(
                *[
                    st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(lambda ab: (ab[0], ab[0] + ab[1]))
                    for n in shape
                ]
            ).map(lambda block, shape=shape: tuple((a, min(b, n)) for (a, b), n in zip(block, shape, strict=True))),
            min_size=1,
            max_size=4,
        ),
    )
)


@settings(deadline=None, max_examples=150)
@given(blocks)
def test_any_block_is_seen_through_narrowed_views_and_their_union_is_exact(drawn: tuple) -> None:
    shape, boxes = drawn
    whole = torch.empty(shape, device="meta")
    mask = np.zeros(shape, dtype=bool)
    for box in boxes:
        view = whole.data
        for dim, (start, stop) in enumerate(box):
            view = view.narrow(dim, start, stop - start)
        assert block_of(view, whole) == box
        mask[tuple(slice(*ends) for ends in box)] = True
    assert volume(set(boxes)) == mask.sum()


@pytest.mark.parametrize("dense", [True, False])
def test_experts_rows_and_transposed_views_are_blocks(dense: bool) -> None:
    whole = torch.empty(4, 6, 8, device="meta") if dense else torch.empty(4, 8, 6, device="meta").transpose(1, 2)
    assert block_of(whole[2], whole) == ((2, 3), (0, 6), (0, 8))
    assert block_of(whole[2].t(), whole) == ((2, 3), (0, 6), (0, 8))
    assert block_of(whole[1, 3], whole) == ((1, 2), (3, 4), (0, 8))
    assert block_of(whole[1, 3, 5], whole) == ((1, 2), (3, 4), (5, 6))


def test_what_is_no_block_counts_for_nothing() -> None:
    whole = torch.empty(4, 6, 8, device="meta")
    assert block_of(whole[:, ::2], whole) is None
    assert block_of(whole[1].view(-1)[3:20], whole) is None
    coverage = Coverage({"w": whole})
    coverage.add("w", None)
    assert not coverage.complete and coverage.lacking("w") == []


def test_every_way_in_which_loaders_write_is_noticed() -> None:
    tensors = {"w13": torch.empty(3, 4, 8, device="meta"), "scale": torch.empty(3, 2, device="meta")}
    with WrittenParts(tensors) as written:
        tensors["w13"].data[1].narrow(0, 2, 2).copy_(torch.ones(2, 8))
        tensors["w13"].data[0] = torch.ones(4, 8)
        tensors["scale"].data[2][1] = torch.tensor(3.0)
        tensors["scale"].data[1] = torch.tensor(3.0)
        tensors["scale"].data[0].add_(1)
        torch.empty(3, 4, 8, device="meta").fill_(0)
    assert written.parts == [
        ("w13", ((1, 2), (2, 4), (0, 8))),
        ("w13", ((0, 1), (0, 4), (0, 8))),
        ("scale", ((2, 3), (1, 2))),
        ("scale", ((1, 2), (0, 2))),
        ("scale", None),
    ]


def test_complete_when_every_element_was_written_however_often_some_were() -> None:
    coverage = Coverage({"w": torch.empty(3, 4, device="meta")})
    for block in [((0, 3), (0, 2)), ((0, 3), (0, 2)), ((0, 1), (0, 4)), ((2, 3), (1, 4))]:
        coverage.add("w", block)
        assert not coverage.complete
    assert coverage.lacking("w") == [1] and coverage.partial("w")
    coverage.add("w", ((1, 2), (2, 4)))
    assert coverage.complete and coverage.lacking("w") == [] and not coverage.partial("w")


def test_padding_is_nothing_that_is_missing() -> None:
    padded = torch.empty(3, 4, 8, device="meta")
    coverage = Coverage({"w": padded})
    coverage.add("w", ((0, 3), (0, 4), (0, 6)))
    assert coverage.lacking("w") == [] and coverage.partial("w")
    padded.weight_loader_numel = math.prod((3, 4, 6))
    known = Coverage({"w": padded})
    known.add("w", ((0, 3), (0, 4), (0, 6)))
    assert known.complete and not known.partial("w")
