"""Kernels that decide on the device which experts are in a window, and load what is missing.

``manage`` and ``stage`` are one program each. Everything they read is read before the first store and kept in
registers: a result never depends on a barrier between threads. All sizes are run-time arguments; only powers of two
are constants, so that one compilation serves all layers of a model.

*tables*: int32 ``[6, width]`` of one layer. By expert: its row in what the layer's kernel is shown or -1, then its heat
and epoch as in ``WindowTables``, then the number of its record or -1 if it is kept elsewhere; then the expert in each
slot or -1; last, by expert, ``WindowTables.mark``.

*misses*: int32 ``[1 + 3 * M]``. Their number, then for each one its record, the row of the target, and the slot of the
window that has it already, or -1.

*ring*: what the last steps did, as ``RING`` int64: the number of the step under way, entries, choices that one has room
for, notes of one, and the addresses of the choices (int32 ``[entries, room]``, in an entry those of real rows, layer
after layer: the id in the lower half, the router's weight as float16 in the upper one) and of the notes
(int64 ``[entries, notes, NOTE]``: the step, choices of real rows, experts used, misses, whether these did not fit,
bytes that ``gather`` has copied, and of speculative loads since the note before: started, useful, wasted).
"""

import triton
import triton.language as tl

from .tables import HALF_LIFE, MOST_HEAT, USE

TABLES = 6
RING = 6
NOTE = 9
COMPONENT = 5
"""Numbers that ``gather`` needs of each component: addresses of row 0 of the target, of record 0 on the host and of
slot 0 of the window; bytes of each of them; bytes per lane: 16, 8 or 1."""

_NOTE = tl.constexpr(NOTE)
_COMPONENT = tl.constexpr(COMPONENT)
_HALF_LIFE = tl.constexpr(HALF_LIFE)
_USE = tl.constexpr(USE)
_MOST_HEAT = tl.constexpr(MOST_HEAT)
_NEVER = tl.constexpr((1 << 63) - 1)
_NO_EXPERT = tl.constexpr(0xFFFF)
_LOWER = tl.constexpr(0xFFFF)

