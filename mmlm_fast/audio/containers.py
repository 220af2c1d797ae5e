"""What a file says of its own length, in every container that says something, and where a chained file's parts begin.

Decoders clip a file that is cut short to what is there, guess where a header is silent, and stop at the end of the
first part. So headers are read here, without decoding: sizes in bytes are compared with the file's size, lengths in
samples are handed on to be compared with what was decoded. What a header does not state stays unknown.
"""

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import BinaryIO

MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx", b"uuid")
# Sizes near 2^31 and 2^32 and round billions are what programs write who do not know the length yet.
NEAR_THE_TOP = 1 << 13
BILLION = 10**9


@dataclass(frozen=True)
class Stated:
    num_samples: int = -1  # a channel; -1: not known
    rate: int = 0  # of these samples, where it may differ from the decoder's
    is_exact: bool = False  # decoders give as many or have lost some; of lossy codecs they differ by a frame
    problem: str | None = None  # what its sizes say is wrong with it
    is_guessed: bool = False  # libsndfile guesses the length, stops there, and is not to be believed
    is_unknown: bool = False  # the header has a placeholder where the length belongs
    patch: tuple[int, bytes] | None = None  # bytes to read at a place in the file, for decoders that do not know it
    parts: tuple[tuple[int, int], ...] = field(default=())  # of a chained file: first byte and end of each


class _Bytes:
    """A range of a file, read at absolute places; what is not there reads as less."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self.file, self.start, self.size = file, start, end - start

    def at(self, place: int, count: int) -> bytes:
        if not 0 <= place < self.size:
            return b""
        self.file.seek(self.start + place)
        return self.file.read(min(count, self.size - place))

    def number(self, place: int, kind: str) -> int:
        held = self.at(place, struct.calcsize(kind))
        return struct.unpack(kind, held)[0] if len(held) == struct.calcsize(kind) else 0


def stated(file: BinaryIO, start: int, end: int) -> Stated:
    """Read what the header of bytes [start, end) of a file says of its length."""
    data = _Bytes(file, start, end)
    tags = _id3_size(data)
    head = data.at(tags, 40)
    for place, magic, reader in _CONTAINERS:
        if head[place : place + len(magic)] == magic:
            return reader(data, tags)
    if head[4:8] in MP4_BOXES:
        return _mp4(data)
    return _mp3(data, tags)


def _is_placeholder(size: int) -> bool:
    return _is_near_the_top(size) or (size >= BILLION and size % (BILLION // 10) == 0)


def _is_near_the_top(size: int) -> bool:
    return any(top - NEAR_THE_TOP <= size <= top for top in (2**31, 2**32, 2**63, 2**64))


def _cut(size: int, held: int, of: str = " of samples") -> Stated:
    return Stated(problem=f"cut short: its header promises {size} bytes{of}, {held} are there")


def _unknown(data: _Bytes, place: int, size: bytes) -> Stated:
    return Stated(is_unknown=True, patch=(data.start + place, size))


def _another(place: int) -> Stated:
    return Stated(problem=f"another file follows behind its end, at byte {place}: which of them is meant?")


def _id3_size(data: _Bytes) -> int:
    """Bytes of ID3v2 tags in front, which FLAC, AAC and MP3 files may have."""
    place = 0
    while (head := data.at(place, 10))[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = head[6:10]
        place += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if head[5] & 0x10 else 0)
    return place


# ---- chunks: RIFF, RF64, AIFF, 8SVX, W64, CAF ---------------------------------------------------------------------


def _riff(data: _Bytes, _: int) -> Stated:
    head = data.at(0, 12)
    order = ">" if head[:4] == b"RIFX" else "<"
    total = data.number(4, order + "I")
    if head[8:] != b"WAVE":  # AVI
        held = data.size - 8
        return _cut(total, held, "") if held < total and not _is_placeholder(total) else Stated()
    long_size, long_place, found, place, count, width = -1, 0, None, 12, -1, 0
    while len(chunk := data.at(place, 8)) == 8:
        name, size = chunk[:4], struct.unpack(order + "I", chunk[4:])[0]
        begin = place + 8
        if name == b"ds64":
            total, long_size, long_place = data.number(begin, "<Q"), data.number(begin + 8, "<Q"), begin + 8
        if name == b"fmt ":
            width = _pcm_width(data, begin, order)
        if name == b"data":
            if found is not None:
                return Stated(problem=f"it has several data chunks, at bytes {found} and {begin}")
            found, held = begin, data.size - begin
            if size == 0xFFFFFFFF and long_size >= 0:
                size = long_size
            # A round number of a header whose other size is right is a lie.
            is_placeholder = _is_near_the_top(size) or (_is_placeholder(size) and not 0 < total < size)
            if (size > held and is_placeholder) or (
                size == 0 and held and not _ends_in_chunks(data, begin, total + 8, order)
            ):
                if long_size >= 0:
                    return _unknown(data, long_place, struct.pack("<Q", held))
                return _unknown(data, place + 4, struct.pack(order + "I", min(held, 0xFFFFFFFF)))
            if size > held:
                return _cut(size, held)
            count = size // width if width else -1
        elif found is not None and name == head[:4] and data.at(place + 8, 4) == b"WAVE":
            return _another(place)
        elif found is not None and not name.isascii():
            break  # what follows the samples is no chunk
        place = begin + size + size % 2
    return Stated(count, is_exact=True) if found is not None else Stated(problem="cut short: it has no data chunk")


def _pcm_width(data: _Bytes, place: int, order: str) -> int:
    """Bytes of a sample of all channels in a WAV file; 0 for codecs that are not a matter of bytes."""
    head = data.at(place, 26)
    if len(head) < 16:
        return 0
    kind, channels, _, _, width, bits = struct.unpack(order + "HHIIHH", head[:16])
    if kind == 0xFFFE:
        kind = int.from_bytes(head[24:26], "big" if order == ">" else "little")
    return width if kind in (1, 3, 6, 7) and width == channels * (bits // 8) else 0


def _ends_in_chunks(data: _Bytes, place: int, end: int, order: str) -> bool:
    """Whether chunks fill the bytes up to the RIFF's end exactly: then a data chunk of no bytes is empty indeed."""
    if not place < end <= data.size:
        return False
    while place < end:
        place += 8 + (size := data.number(place + 4, order + "I")) + size % 2
    return place == end


