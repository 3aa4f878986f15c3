"""Kernels of rows, checksums, journals and commits against an oracle in plain Python, compiled and as Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from kernel_oracle import GOLDEN, M64, digest, mix, read_only, words

from leanreplay.kernels import before_images, checksums, commit, memory, rows

SIZES = (1, 3, 7, 8, 9, 40, 785)
FIELDS = len(SIZES)


def checksum(data: bytes, row: int, position: int, group: int, field: int) -> int:
    tag = mix(mix((row * GOLDEN & M64) ^ group & M64) + position & M64)
    return mix((digest(data) + field & M64) ^ tag)


def share(value: int) -> int:
    return mix(value ^ GOLDEN)


class Image:
    """A file image with rows of random bytes, every second of them free if `holes`, right checksums, and room for a journal."""

    def __init__(self, capacity: int, seed: int, holes: bool = False, live: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.capacity = capacity
        self.widths = [*SIZES, 8, 8, 8 * FIELDS]
        offsets, at = [], 64
        for width in self.widths:
            offsets.append(at)
            at += -(-width * capacity // 64) * 64
        self.record = sum(-(-w // 8) * 8 for w in self.widths)
        self.list_at = at
        self.record_at = at + 8 * capacity
        self.mem = rng.integers(0, 256, self.record_at + capacity * self.record + 3, np.uint8)
        self.offsets = offsets
        self.cols = np.array(list(zip(offsets, self.widths, strict=True)), np.uint64)
        stop = capacity if live is None else live
        for r in range(capacity):
            free = r >= stop or (holes and r % 2 == 1)
            position = -1 if free else int(rng.integers(0, 2**40))
            self.write(r, [self.field(r, f) for f in range(FIELDS)], position, int(rng.integers(-5, 5)))

    def entry(self, r: int, column: int) -> bytes:
        at = self.offsets[column] + r * self.widths[column]
        return self.mem[at : at + self.widths[column]].tobytes()

    field = entry

    def put(self, r: int, column: int, data: bytes) -> None:
        at = self.offsets[column] + r * self.widths[column]
        self.mem[at : at + self.widths[column]] = np.frombuffer(data, np.uint8)

    def number(self, r: int, column: int) -> int:
        return int.from_bytes(self.entry(r, column), "little", signed=True)

    def position(self, r: int) -> int:
        return self.number(r, FIELDS)

    def group(self, r: int) -> int:
        return self.number(r, FIELDS + 1)

    def stored(self, r: int, f: int) -> int:
        return int.from_bytes(self.entry(r, FIELDS + 2)[8 * f : 8 * f + 8], "little")

    def write(self, r: int, data: list[bytes], position: int, group: int) -> None:
        for f, entry in enumerate(data):
            self.put(r, f, entry)
        self.put(r, FIELDS, position.to_bytes(8, "little", signed=True))
        self.put(r, FIELDS + 1, group.to_bytes(8, "little", signed=True))
        sums = [checksum(data[f], r, position, group, f) for f in range(FIELDS)]
        self.put(r, FIELDS + 2, b"".join(s.to_bytes(8, "little") for s in sums))

    def live(self) -> list[int]:
        return [r for r in range(self.capacity) if self.position(r) >= 0]

    def digests(self, buckets: int) -> list[int]:
        found = [0] * buckets
        for r in self.live():
            for f in range(FIELDS):
                found[r % buckets] = found[r % buckets] + share(self.stored(r, f)) & M64
        return found

    def columns(self) -> bytes:
        """All columns, without the journal."""
        return self.mem[: self.list_at].tobytes()


def journal(image: Image, order: list[int], live: int) -> int:
    """The hash of a journal with these rows: record by record, its columns padded with zeros, then the list."""
    total = 0
    for r in order[:live]:
        entries = [image.entry(r, column) for column in range(FIELDS + 3)]
        total = mix(total + digest(b"".join(e + bytes(-len(e) % 8) for e in entries)) & M64)
    return mix(total + digest(b"".join(r.to_bytes(8, "little") for r in order)) & M64)


# -- blocks and hashes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 15, 16, 17, 40, 64, 785])
def test_hashes(run: None, n: int) -> None:
    """Copy and hash, at any offset, are the oracle's; nothing beyond the copied bytes is touched."""
    rng = np.random.default_rng(n)
    src, before = rng.integers(0, 256, n + 40, np.uint8), rng.integers(0, 256, n + 40, np.uint8)
    for s, d in ((0, 0), (3, 5), (8, 16), (1, 8)):
        data = src[s : s + n].tobytes()
        assert int(checksums.hash_bytes(read_only(src), np.uint64(s), np.uint64(n))) == digest(data)
        dst = before.copy()
        assert int(checksums.copy_bytes(read_only(src), np.uint64(s), dst, np.uint64(d), np.uint64(n))) == digest(data)
        assert dst.tobytes() == before[:d].tobytes() + data + before[d + n :].tobytes()
    if n % 8 == 0:
        source, data = src[: (n + 40) // 8 * 8].view(np.uint64), src[8 : 8 + n].tobytes()
        assert int(checksums.hash_words(read_only(source), np.uint64(8), np.uint64(n))) == digest(data)


def test_hash_notices_every_change_of_a_byte(run: None) -> None:
    """Every value of every byte of an odd number of them, and every swap of neighbours."""
    src = np.random.default_rng(0).integers(0, 256, 19, np.uint8)
    reference = int(checksums.hash_bytes(src, np.uint64(0), np.uint64(19)))
    step = 1 if hasattr(rows.verify_rows, "py_func") and hasattr(checksums.hash_bytes, "py_func") else 37
    for i in range(19):
        for change in range(1, 256, step):
            other = src.copy()
            other[i] ^= change
            assert int(checksums.hash_bytes(other, np.uint64(0), np.uint64(19))) != reference
        other = src.copy()
        other[i], other[i - 1] = src[i - 1], src[i]
        assert src[i] == src[i - 1] or int(checksums.hash_bytes(other, np.uint64(0), np.uint64(19))) != reference


def test_words_of_checksums(run: None) -> None:
    """What a row is, its checksum, and what that adds to a digest; each is the oracle's."""
    rng = random.Random(1)
    for _ in range(200):
        a, b, c = (rng.choice([0, 1, M64, 2**63, rng.getrandbits(64)]) for _ in range(3))
        assert int(checksums.mix(np.uint64(a))) == mix(a)
        y = a + b & M64
        assert int(checksums.hash_word(np.uint64(a), np.uint64(b))) == y + (y & 0xFFFFFFFF) * (y >> 32) & M64
        identity = mix(mix((a * GOLDEN & M64) ^ c) + b & M64)
        assert int(checksums.row_identity(np.uint64(a), np.uint64(b), np.uint64(c))) == identity
        assert int(checksums.checksum_of(np.uint64(a), np.uint64(identity), 3)) == mix((a + 3 & M64) ^ identity)
        assert int(checksums.digest_of(np.uint64(a))) == mix(a ^ GOLDEN)


def test_columns(run: None) -> None:
    """Where positions, groups and checksums begin, in words; asking for cache lines changes nothing."""
    image = Image(3, 0)
    at = image.offsets[FIELDS:]
    assert [int(v) for v in memory.index_columns(image.cols)] == [FIELDS, at[0] // 8, at[1] // 8, at[2] // 8]
    before = image.mem.copy()
    memory.prefetch_bytes(image.mem, np.uint64(5), np.uint64(700))
    assert (image.mem == before).all()


@pytest.mark.parametrize(("count", "state"), [(1, 0), (2, 0), (7, 0), (7, 3), (40, 4)])
def test_blocks(run: None, count: int, state: int) -> None:
    """A sealed block reads back, and any changed byte makes it invalid."""
    rng = np.random.default_rng(count)
    mem = rng.integers(0, 256, 1003, np.uint8)
    before = mem.copy()
    block = rng.integers(0, 2**63, count, np.uint64)
    wanted = block.tolist()
    if state:
        wanted[state] = digest(np.array(wanted[state + 1 : -1], np.uint64).tobytes())
    wanted[-1] = digest(np.array(wanted[:-1], np.uint64).tobytes())
    checksums.seal_block(mem, 64, block, state)
    assert mem[64 : 64 + 8 * count].view(np.uint64).tolist() == wanted == block.tolist()
    assert mem[:64].tobytes() == before[:64].tobytes()
    assert mem[64 + 8 * count :].tobytes() == before[64 + 8 * count :].tobytes()
    found = np.zeros(count, np.uint64)
    assert checksums.read_block(read_only(mem), 64, found)
    assert found.tolist() == wanted
    for i in range(8 * count):
        mem[64 + i] ^= 1 + i % 255
        assert not checksums.read_block(read_only(mem), 64, found), i
        mem[64 + i] ^= 1 + i % 255


# -- rows --------------------------------------------------------------------------------------------------------------


ALL = np.zeros(0, np.uint8)  # are verified


def reader(image: Image, chosen: list[int], first: int, last: int, verified: Any = ALL) -> tuple[int, list[list[bytes]], Any, list[int]]:
    """Call read_rows: number of bad rows, fields of each row, index, flags."""
    n = len(chosen)
    sizes = SIZES[first:last]
    places = np.cumsum([0] + [-(-n * s // 64) * 64 for s in sizes])
    out, index, bad = np.full(places[-1], 0xEE, np.uint8), np.full((2, n), -9), np.full(n, 7, np.uint8)
    sums = np.full(n, 9, np.uint64)
    chosen_rows = np.array(chosen, np.int64)
    wrong = rows.read_rows(
        read_only(image.mem), image.cols, first, last, chosen_rows, out, places, index, sums, bad, image.capacity, verified
    )
    found = [[out[places[f] + i * s :][:s].tobytes() for f, s in enumerate(sizes)] for i in range(n)]
    return int(wrong), found, index, bad.tolist()


@pytest.mark.parametrize("chosen", [[], [0], [5], [3, 3, 3], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5] * 3])
def test_read_rows(run: None, chosen: list[int]) -> None:
    """None, one, all, and more than all rows in any order; all fields and each alone; from a read-only map."""
    image = Image(6, 1)
    before = image.mem.copy()
    for first, last in [(0, FIELDS), *((f, f + 1) for f in range(FIELDS))]:
        wrong, found, index, bad = reader(image, chosen, first, last)
        assert (wrong, bad) == (0, [0] * len(chosen))
        assert found == [[image.entry(r, f) for f in range(first, last)] for r in chosen]
        assert index.tolist() == [[image.position(r) for r in chosen], [image.group(r) for r in chosen]]
    assert (image.mem == before).all()


def changed(image: Image, found: tuple[Any, ...], flags: list[int]) -> tuple[int, list[int]]:
    """Call find_changed: number of bad rows, flags."""
    first, last, chosen, index, sums = found
    bad = np.array(flags, np.uint8)
    wrong = rows.find_changed(read_only(image.mem), image.cols, first, last, chosen, index, sums, bad)
    return int(wrong), bad.tolist()


@pytest.mark.parametrize("first, last", [(0, FIELDS), *((f, f + 1) for f in range(FIELDS))])
def test_find_changed(run: None, first: int, last: int) -> None:
    """After a read, another position, group or checksum of a field that was read makes a row bad, and no other does."""
    image = Image(6, 1)
    chosen = np.array([4, 2, 0, 2])
    out, places = np.empty(4 * sum(SIZES) + 64 * FIELDS, np.uint8), np.zeros(FIELDS, np.int64)
    index, sums, bad = np.empty((2, 4), np.int64), np.empty(4, np.uint64), np.empty(4, np.uint8)
    assert rows.read_rows(read_only(image.mem), image.cols, first, last, chosen, out, places, index, sums, bad, image.capacity, ALL) == 0
    found = first, last, chosen, index, sums
    assert changed(image, found, [0, 0, 0, 0]) == (0, [0, 0, 0, 0]) and changed(image, found, [0, 0, 1, 0]) == (1, [0, 0, 1, 0])
    words = [(image.offsets[FIELDS] + 16, True), (image.offsets[FIELDS + 1] + 16, True)]  # of row 2
    words += [(image.offsets[FIELDS + 2] + 8 * (2 * FIELDS + f), first <= f < last) for f in range(FIELDS)]
    for at, seen in words:
        image.mem[at + 3] ^= 1
        assert changed(image, found, [0, 0, 0, 0]) == ((2, [0, 1, 0, 1]) if seen else (0, [0, 0, 0, 0]))
        image.mem[at + 3] ^= 1


def test_read_rows_finds_what_is_wrong(run: None) -> None:
    """Free rows and any changed byte of a field, the index or the checksum make a row bad; of other fields not."""
    image = Image(7, 2, holes=True)
    assert reader(image, list(range(7)), 0, FIELDS)[3] == [0, 1, 0, 1, 0, 1, 0]
    for f in range(FIELDS):
        for at in {0, SIZES[f] // 2, SIZES[f] - 1}:
            image.mem[image.offsets[f] + 2 * SIZES[f] + at] ^= 4
            assert reader(image, [4, 2, 0, 2], 0, FIELDS)[::3] == (2, [0, 1, 0, 1])
            assert reader(image, [4, 2, 0, 2], f, f + 1)[0] == 2
            assert reader(image, [4, 2, 0, 2], (f + 1) % FIELDS, (f + 1) % FIELDS + 1)[0] == 0
            image.mem[image.offsets[f] + 2 * SIZES[f] + at] ^= 4
    for column in (FIELDS, FIELDS + 1):
        image.mem[image.offsets[column] + 8 * 2 + 1] ^= 16
        assert reader(image, [2, 4], 0, 1)[3] == [1, 0]
        image.mem[image.offsets[column] + 8 * 2 + 1] ^= 16
    moved = Image(7, 2, holes=True)
    for column in range(FIELDS + 3):
        moved.put(4, column, image.entry(2, column))
    assert reader(moved, [2, 4], 0, FIELDS)[3] == [0, 1]  # a right row in the wrong place
    image.mem[image.offsets[0] + 2 * SIZES[0]] ^= 1  # in row 2
    known = np.array([1, 1, 1, 0, 0, 0, 0], np.uint8)
    assert reader(image, [0, 2, 4, 1], 0, FIELDS, known)[::3] == (1, [0, 0, 0, 1])  # not looked at; free
    assert known.tolist() == [1, 1, 1, 0, 1, 0, 0]
    known[:] = 0
    assert reader(image, [4, 6], 0, 1, known)[0] == 0 and not known.any()  # one field is not all
    assert reader(image, [6, 2, 1, 0], 0, FIELDS, known)[::3] == (2, [0, 1, 1, 0])
    assert known.tolist() == [1, 0, 0, 0, 0, 0, 1]
    image.mem[image.offsets[0] + 2 * SIZES[0]] ^= 1
    for outside in (-1, 7, -(2**62), 2**62):
        assert reader(moved, [2, outside], 0, FIELDS)[0] == -1


@pytest.mark.parametrize(
    ("taken", "wanted"),
    [
        ([], []),
        ([-1, -1], []),
        ([4], [(4, 0)]),
        ([0, 1, 2, 3, 4], [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        ([2, -1, 2, 0, 2, 0], [(2, 4), (0, 5)]),
        ([1] * 9, [(1, 8)]),
        ([0, 5], None),
        ([0, -2], None),
    ],
)
def test_keep_last(run: None, taken: list[int], wanted: list[tuple[int, int]] | None) -> None:
    """Of the samples that take one row the last survives; rows outside are refused before anything is noted."""
    slots = np.zeros(5, np.int32)
    samples, found, positions = (np.full(len(taken), -9) for _ in range(3))
    index = read_only(np.zeros(5, np.int64))
    count = commit.keep_last(read_only(np.array(taken, np.int64)), np.zeros(0, np.int64), index, slots, 1000, samples, found, positions)
    assert not slots.any()
    if wanted is None:
        assert count == -1
    else:
        assert list(zip(found[:count].tolist(), samples[:count].tolist(), strict=True)) == wanted
        assert positions[:count].tolist() == [1000 + s for _, s in wanted]


@pytest.mark.parametrize(
    ("freed", "right"),
    [
        ([], True),
        ([3], True),
        ([3, 0], True),
        ([3, 3], False),
        ([0, 1], False),  # taken
        ([0, 2], False),  # free before
        ([0, 5], False),
        ([0, -1], False),
        ([2**62, 0], False),
    ],
)
def test_keep_last_looks_at_freed_rows(run: None, freed: list[int], right: bool) -> None:
    """Rows that a policy gives up are live, not taken, and there once: else the journal could not undo them, nor hold them."""
    slots, index = np.zeros(5, np.int32), np.array([7, 8, -1, 9, 0])
    samples, found, positions = (np.full(3, -9) for _ in range(3))
    given = np.array(freed, np.int64)
    count = commit.keep_last(np.array([4, -1, 1]), given, index, slots, 1000, samples, found, positions)
    assert not slots.any()
    assert count == (2 if right else -2)
    assert given.tolist() == freed


@pytest.mark.parametrize("chosen", [[], [0], [1], [6, 2, 5, 0, 3], [6, 5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize(("whole", "changing"), [(7, []), (0, [4]), (2, [0, 3])])
def test_journal(run: None, chosen: list[int], whole: int, changing: list[int]) -> None:
    """save_rows, hash_records, exchange_digests, read_record and restore_rows: list, records, digests, and all bytes back."""
    image = Image(7, 3, holes=True)
    marks = np.zeros(FIELDS, np.uint8)
    marks[changing] = 1
    stamps = np.zeros(7, np.uint8)
    stamps[[0, 2]] = 4
    before = image.mem.copy()
    digests = words(*image.digests(3))
    counts = np.full(4, -9)
    new = [r for r in chosen if image.position(r) >= 0 and stamps[r] != 4]
    old = [r for r in chosen if image.position(r) >= 0 and stamps[r] == 4]
    free = [r for r in chosen if image.position(r) < 0]
    order, live = new + old + free, len(new) + len(old)
    wanted = image.digests(3)
    for r in new + old:
        for f in range(FIELDS) if r in chosen[:whole] else changing:
            wanted[r % 3] = wanted[r % 3] - share(image.stored(r, f)) & M64
    place = (image.list_at, image.record_at, image.record)
    found = commit.save_rows(image.mem, image.cols, np.array(chosen, np.int64), whole, marks, stamps, 4, *place, digests, counts)
    assert int(found) == journal(image, order, live)
    assert counts.tolist() == [len(new), live, len(order), max(chosen, default=-1) + 1]
    assert digests.tolist() == wanted
    assert image.mem[image.list_at : image.list_at + 8 * len(order)].view(np.int64).tolist() == order
    assert image.columns() == before[: image.list_at].tobytes()
    assert [r for r in range(7) if stamps[r] == 4] == sorted({0, 2} | set(chosen))
    for i, r in enumerate(order[:live]):
        at = image.record_at + i * image.record
        for column, width in enumerate(image.widths):
            assert image.mem[at : at + width].tobytes() == image.entry(r, column)
            at += -(-width // 8) * 8

    # The records alone, as they lie in an undo file, have the same hash.
    copy = np.concatenate([image.mem[image.list_at :][: 8 * len(order)], image.mem[image.record_at :][: live * image.record]])
    assert int(before_images.hash_records(read_only(copy), 0, 8 * len(order), image.record, live, len(order))) == int(found)
    if live:
        for at in (8 * len(order), copy.shape[0] - 1):
            copy[at] ^= 1
            assert int(before_images.hash_records(read_only(copy), 0, 8 * len(order), image.record, live, len(order))) != int(found)
            copy[at] ^= 1

    # Each record reads as a row of a file of its own.
    own = image.cols.copy()
    own[:, 0] = np.cumsum([0] + [-(-w // 8) * 8 for w in image.widths[:-1]])
    places = np.cumsum([0] + [-(-s // 8) * 8 for s in SIZES])
    for i, r in enumerate(order[:live]):
        record = image.mem[image.record_at + i * image.record :][: image.record].copy()
        out = np.zeros(places[-1], np.uint8)
        assert rows.read_record(record, own, r, out, places)
        assert [out[places[f] :][: SIZES[f]].tobytes() for f in range(FIELDS)] == [image.entry(r, f) for f in range(FIELDS)]
        assert not rows.read_record(record, own, r + 1, out, places)
        record[int(own[6, 0]) + 784] ^= 1
        assert not rows.read_record(record, own, r, out, places)

    # Overwrite the rows; the records bring everything back, those in use only.
    rng = random.Random(9)
    for r in order:
        image.write(r, [rng.randbytes(s) for s in SIZES], 1000 + r, 1)
    present = words(*image.digests(3))
    use = np.ones(len(order), np.uint8)
    use[1::3] = 0
    source = read_only(image.mem.copy())
    before_images.exchange_digests(source, image.cols, *place, live, use, read_only(image.mem), present)
    before_images.restore_rows(source, image.cols, *place, live, use, image.mem)
    assert present.tolist() == image.digests(3)
    reference = Image(7, 3, holes=True)
    for i, r in enumerate(order):
        if not use[i]:
            assert image.position(r) == 1000 + r
        elif i < live:
            assert all(image.entry(r, c) == reference.entry(r, c) for c in range(FIELDS + 3))
        else:
            assert image.position(r) == -1
    before_images.restore_rows(source, image.cols, *place, live, np.ones(len(order), np.uint8), image.mem)
    for r in range(7):
        columns = range(FIELDS + 3) if reference.position(r) >= 0 or r not in chosen else [FIELDS]
        assert all(image.entry(r, c) == reference.entry(r, c) for c in columns)


def test_journal_without_stamps(run: None) -> None:
    """Without restore points every live row counts as new."""
    image = Image(4, 5)
    counts = np.zeros(4, np.int64)
    commit.save_rows(
        image.mem, image.cols, np.array([2, 0]), 2, np.zeros(FIELDS, np.uint8), np.zeros(0, np.int32), 1,
        image.list_at, image.record_at, image.record, words(0), counts,
    )  # fmt: skip
    assert counts.tolist() == [2, 2, 2, 3]


@pytest.mark.parametrize("chosen", [[], [3], [4, 0, 2], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("f", range(FIELDS))
def test_write_field(run: None, f: int, chosen: list[int]) -> None:
    """Bytes, checksums and digests of the rows written, and nothing else; sources in any order, repeated, read-only."""
    image = Image(5, 6)
    reference = Image(5, 6)
    rng = np.random.default_rng(f)
    source = rng.integers(0, 256, 8 * SIZES[f], np.uint8)
    samples = rng.integers(0, 8, len(chosen))
    digests = words(10, 20, 30)
    positions, groups = (
        np.array([reference.position(r) for r in chosen], np.int64),
        np.array([reference.group(r) for r in chosen], np.int64),
    )
    wanted = [10, 20, 30]
    for r, s in zip(chosen, samples.tolist(), strict=True):
        data = source[s * SIZES[f] : (s + 1) * SIZES[f]].tobytes()
        reference.put(r, f, data)
        value = checksum(data, r, reference.position(r), reference.group(r), f)
        sums = bytearray(reference.entry(r, FIELDS + 2))
        sums[8 * f : 8 * f + 8] = value.to_bytes(8, "little")
        reference.put(r, FIELDS + 2, bytes(sums))
        wanted[r % 3] = wanted[r % 3] + share(value) & M64
    commit.write_field(image.mem, image.cols, f, np.array(chosen, np.int64), samples, read_only(source), positions, groups, digests)
    assert image.mem.tobytes() == reference.mem.tobytes()
    assert digests.tolist() == wanted


@pytest.mark.parametrize("chosen", [[], [3], [4, 0, 2]])
def test_write_index(run: None, chosen: list[int]) -> None:
    """Position and group of the rows written, and nothing else."""
    image, reference = Image(5, 6), Image(5, 6)
    positions, groups = np.arange(len(chosen)) + 2**40, -np.arange(len(chosen)) - 1
    for r, p, g in zip(chosen, positions.tolist(), groups.tolist(), strict=True):
        reference.put(r, FIELDS, p.to_bytes(8, "little"))
        reference.put(r, FIELDS + 1, g.to_bytes(8, "little", signed=True))
    verified = np.zeros(image.capacity, np.uint8)
    commit.write_index(image.mem, image.cols, np.array(chosen, np.int64), positions, groups, verified)
    assert np.flatnonzero(verified).tolist() == sorted(set(chosen))
    assert image.mem.tobytes() == reference.mem.tobytes()


PLANS = [[-1], [3], [4, -1, 0, 6], [0, 1, 2, 3, 4, 5, 6], [2, -1, 2, 6, 2, -1, 6, 0]]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("fields", [1, 2, 4])
def test_commit_rows(run: None, fields: int, given: bool, plan: list[int]) -> None:
    """What the steps leave, each called for itself: journal, seal, rows, index, header. Nothing, for a wrong plan or without pages."""
    seal_at, header_at = 8, 8 + 8 * 8  # words of their own, in place of the first two columns
    shift = header_at + 8 * 20
    rng = np.random.default_rng(1)
    first, start, n = 5, 2**41, len(plan)
    sources = [rng.integers(0, 256, (first + n) * size, np.uint8) for size in SIZES[3:7][:fields]]
    positions, groups = rng.integers(0, 2**41, n), -np.arange(first + n)
    planned = np.array(plan, np.int64)
    count = len(set(plan) - {-1})
    live = sum(0 <= r < 5 for r in set(plan))

    def made() -> tuple[Any, ...]:
        image = Image(7, 8, live=5)
        memory = np.concatenate([np.zeros(shift, np.uint8), image.mem])
        memory = np.concatenate([memory, np.zeros(-len(memory) % 8, np.uint8)])
        which = [*range(3, 3 + fields), FIELDS, FIELDS + 1, FIELDS + 2]
        cols = image.cols[which].copy()
        cols[:, 0] += np.uint64(shift)
        cols[-1, 1] = 8 * fields
        place = (image.list_at + shift, image.record_at + shift, sum(-(-int(size) // 8) * 8 for _, size in cols))
        head, seal = np.arange(20, dtype=np.uint64), np.arange(8, dtype=np.uint64)
        head[2] = 5
        return memory, cols, place, head, seal, np.zeros(7, np.int32)

    def call(plan: Any, most: int = 7, ready: int = 5, faulted: int = 7) -> tuple[int, tuple[Any, ...]]:
        memory, cols, place, head, seal, slots = made()
        data = [*sources, *[np.zeros(0, np.uint8)] * (4 - fields)]
        at = np.array([*place, seal_at, 1, 3, 5, 2, 4, 6, 8, 3])
        where = positions if given else positions[:0]
        limits = most, ready, faulted
        found = commit.commit_rows(memory, cols, plan, slots, start, where, groups, first, *data, seal, head, header_at, *limits, at, ALL)
        return found, (memory.tobytes(), seal.tolist(), head.tolist(), slots.tolist())

    def steps() -> tuple[Any, ...]:
        memory, cols, place, head, seal, slots = made()
        digests, none, counts = head[8:11], np.zeros(0, np.int32), np.zeros(4, np.int64)
        samples, taken, places = (np.zeros(n, np.int64) for _ in range(3))
        assert commit.keep_last(planned, planned[:0], planned[:0], slots, start, samples, taken, places) == count
        samples, taken, places = samples[:count], taken[:count], positions[samples[:count]] if given else places[:count]
        if count:
            seal[5] = commit.save_rows(memory, cols, taken, count, np.zeros(fields, np.uint8), none, 0, *place, digests, counts)
            seal[1], seal[3] = counts[1], counts[2]
            checksums.seal_block(memory, seal_at, seal, 0)
            for f, source in enumerate(sources):
                commit.write_field(memory, cols, f, taken, samples + first, source, places, groups[samples + first], digests)
            commit.write_index(memory, cols, taken, places, groups[samples + first], ALL)
        head[2] += np.uint64(counts[2] - counts[1])
        head[4] = max(int(head[4]), int(counts[3]))
        checksums.seal_block(memory, header_at, head, 6)
        return memory.tobytes(), seal.tolist(), head.tolist(), slots.tolist()

    found, left = call(planned)
    assert found == count
    assert left == steps()
    assert left[2][2] == 5 + count - live and left[2][4] == max(4, *plan, max(plan) + 1)
    memory, _, _, head, seal, slots = made()
    before = memory.tobytes(), seal.tolist(), head.tolist(), slots.tolist()
    for wrong in (7, -2):
        assert call(np.array([*plan[:-1], wrong])) == (-1, before)
    if count:
        assert call(planned, most=count - 1) == (-1, before)
        assert call(planned, ready=min(count, 5) - 1) == (-2, before)
        assert call(planned, faulted=max(plan)) == (-2, before)
        assert call(planned, most=count, ready=min(count, 5), faulted=max(plan) + 1) == (count, left)


@pytest.mark.parametrize(
    ("capacity", "live", "holes"), [(1, 0, False), (1, 1, False), (6, 0, False), (6, 4, False), (9, 9, True), (8, 8, True)]
)
def test_scan_and_verify(run: None, capacity: int, live: int, holes: bool) -> None:
    """Empty, partly filled, full, with holes: counts and digests; and verify_rows names exactly the wrong rows."""
    image = Image(capacity, 7, holes, live)
    digests = np.zeros(4, np.uint64)
    alive = image.live()
    found = rows.scan_index(read_only(image.mem), image.cols, capacity, digests)
    assert (int(found[0]), int(found[1])) == (len(alive), max(alive, default=-1) + 1)
    assert digests.tolist() == image.digests(4)
    bad = np.full(capacity, 7, np.uint8)
    rows.verify_rows(read_only(image.mem), image.cols, 0, capacity, bad)
    assert not bad.any()
    for r in range(capacity):
        column = r % (FIELDS + 3)
        image.mem[image.offsets[column] + r * image.widths[column]] ^= 2
        for start, stop in {(0, capacity), (r, r + 1), (r // 2, capacity)}:
            bad = np.full(stop - start, 7, np.uint8)
            rows.verify_rows(read_only(image.mem), image.cols, start, stop, bad)
            wrong = [start + int(i) for i in np.flatnonzero(bad)]
            assert wrong == ([r] if image.position(r) != -1 else [])
        image.mem[image.offsets[column] + r * image.widths[column]] ^= 2


@pytest.mark.parametrize("chosen", [[], [0], [6, 2, 4], [0, 2, 4, 6]])
def test_freed_rows(run: None, chosen: list[int]) -> None:
    """save_freed, hash_freed, restore_freed, copy_records: three words a row, digests, and position and group back."""
    image = Image(7, 8, holes=True)
    reference = Image(7, 8, holes=True)
    digests, wanted = words(*image.digests(3)), image.digests(3)
    for r in chosen:
        for f in range(FIELDS):
            wanted[r % 3] = wanted[r % 3] - share(image.stored(r, f)) & M64
    at, before = image.list_at + 16, image.mem.copy()
    data = b"".join(v.to_bytes(8, "little", signed=True) for r in chosen for v in (r, image.position(r), image.group(r)))
    found = int(before_images.save_freed(image.mem, image.cols, np.array(chosen, np.int64), at, digests))
    assert found == digest(data)
    assert digests.tolist() == wanted
    assert image.mem.tobytes() == before[:at].tobytes() + data + before[at + len(data) :].tobytes()
    assert int(before_images.hash_freed(read_only(image.mem), at, len(chosen))) == found
    for place in {at, at + len(data) // 2, at + len(data) - 1} if chosen else ():
        image.mem[place] ^= 8
        assert int(before_images.hash_freed(read_only(image.mem), at, len(chosen))) != found
        image.mem[place] ^= 8

    record = np.zeros(8 + len(chosen) * image.record, np.uint8)
    before_images.copy_records(read_only(image.mem), image.cols, np.array(chosen, np.int64), record, 8, image.record)
    padded = [b"".join(e + bytes(-len(e) % 8) for e in (image.entry(r, c) for c in range(FIELDS + 3))) for r in chosen]
    assert record.tobytes() == bytes(8) + b"".join(padded)

    for r in chosen:
        image.put(r, FIELDS, (-1).to_bytes(8, "little", signed=True))
        image.put(r, FIELDS + 1, bytes(8))
    assert image.digests(3) == wanted
    before_images.restore_freed(read_only(image.mem.copy()), image.cols, at, len(chosen), image.mem)
    assert image.columns() == reference.columns()


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_hash_log(run: None, count: int) -> None:
    """The hash of a log goes on from that of its beginning, and any entry that changes, moves or is missing changes it."""
    rng = random.Random(count)
    log = [(rng.randrange(2), rng.choice([0, 1, -1, 2**40, -(2**63), rng.randrange(50)])) for _ in range(count)]
    value = 0
    for what, entry in log:
        value = mix(mix(value + (what & M64) * GOLDEN & M64) + (entry & M64) & M64)
    entries = np.array(log, np.int64).reshape(-1, 2)
    assert int(checksums.hash_log(np.uint64(0), read_only(entries))) == value
    for cut in {0, count // 2, count}:
        first = np.uint64(checksums.hash_log(np.uint64(0), entries[:cut]))
        assert int(checksums.hash_log(first, entries[cut:])) == value
    for i in range(count):
        for column in (0, 1):
            other = entries.copy()
            other[i, column] ^= 1 << (5 * i % 64)
            assert int(checksums.hash_log(np.uint64(0), other)) != value
        swapped = entries.copy()
        swapped[[i, i - 1]] = entries[[i - 1, i]]
        assert (swapped == entries).all() or int(checksums.hash_log(np.uint64(0), swapped)) != value