_SIZES = ["n_ids", "top_k", "width", "base", "experts", "slots", "keep_ids", "keeps", "layer"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["ids", "weights"])
def manage(
    ids,
    weights,
    n_ids,
    top_k,
    real_rows,
    tables,
    width,
    base,
    experts,
    slots,
    keep_ids,
    keeps,
    out,
    misses,
    ring,
    layer,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``WindowTables.serve`` on the tables of one layer: rewrite ids to rows and list what has to be loaded.

    If the used experts do not fit, nothing changes, ids of missing ones become -1, and the ring says so.

    Args:
        ids, weights: ``[n_ids]``, rows of ``top_k``; ids are negative where there is none, weights of any float type.
        real_rows: int32 ``[1]``; rows behind them are padding.
        base: row of slot 0.
        keep_ids: 1 where the first table is the layer's expert map: no id is rewritten. keeps: where the ring has ids.
        out: ``[n_ids]``; rows of padding get what row 0 gets.
        P: not less than ``experts``.
    """
    lane = tl.arange(0, P)
    n_real = tl.minimum(tl.load(real_rows) * top_k, n_ids)
    epoch = (tl.load(ring) // _HALF_LIFE).to(tl.int32)
    row = tl.load(tables + lane, mask=lane < experts, other=-1)
    warm = tl.load(tables + width + lane, mask=lane < experts, other=0)
    since = tl.load(tables + 2 * width + lane, mask=lane < experts, other=0)
    record = tl.load(tables + 3 * width + lane, mask=lane < experts, other=-1)
    who = tl.load(tables + 4 * width + lane, mask=lane < slots, other=-1)
    mark = tl.load(tables + 5 * width + lane, mask=lane < experts, other=0)
    used = (_used(ids, n_real, lane, CHUNK) == 1) & (record >= 0)
    cooled = warm >> tl.minimum(epoch - since, 31)
    was_here = row >= 0
    missing = used & (row < 0)
    n_missing = tl.sum(missing.to(tl.int32), axis=0)
    n_loaded = n_missing
    if n_missing > 0:
        row, who, n_loaded = _make_room(missing, n_missing, used, cooled, row, who, record, base, slots, lane, misses)
        tl.store(tables + lane, row, mask=lane < experts)
        tl.store(tables + 4 * width + lane, who, mask=lane < slots)
    tl.store(misses, n_loaded)
    served = tl.where(n_loaded == n_missing, used.to(tl.int32), 0) == 1
    tl.store(tables + width + lane, tl.minimum(cooled + _USE, _MOST_HEAT), mask=served)
    tl.store(tables + 2 * width + lane, tl.zeros_like(lane) + epoch, mask=served)
    _rewrite(ids, n_ids, n_real, top_k, row, base, keep_ids, out, CHUNK)
    _keep(ids, weights, n_real, 0, n_real * keeps, ring, layer, CHUNK)
    outcomes = _settle(tables + 5 * width + lane, mark, was_here, row >= 0, used)
    n_used, lacks = tl.sum(used.to(tl.int32), axis=0), (n_loaded < n_missing).to(tl.int32)
    _note(ring, layer, n_real, n_used, n_loaded, lacks, outcomes)


@triton.jit
def _settle(marks, mark, was_here, is_here, used):
    """What became of speculative loads since the layer's note before, ``_packed``; ``marks`` are brought up to date."""
    useful = (mark > 0) & was_here & used
    wasted = (mark > 0) & ((was_here & is_here) == 0)
    tl.store(marks, tl.where(useful | wasted, 0, tl.minimum(mark, 1)), mask=mark > 0)
    return _packed(mark >= 2, useful, wasted.to(tl.int64) + (mark == 3).to(tl.int64))


@triton.jit
def _packed(started, useful, wasted):
    """Three sums of at most 2^20 each in one number: one reduction instead of three."""
    return tl.sum(started.to(tl.int64) | (useful.to(tl.int64) << 20) | (wasted.to(tl.int64) << 40), axis=0)


@triton.jit
def _used(ids, n_real, lane, CHUNK: tl.constexpr):
    """Which of the numbers ``lane`` are among the first ``n_real`` ids: 0 or 1."""
    used = tl.zeros_like(lane)
    for first in range(0, n_real, CHUNK):
        i = first + tl.arange(0, CHUNK)
        chosen = tl.load(ids + i, mask=i < n_real, other=-1).to(tl.int32)
        used = used | tl.max((chosen[:, None] == lane[None, :]).to(tl.int32), axis=0)
    return used


@triton.jit
def _make_room(missing, n_missing, used, cooled, row, who, record, base, slots, lane, misses):
    """Give slots to the missing experts if all fit, and list them: who is in which row and slot now, and how many."""
    key = _keys(used, cooled, who, slots, lane)
    n_loaded = tl.where(n_missing <= tl.sum((key != _NEVER).to(tl.int32), axis=0), n_missing, 0)
    for i in range(0, n_loaded):
        victim = tl.min(key, axis=0)
        slot = ((victim >> 16) & _NO_EXPERT).to(tl.int32)
        left = (victim & _NO_EXPERT).to(tl.int32)
        expert = tl.min(tl.where(missing, lane, _NO_EXPERT), axis=0)
        key = tl.where(lane == slot, _NEVER, key)
        missing = missing & (lane != expert)
        row = tl.where(lane == left, -1, tl.where(lane == expert, base + slot, row))
        who = tl.where(lane == slot, expert, who)
        tl.store(misses + 1 + 3 * i, tl.sum(tl.where(lane == expert, record, 0), axis=0))
        tl.store(misses + 2 + 3 * i, slot)
        tl.store(misses + 3 + 3 * i, -1)
    return row, who, n_loaded


@triton.jit
def _keys(spared, cooled, who, slots, lane):
    """By slot heat before slot before expert: the smallest is the victim, and names the expert it has."""
    whom = tl.maximum(who, 0)
    kept = (who >= 0) & (tl.gather(spared.to(tl.int32), whom, 0) == 1)
    worth = tl.where(who < 0, 0, tl.gather(cooled, whom, 0) + 1).to(tl.int64)
    key = (worth << 32) | (lane.to(tl.int64) << 16) | (who.to(tl.int64) & _NO_EXPERT)
    return tl.where((lane < slots) & (kept == 0), key, _NEVER)


@triton.jit
def _rewrite(ids, n_ids, n_real, top_k, row, base, keep_ids, out, CHUNK: tl.constexpr):
    for first in range(0, n_ids, CHUNK):
        i = first + tl.arange(0, CHUNK)
        chosen = tl.load(ids + tl.where(i < n_real, i, i % top_k), mask=i < n_ids, other=-1).to(tl.int32)
        rewritten = tl.where(chosen >= 0, tl.gather(row, tl.maximum(chosen, 0), 0), -1)
        rewritten = tl.where(n_real > 0, rewritten, base)
        tl.store(out + i, tl.where(keep_ids == 1, chosen, rewritten), mask=i < n_ids)


@triton.jit
def _keep(ids, weights, n_real, begin, end, ring, layer, CHUNK: tl.constexpr):
    """Write the choices from ``begin`` to ``end`` into the ring, of ``n_real``."""
    entry = tl.load(ring) % tl.load(ring + 1)
    kept = tl.load(ring + 4).to(tl.pointer_type(tl.int32)) + entry * tl.load(ring + 2) + layer * n_real
    for first in range(begin, end, CHUNK):
        i = first + tl.arange(0, CHUNK)
        chosen = tl.load(ids + i, mask=i < end, other=-1).to(tl.int32)
        weight = tl.load(weights + i, mask=i < end, other=0.0).to(tl.float16)
        upper = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(kept + i, upper | (chosen & _LOWER), mask=i < end)


@triton.jit
def _note(ring, layer, n_real, used, misses, overflow, outcomes):
    """Write one layer's note; ``gather`` adds to its bytes. ``outcomes``: of speculative loads, ``_packed``."""
    note = _note_of(ring, layer)
    tl.store(note, tl.load(ring))
    tl.store(note + 1, n_real.to(tl.int64))
    tl.store(note + 2, used.to(tl.int64))
    tl.store(note + 3, misses.to(tl.int64))
    tl.store(note + 4, overflow.to(tl.int64))
    tl.store(note + 5, tl.full((), 0, tl.int64))
    tl.store(note + 6, outcomes & 0xFFFFF)
    tl.store(note + 7, (outcomes >> 20) & 0xFFFFF)
    tl.store(note + 8, outcomes >> 40)


@triton.jit
def _note_of(ring, layer):
    entry = tl.load(ring) % tl.load(ring + 1)
    return tl.load(ring + 5).to(tl.pointer_type(tl.int64)) + (entry * tl.load(ring + 3) + layer) * _NOTE


@triton.jit(do_not_specialize=[*_SIZES, "is_lent"], do_not_specialize_on_alignment=["ids", "weights"])
def stage(
    ids,
    weights,
    n_ids,
    top_k,
    real_rows,
    tables,
    width,
    base,
    experts,
    is_lent,
    misses,
    ring,
    layer,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """List the experts of a step too wide for the window: each goes to the row of its record in the stage.

    Those in the window are taken from there, unless it ``is_lent``: then the stage overwrites it. The other arguments
    are those of ``manage``. Ids stay as they are.
    """
    lane = tl.arange(0, P)
    n_real = tl.minimum(tl.load(real_rows) * top_k, n_ids)
    row = tl.load(tables + lane, mask=lane < experts, other=-1)
    record = tl.load(tables + 3 * width + lane, mask=lane < experts, other=-1)
    used = (_used(ids, n_real, lane, CHUNK) == 1) & (record >= 0)
    count = tl.sum(used.to(tl.int32), axis=0)
    listed = misses + 1 + 3 * (tl.cumsum(used.to(tl.int32), axis=0) - 1)
    slot = tl.where(is_lent == 1, -1, tl.where(row >= 0, row - base, -1))
    tl.store(listed, record, mask=used)
    tl.store(listed + 1, record, mask=used)
    tl.store(listed + 2, slot, mask=used)
    tl.store(misses, count)
    _keep(ids, weights, n_real, 0, n_real, ring, layer, CHUNK)
    _note(ring, layer, n_real, count, count, tl.full((), 0, tl.int32), tl.full((), 0, tl.int64))


@triton.jit(do_not_specialize=["n_ids", "top_k", "layer"], do_not_specialize_on_alignment=["ids", "weights"])
def note(ids, weights, n_ids, top_k, real_rows, ring, layer, CHUNK: tl.constexpr):
    """Write the choices of a layer into the ring where nothing else looks at them. One program per ``CHUNK``."""
    begin = tl.program_id(0) * CHUNK
    n_real = tl.minimum(tl.load(real_rows) * top_k, n_ids)
    _keep(ids, weights, n_real, begin, tl.minimum(begin + CHUNK, n_real), ring, layer, CHUNK)
    if begin == 0:
        nothing = tl.full((), 0, tl.int32)
        _note(ring, layer, n_real, nothing, nothing, nothing, tl.full((), 0, tl.int64))


@triton.jit
def _copy(target, source, nbytes, first, BLOCK: tl.constexpr, WORD: tl.constexpr, WORDS: tl.constexpr):
    """Copy a block of ``nbytes`` from address to address; a lane takes ``WORDS`` words of type ``WORD``."""
    size: tl.constexpr = WORD.primitive_bitwidth // 8
    per_lane: tl.constexpr = size * WORDS
    words = nbytes // per_lane * WORDS
    i = first + tl.arange(0, BLOCK)
    of = tl.multiple_of(source.to(tl.pointer_type(WORD)), per_lane)
    to = tl.multiple_of(target.to(tl.pointer_type(WORD)), per_lane)
    tl.store(to + i, tl.load(of + i, mask=i < words), mask=i < words)
    return tl.minimum(words - first, BLOCK) * size


@triton.jit(do_not_specialize=["n_components", "programs", "part", "parts", "layer"])
def gather(misses, components, n_components, programs, part, parts, ring, layer, BLOCK: tl.constexpr):
    """Copy every miss, all components: from host memory, or from the window where that has it.

    Args:
        components: int64 ``[n_components, COMPONENT]``.
        programs: of this launch; they share the blocks of ``BLOCK`` words.
        part, parts: which part of each record's blocks.
    """
    count = tl.load(misses)
    if count == 0:
        return
    copied = tl.full((), 0, tl.int64)
    for c in range(0, n_components):
        about = components + c * _COMPONENT
        target, host, window = tl.load(about), tl.load(about + 1), tl.load(about + 2)
        nbytes, per_lane = tl.load(about + 3), tl.load(about + 4)
        word = tl.minimum(per_lane, 8)
        of_record = (nbytes // word + BLOCK - 1) // BLOCK
        begin = (of_record * part // parts).to(tl.int32)
        blocks = (of_record * (part + 1) // parts).to(tl.int32) - begin
        for unit in range(tl.program_id(0), count * blocks, programs):
            miss = misses + 1 + 3 * (unit // blocks)
            first = (begin + unit % blocks) * BLOCK
            slot = tl.load(miss + 2).to(tl.int64)
            record = tl.load(miss).to(tl.int64)
            source = tl.where(slot >= 0, window + slot * nbytes, host + record * nbytes)
            to = target + tl.load(miss + 1).to(tl.int64) * nbytes
            if per_lane == 16:
                copied += _copy(to, source, nbytes, first, BLOCK, tl.int64, 2)
            elif per_lane == 8:
                copied += _copy(to, source, nbytes, first, BLOCK, tl.int64, 1)
            else:
                copied += _copy(to, source, nbytes, first, BLOCK, tl.int8, 1)
    tl.atomic_add(_note_of(ring, layer) + 5, copied, sem="relaxed")