def _iff(data: _Bytes, _: int) -> Stated:
    kind, place, frames, found, is_pcm = data.at(8, 4), 12, -1, False, data.at(8, 4) == b"AIFF"
    while len(chunk := data.at(place, 8)) == 8:
        name, size = chunk[:4], struct.unpack(">I", chunk[4:])[0]
        begin = place + 8
        if name == b"COMM":
            frames = data.number(begin + 2, ">I")
            is_pcm |= data.at(begin + 18, 4) in (b"NONE", b"sowt", b"twos", b"fl32", b"FL32", b"fl64", b"FL64")
        if name in (b"SSND", b"BODY"):
            held = data.size - begin
            if (_is_placeholder(size) and size > held) or (size == 0 and held):
                return Stated(is_unknown=True)
            if size > held:
                return _cut(size, held)
            found = True
        elif found and name == b"FORM" and data.at(begin, 4) == kind:
            return _another(place)
        elif found and not name.isascii():
            break
        place = begin + size + size % 2
    if not found:
        return Stated() if frames == 0 else Stated(problem="cut short: it has no chunk of samples")
    return Stated(frames if is_pcm else -1, is_exact=True)


def _w64(data: _Bytes, _: int) -> Stated:
    place, width = 40, 0
    while len(chunk := data.at(place, 24)) == 24:
        size = struct.unpack("<q", chunk[16:])[0]
        if chunk[:4] == b"fmt ":
            width = _pcm_width(data, place + 24, "<")
        if chunk[:4] == b"data":
            held = data.size - place - 24
            if (size - 24 <= 0 and held) or (size > held + 24 and _is_placeholder(size)):
                return _unknown(data, place + 16, struct.pack("<q", held + 24))
            if size - 24 > held:
                return _cut(size - 24, held)
            return Stated((size - 24) // width if width else -1, is_exact=True)
        if size < 24:
            break
        place += -(-size // 8) * 8
    return Stated(problem="cut short: it has no data chunk")


def _caf(data: _Bytes, _: int) -> Stated:
    place, frames, width, found, is_unknown = 8, -1, 0, False, False
    while len(chunk := data.at(place, 12)) == 12:
        name, size = chunk[:4], struct.unpack(">q", chunk[4:])[0]
        held = data.size - place - 12
        if name == b"desc" and data.number(place + 32, ">I") == 1:  # a sample a packet
            width = data.number(place + 28, ">I")
        if name == b"pakt":
            frames = data.number(place + 20, ">q")
        if name == b"data":
            found, is_unknown = True, size == -1
            if size > held:
                return _cut(size - 4, held - 4)
            frames = (size - 4) // width if width and not is_unknown else frames
        if size < 0:
            break
        place += 12 + size
    return Stated(frames, is_unknown=is_unknown) if found else Stated(problem="cut short: it has no data chunk")


# ---- a size or a number of samples at a place of its own -----------------------------------------------------------


def _au(data: _Bytes, _: int) -> Stated:
    order = ">" if data.at(0, 4) == b".snd" else "<"
    begin, size = data.number(4, order + "I"), data.number(8, order + "I")
    held = data.size - begin
    if (size == 0 and held > 0) or (_is_placeholder(size) and size > held):
        return _unknown(data, 8, b"\xff" * 4)
    if size > held:
        return _cut(size, held)
    if data.at(begin + size, 4) == data.at(0, 4):
        return _another(begin + size)
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(data.number(12, order + "I"), 0)
    width *= data.number(20, order + "I")
    return Stated(size // width if width else -1, is_exact=True)


def _nist(data: _Bytes, _: int) -> Stated:
    count = re.search(rb"sample_count -i (\d+)", data.at(0, 1024))
    return Stated(int(count[1]), is_exact=True) if count else Stated()


def _avr(data: _Bytes, _: int) -> Stated:
    return Stated(data.number(26, ">I"), is_exact=True)


def _mpc2k(data: _Bytes, _: int) -> Stated:
    return Stated(data.number(30, "<I"), is_exact=True)


def _wve(data: _Bytes, _: int) -> Stated:
    return Stated(data.number(18, ">I"), is_exact=True)


def _sds(data: _Bytes, _: int) -> Stated:
    bits, (a, b, c) = data.number(6, "B"), data.at(10, 3).ljust(3, b"\0")
    frames = a | b << 7 | c << 14
    size = -(-frames // (120 // max(-(-bits // 7), 2))) * 127
    return _cut(size, data.size - 21) if size > data.size - 21 else Stated()


def _voc(data: _Bytes, _: int) -> Stated:
    place = data.number(20, "<H")
    while len(block := data.at(place, 4)) == 4 and 0 < block[0] < 10:
        size, held = int.from_bytes(block[1:], "little"), data.size - place - 4
        if size > held:
            return _cut(size, held)
        place += 4 + size
    return Stated()


def _mat5(data: _Bytes, _: int) -> Stated:
    order, place = "<" if data.at(126, 2) == b"IM" else ">", 128
    while len(element := data.at(place, 8)) == 8:
        size, held = struct.unpack(order + "I", element[4:])[0], data.size - place - 8
        if size > held + 8:  # libsndfile counts its own header twice
            return _cut(size, held)
        place += 8 + size
    return Stated()


def _mat4(data: _Bytes, _: int) -> Stated:
    order, place = "<" if data.at(0, 4)[3:] == b"\0" and data.number(0, "<I") < 1000 else ">", 0
    while len(head := data.at(place, 20)) == 20:
        kind, rows, columns, is_complex, name = struct.unpack(order + "5I", head)
        width = {0: 8, 1: 4, 2: 4, 3: 2, 4: 2, 5: 1}.get(kind // 10 % 10, 1)
        size, held = rows * columns * width * (1 + is_complex), data.size - place - 20 - name
        if size > held:
            return _cut(size, held)
        place += 20 + name + size
    return Stated()


# ---- films ---------------------------------------------------------------------------------------------------------


def _mp4(data: _Bytes) -> Stated:
    place = 0
    while len(box := data.at(place, 8)) == 8 and box[4:].isalnum():
        size, held = struct.unpack(">I", box[:4])[0], data.size - place
        if size == 1:
            size = data.number(place + 8, ">Q")
        if size == 0:
            break  # it goes to the end of the file, wherever that is
        if size > held:
            return _cut(size, held, "")
        if place and box[4:] == b"ftyp":
            return _another(place)
        if size < 8:
            break
        place += size
    return Stated()


def _vint(data: _Bytes, place: int) -> tuple[int, int]:
    """An EBML size at a place, -1 where it is unknown, and the place behind it."""
    first = (data.at(place, 1) or b"\0")[0]
    length = 9 - first.bit_length()
    held = data.at(place, length)
    if length > 8 or len(held) < length:
        return -1, place + 1
    size = int.from_bytes(held, "big") - (1 << 7 * length)
    return (-1 if size == (1 << 7 * length) - 1 else size), place + length


def _ebml(data: _Bytes, _: int) -> Stated:
    size, place = _vint(data, 4)
    place += max(size, 0)
    if data.at(place, 4) != b"\x18\x53\x80\x67":
        return Stated()
    size, place = _vint(data, place + 4)
    if size > data.size - place:
        return _cut(size, data.size - place, "")
    follows = size >= 0 and data.at(place + size, 4) == b"\x1a\x45\xdf\xa3"
    return _another(place + size) if follows else Stated()


def _asf(data: _Bytes, _: int) -> Stated:
    place = 0
    while len(head := data.at(place, 24)) == 24:
        size, held = struct.unpack("<Q", head[16:])[0], data.size - place
        if size > held:
            return _cut(size, held, "")
        if size < 24:
            break
        place += size
    return Stated()


# ---- FLAC, Ogg, MP3: chained where files were put one after the other ---------------------------------------------


def _flac(data: _Bytes, tags: int) -> Stated:
    total = data.number(tags + 18, ">Q") & (1 << 36) - 1
    ends = [_flac_frame_end(data, data.size * i // 4, data.number(tags + 10, ">H")) for i in (1, 2, 3, 4)]
    last = ends[-1]
    if total and last == total and all(a <= b for a, b in pairwise(ends)):
        return Stated(total, is_exact=True)
    # Another file behind this one? Looked for only here, since it takes a tenth of the time that decoding does.
    begins, block, seen = [0], 1 << 20, tags + 8
    while len(held := data.at(seen, block + 7)) > 7:
        place = held.find(b"fLaC")
        while place >= 0:
            if held[place + 4 : place + 8] in (b"\0\0\0\x22", b"\x80\0\0\x22"):  # the header that begins a file
                begins.append(seen + place)
            place = held.find(b"fLaC", place + 1)
        seen += block
    problem = None
    if len(begins) == 1 and 0 < total < last:
        problem = f"its header promises {total} samples, its last frame ends at {last}"
    return Stated(total or -1, is_exact=True, is_unknown=total == 0, problem=problem, parts=_ranges(data, begins))


def _flac_frame_end(data: _Bytes, end: int, frame_length: int) -> int:
    """The sample at which the last frame that begins before byte `end` ends, by its header; -1 where none is near.

    Source: RFC 9639, section 9.1.
    """
    held = data.at(max(end - (1 << 16), 0), min(end, 1 << 16))
    place = len(held)
    while (place := held.rfind(b"\xff", 0, place)) >= 0:
        head = held[place : place + 16]
        if len(head) < 16 or head[1] not in (0xF8, 0xF9):
            continue
        length = max(8 - (head[4] ^ 0xFF).bit_length(), 1)  # leading ones, as in UTF-8
        code, at = head[2] >> 4, 4 + length
        extra = {6: 1, 7: 2}.get(code, 0)
        end = at + extra + {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
        if _crc8(head[:end]) != head[end]:
            continue
        number = head[4] if length == 1 else head[4] & (0x7F >> length)
        for byte in head[5:at]:
            number = number << 6 | byte & 0x3F
        if extra:
            count = int.from_bytes(head[at : at + extra], "big") + 1
        else:
            count = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
        return count + (number if head[1] & 1 else number * frame_length)
    return -1


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 7 if crc & 0x80 else crc << 1) & 0xFF
    return crc


def _ranges(data: _Bytes, begins: list[int]) -> tuple[tuple[int, int], ...]:
    if len(begins) == 1:
        return ()
    ends = [*begins[1:], data.size]
    return tuple((data.start + a, data.start + b) for a, b in zip(begins, ends, strict=True))


def _ogg(data: _Bytes, _: int) -> Stated:
    """Follow the pages. A stream ends on a page that says so; one without was cut off, or whoever wrote it killed."""
    place, begins, is_body, problem = 0, [0], False, None
    opened: set[bytes] = set()
    ended: set[bytes] = set()
    numbers: dict[bytes, int] = {}
    granules: list[int] = []
    while len(head := data.at(place, 27)) == 27 and head[:4] == b"OggS":
        flags, serial, number = head[5], head[14:18], struct.unpack("<I", head[18:22])[0]
        if flags & 2:
            if is_body:
                begins.append(place)
                problem = problem or _unended(opened, ended)
                opened, ended, numbers, granules, is_body = set(), set(), {}, [], False
            opened.add(serial)
        else:
            is_body = True
            if number != numbers.get(serial, number - 1) + 1:
                problem = problem or f"broken: pages before byte {place} are missing"
            if (granule := struct.unpack("<q", head[6:14])[0]) > 0:
                granules.append(granule)
        numbers[serial] = number
        if flags & 4:
            ended.add(serial)
        lacing = data.at(place + 27, head[26])
        size = 27 + head[26] + sum(lacing)
        if len(lacing) < head[26] or size > data.size - place:
            held = data.size - place
            problem = problem or f"cut short: its last page promises {size} bytes, {held} are there"
            return Stated(problem=problem, parts=_ranges(data, begins))
        place += size
    if data.at(place, 1).strip(b"\0") and b"OggS" in data.at(place, 1 << 17):
        problem = problem or f"broken at byte {place}: no page begins there"
    problem = problem or _unended(opened, ended)
    if len(begins) > 1 or len(opened) > 1:
        return Stated(problem=problem, parts=_ranges(data, begins))
    rate, skipped = _ogg_rate(data.at(28, 64))
    if not rate or not granules or granules[0] > 10 * rate:  # a recording of a stream that had begun before
        return Stated(problem=problem)
    return Stated(max(granules[-1] - skipped, 0), rate, problem=problem)


def _ogg_rate(packet: bytes) -> tuple[int, int]:
    """Rate of the page's positions, and how many samples before the first; zeros where unknown."""
    if packet[:7] == b"\1vorbis":
        return struct.unpack("<I", packet[12:16])[0], 0
    if packet[:8] == b"OpusHead":
        return 48000, struct.unpack("<H", packet[10:12])[0]
    if packet[:5] == b"\x7fFLAC":
        return int.from_bytes(packet[27:30], "big") >> 4, 0
    return 0, 0


def _unended(opened: set, ended: set) -> str | None:
    return None if opened <= ended else "cut short: no page is marked as the last of its stream"


_BITRATES = {  # kbit/s by MPEG 1 (1) or 2 and 2.5 (0), and layer
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (0, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_BITRATES[0, 3] = _BITRATES[0, 2]


def _mp3_frame(head: bytes) -> tuple[int, int, int] | None:
    """Bytes and samples of an MPEG audio frame, and where its side information ends; None where there is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_code, bitrate_code, padding = head[2] >> 2 & 3, head[2] >> 4, head[2] >> 1 & 1
    if version == 1 or layer == 4 or rate_code == 3 or bitrate_code in (0, 15):
        return None
    is_first = version == 3
    rate = (44100, 48000, 32000)[rate_code] >> (3 - version if version else 2)
    bitrate = _BITRATES[int(is_first), layer][bitrate_code] * 1000
    samples = 384 if layer == 1 else 1152 if is_first or layer == 2 else 576
    size = (12 * bitrate // rate + padding) * 4 if layer == 1 else samples // 8 * bitrate // rate + padding
    is_mono = head[3] >> 6 == 3
    return size, samples, 4 + ((17 if is_mono else 32) if is_first else (9 if is_mono else 17))


def _frames_begin(data: _Bytes, place: int) -> bool:
    for _ in range(3):
        if (frame := _mp3_frame(data.at(place, 4))) is None:
            return False
        place += frame[0]
    return True


def _mp3(data: _Bytes, tags: int) -> Stated:
    head = data.at(tags, 4096)
    begin = next((i for i in range(len(head)) if head[i] == 0xFF and _frames_begin(data, tags + i)), None)
    if begin is None or (begin and not tags):
        return Stated()
    frame = _mp3_frame(head[begin : begin + 4])
    assert frame is not None
    place = tags + begin
    tag = data.at(place + frame[2], 160)
    if tag[:4] not in (b"Xing", b"Info") or not tag[7] & 1:
        return Stated(is_guessed=True)
    frames = int.from_bytes(tag[8:12], "big")
    trim = 0
    at = 8 + 4 * (tag[7] & 1) + 4 * (tag[7] >> 1 & 1) + 100 * (tag[7] >> 2 & 1) + 4 * (tag[7] >> 3 & 1)
    if tag[at : at + 4].strip(b"\0"):
        delays = int.from_bytes(tag[at + 21 : at + 24], "big")
        trim = (delays >> 12) + (delays & 0xFFF)
    num_samples = max(frames * frame[1] - trim, 0)
    if not tag[7] & 2:
        return Stated(num_samples)
    # Another file behind this one, and behind the tags that may end it?
    end = place + int.from_bytes(tag[12:16], "big")
    behind = data.at(end, 1 << 16)
    for i in range(len(behind)):
        if behind[i : i + 3] == b"ID3" or (behind[i] == 0xFF and _frames_begin(data, end + i)):
            return Stated(num_samples, parts=_ranges(data, [0, end + i]))
    return Stated(num_samples)


_CONTAINERS: tuple[tuple[int, bytes, Callable[[_Bytes, int], Stated]], ...] = (
    (0, b"RIFF", _riff),
    (0, b"RIFX", _riff),
    (0, b"RF64", _riff),
    (0, b"BW64", _riff),
    (0, b"FORM", _iff),
    (0, b"riff\x2e\x91\xcf\x11", _w64),
    (0, b"caff", _caf),
    (0, b".snd", _au),
    (0, b"dns.", _au),
    (0, b"NIST_1A", _nist),
    (0, b"2BIT", _avr),
    (0, b"\x01\x04", _mpc2k),
    (0, b"ALawSoundFile**", _wve),
    (0, b"\xf0\x7e", _sds),
    (0, b"Creative Voice File", _voc),
    (0, b"MATLAB 5.0 MAT-file", _mat5),
    (20, b"samplerate\0", _mat4),
    (0, b"\x1a\x45\xdf\xa3", _ebml),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _asf),
    (0, b"fLaC", _flac),
    (0, b"OggS", _ogg),
)


def parts_of(file: BinaryIO) -> list[tuple[int, int, Stated]]:
    """First byte, end and statement of every part of a file, in order; mostly there is one."""
    waiting, parts = [(0, os.fstat(file.fileno()).st_size)], []
    while waiting:
        start, end = waiting.pop()
        facts = stated(file, start, end)
        if facts.parts:
            waiting += reversed(facts.parts)
        else:
            parts.append((start, end, facts))
    return parts
