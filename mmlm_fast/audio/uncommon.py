"""Lengths in the containers of games, trackers, studios and streams, most of which only FFmpeg reads."""

import struct

from mmlm_fast.audio.chained import is_file_behind_tags
from mmlm_fast.audio.magic import repeated
from mmlm_fast.audio.statement import Bytes, Stated, another, cut, is_placeholder


def ending(data: Bytes, size: int, begin: int, of: str = " of samples") -> Stated:
    """A statement of `size` bytes from a place on; 0 and placeholders state nothing."""
    if size <= 0 or is_placeholder(size):
        return Stated()
    held = max(data.size - begin, 0)
    return cut(size, held, of) if size > held else Stated(end=begin + size)


def alone(data: Bytes, _: int, size: int = 32) -> Stated:
    """A container that does not say where it ends: neither its own first bytes nor another's may come behind."""
    place = repeated(data, data.at(0, size))
    return another(place) if place > 0 else Stated()


def named(data: Bytes, _: int) -> Stated:
    """The same with a long name in front, which is enough."""
    return alone(data, _, 16)


def sox(data: Bytes, _: int) -> Stated:
    order = "<" if data.at(0, 1) == b"." else ">"
    return ending(data, data.number(8, order + "Q") * 4, 4 + data.number(4, order + "I"))


def kvag(data: Bytes, _: int) -> Stated:
    return ending(data, data.number(4, "<I"), 14)


def apm(data: Bytes, _: int) -> Stated:
    return ending(data, data.number(28, "<I"), 100)


def rso(data: Bytes) -> Stated | None:
    """A sound of a Lego brick, which has no magic to speak of; None where it is none."""
    head = data.at(0, 8)
    if len(head) < 8 or head[:2] not in (b"\1\0", b"\1\1") or head[6:] != b"\0\0":
        return None
    size, rate = struct.unpack(">HH", head[2:6])
    return ending(data, size if 2000 <= rate <= 48000 else 0, 8)


def adx(data: Bytes) -> Stated | None:
    """CRI ADX: blocks of samples behind a copyright; None where it is none."""
    begin = 4 + data.number(2, ">H")
    if data.at(0, 2) != b"\x80\0" or data.at(begin - 6, 6) != b"(c)CRI":
        return None
    size, bits, channels = struct.unpack("3B", data.at(5, 3))
    count = data.number(12, ">I")
    if size < 3 or not bits or not channels or not count:
        return Stated()
    facts = ending(data, -(-count // ((size - 2) * 8 // bits)) * size * channels, begin)
    if facts.problem:
        return facts
    assert facts.end > 0
    end = facts.end
    if data.at(end, 2) == b"\x80\1":  # a block that marks the end
        end += 4 + data.number(end + 2, ">H")
    return Stated(end=end)  # the count may be one of whole blocks


def xi(data: Bytes, _: int) -> Stated:
    facts = ending(data, data.number(298, "<I"), 338) if data.number(296, "<H") == 1 else Stated()
    return facts if facts.problem or facts.end > 0 else named(data, 0)


def tta(data: Bytes, tags: int) -> Stated:
    rate, count = data.number(tags + 10, "<I"), data.number(tags + 14, "<I")
    if not rate or not count:
        return Stated()
    frames = -(-count // (rate * 256 // 245 or 1))
    table = data.at(tags + 22, 4 * frames)
    begin = tags + 22 + 4 * frames + 4
    if len(table) < 4 * frames:
        return cut(begin, data.size, "")
    return ending(data, sum(struct.unpack(f"<{frames}I", table)), begin)


def flv(data: Bytes, _: int) -> Stated:
    place = data.number(5, ">I") + 4
    while len(head := data.at(place, 11)) == 11 and head[0] & 31 in (8, 9, 18):
        size, held = 11 + int.from_bytes(head[1:4], "big"), data.size - place
        if size > held:
            return cut(size, held, "")
        place += size + 4
    return Stated(end=min(place, data.size))


def real(data: Bytes, _: int) -> Stated:
    place = 0
    while len(head := data.at(place, 8)) == 8 and head[:4] in (b".RMF", b"PROP", b"MDPR", b"CONT", b"DATA", b"INDX"):
        size, held = struct.unpack(">I", head[4:])[0], data.size - place
        if size < 10 or is_placeholder(size):
            return Stated()
        slack = 10 if head[:4] == b"DATA" else 0  # by which FFmpeg counts too many
        if size > held + slack:
            return cut(size, held, "")
        place += size
        for start in (place - slack, place):
            if is_file_behind_tags(data, start):
                return another(start)
    return Stated(end=min(place, data.size))


def transport(data: Bytes) -> Stated | None:
    """A transport stream of MPEG, in packets of 188 bytes; None where it is none."""
    if any(data.at(188 * i, 1) != b"\x47" for i in range(3)):
        return None
    rest = data.size % 188
    whole = data.size - rest
    if rest and data.at(whole, 1) == b"\x47" and data.at(whole - 188, 1) == b"\x47":
        return cut(188, rest, " in its last packet")
    return Stated()


def sds(data: Bytes, _: int) -> Stated:
    bits, (a, b, c) = data.number(6, "B"), data.at(10, 3).ljust(3, b"\0")
    frames = a | b << 7 | c << 14
    size = -(-frames // (120 // max(-(-bits // 7), 2))) * 127
    return ending(data, size, 21)


def voc(data: Bytes, _: int) -> Stated:
    place = data.number(20, "<H")
    while len(block := data.at(place, 4)) == 4 and 0 < block[0] < 10:
        size, held = int.from_bytes(block[1:], "little"), data.size - place - 4
        if size > held:
            return cut(size, held)
        place += 4 + size
    # A block of type 0 ends it.
    return Stated(end=min(place + (data.at(place, 1) == b"\0"), data.size))


def mat5(data: Bytes, _: int) -> Stated:
    order, place = "<" if data.at(126, 2) == b"IM" else ">", 128
    while len(element := data.at(place, 8)) == 8 and 0 < struct.unpack(order + "I", element[:4])[0] < 16:
        kind, size = struct.unpack(order + "II", element)
        held = data.size - place - 8
        if size > held + 8:  # libsndfile counts its own header twice
            return cut(size, held)
        place = _mat5_matrix_end(data, place + 8, place + 8 + size, order) if kind == 14 else place + 8 + size
    return Stated(end=min(place, data.size))


def _mat5_matrix_end(data: Bytes, place: int, end: int, order: str) -> int:
    """Where the last element of a matrix ends, which may be before the matrix does."""
    last = place
    while place < end and len(element := data.at(place, 8)) == 8:
        kind, size = struct.unpack(order + "II", element)
        if kind == 0 or kind & 0xFFFF > 15 or (kind < 1 << 16 and place + 8 + size > end):
            return last
        last = place + 8 if kind >> 16 else place + 8 + size
        place = -(-last // 8) * 8
    return last


def mat4(data: Bytes, _: int) -> Stated:
    order, place = "<" if data.at(0, 4)[3:] == b"\0" and data.number(0, "<I") < 1000 else ">", 0
    while len(head := data.at(place, 20)) == 20:
        kind, rows, columns, is_complex, name = struct.unpack(order + "5I", head)
        if kind >= 5000 or is_complex > 1 or not 0 < name < 64:
            break
        if place and data.at(place + 20, 11) == b"samplerate\0":
            return another(place)
        width = {0: 8, 1: 4, 2: 4, 3: 2, 4: 2, 5: 1}.get(kind // 10 % 10, 1)
        size, held = rows * columns * width * (1 + is_complex), data.size - place - 20 - name
        if size > held:
            return cut(size, held)
        place += 20 + name + size
    return Stated(end=min(place, data.size))
