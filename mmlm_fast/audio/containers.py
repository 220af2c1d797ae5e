"""What a file says of its own length, in every container that says something, and where a chained file's parts begin.

Decoders clip a file that is cut short to what is there, guess where a header is silent, and stop at the end of the
first part. So headers are read here, without decoding: sizes in bytes are compared with the file's size, lengths in
samples are handed on to be compared with what was decoded. What a header does not state stays unknown.
"""

import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from mmlm_fast.audio import magic, uncommon
from mmlm_fast.audio.chained import flac, id3_size, is_file_behind_tags, mp3, ogg
from mmlm_fast.audio.statement import Bytes, Stated, another, cut, is_near_the_top, is_placeholder, unknown

MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx", b"uuid")


def stated(file: BinaryIO, start: int, end: int) -> Stated:
    """Read what the header of bytes [start, end) of a file says of its length."""
    data = Bytes(file, start, end)
    facts = _stated(data)
    if facts.problem is None and 0 < facts.end < data.size and _follows(data, facts.end):
        return another(facts.end)
    if facts.patch is not None and facts.problem is None:  # all that is there is sound, unless a header is among it
        place = magic.repeated(data, data.at(0, 24))
        return another(place) if place > 0 else facts
    return facts


def _stated(data: Bytes) -> Stated:
    tags = id3_size(data)
    head = data.at(tags, 40)
    for place, first, reader in _CONTAINERS:
        if head[place : place + len(first)] == first:
            return reader(data, tags)
    if head[4:8] in MP4_BOXES:
        return _mp4(data)
    return uncommon.adx(data) or uncommon.rso(data) or uncommon.transport(data) or mp3(data, tags)


def _follows(data: Bytes, place: int) -> bool:
    """Whether another file begins at a place or behind the few bytes that fill up a block, and tags."""
    held = data.at(place, 16)
    zeros = len(held) - len(held.lstrip(b"\0"))
    return any(is_file_behind_tags(data, start) for start in range(place, place + zeros + 1))


# ---- chunks: RIFF, RF64, AIFF, 8SVX, W64, CAF ---------------------------------------------------------------------


def _riff(data: Bytes, _: int) -> Stated:
    head = data.at(0, 12)
    order = ">" if head[:4] == b"RIFX" else "<"
    total = data.number(4, order + "I")
    if head[8:] != b"WAVE":  # AVI
        held = data.size - 8
        return cut(total, held, "") if held < total and not is_placeholder(total) else Stated()
    long_size, long_place, found, place, count, kind, width, fact = -1, 0, None, 12, -1, 0, 0, 0
    while len(chunk := data.at(place, 8)) == 8:
        name, size = chunk[:4], struct.unpack(order + "I", chunk[4:])[0]
        begin = place + 8
        if name == b"ds64":
            total, long_size, long_place = data.number(begin, "<Q"), data.number(begin + 8, "<Q"), begin + 8
        if name == b"fmt ":
            kind, width = _wave_format(data, begin, order)
        if name == b"fact":
            fact = data.number(begin, order + "I")
        if name == b"data":
            if found is not None:
                return Stated(problem=f"it has several data chunks, at bytes {found} and {begin}")
            found, held = begin, data.size - begin
            if size == 0xFFFFFFFF and long_size >= 0:
                size = long_size
            # A round number of a header whose other size is right is a lie.
            is_unstated = is_near_the_top(size) or (is_placeholder(size) and not 0 < total < size)
            if (size > held and is_unstated) or (
                size == 0 and held and not _ends_in_chunks(data, begin, total + 8, order)
            ):
                if long_size >= 0:
                    return unknown(data, long_place, struct.pack("<Q", held))
                return unknown(data, place + 4, struct.pack(order + "I", min(held, 0xFFFFFFFF)))
            if size > held:
                return cut(size, held)
            count = size // width if width else -1
        elif found is not None and is_file_behind_tags(data, place):
            return another(place)
        elif found is not None and (not name.isascii() or chunk == bytes(8)):
            break  # what follows the samples is no chunk
        place = begin + size + size % 2
    if found is None:
        return Stated(problem="cut short: it has no data chunk")
    return _wave(kind, count, fact)


_MPEG = (0x50, 0x55)


def _wave(kind: int, count: int, fact: int) -> Stated:
    """The statement of a WAV file whose data are whole: samples by their size, or by `fact` in compressed ones."""
    if count >= 0:
        return Stated(count, is_exact=True)
    is_stated = fact > 0 and not is_placeholder(fact)
    return Stated(fact if is_stated else -1, is_guessed=kind in _MPEG, is_padded=is_stated)


def _wave_format(data: Bytes, place: int, order: str) -> tuple[int, int]:
    """Format of a WAV file, and bytes of a sample of all channels, 0 for codecs that are not a matter of bytes."""
    head = data.at(place, 26)
    if len(head) < 16:
        return 0, 0
    kind, channels, _, _, width, bits = struct.unpack(order + "HHIIHH", head[:16])
    if kind == 0xFFFE:
        kind = int.from_bytes(head[24:26], "big" if order == ">" else "little")
    return kind, width if kind in (1, 3, 6, 7) and width == channels * (bits // 8) else 0


def _ends_in_chunks(data: Bytes, place: int, end: int, order: str) -> bool:
    """Whether chunks fill the bytes up to the RIFF's end exactly: then a data chunk of no bytes is empty indeed."""
    if not place < end <= data.size:
        return False
    while place < end:
        place += 8 + (size := data.number(place + 4, order + "I")) + size % 2
    return place == end


def _iff(data: Bytes, _: int) -> Stated:
    place, frames, found, is_pcm = 12, -1, False, data.at(8, 4) == b"AIFF"
    while len(chunk := data.at(place, 8)) == 8:
        name, size = chunk[:4], struct.unpack(">I", chunk[4:])[0]
        begin = place + 8
        if name == b"COMM":
            frames = data.number(begin + 2, ">I")
            is_pcm |= data.at(begin + 18, 4) in (b"NONE", b"sowt", b"twos", b"fl32", b"FL32", b"fl64", b"FL64")
        if name in (b"SSND", b"BODY"):
            held = data.size - begin
            if (is_placeholder(size) and size > held) or (size == 0 and held):
                return Stated(is_unknown=True)
            if size > held:
                return cut(size, held)
            found = True
        elif found and is_file_behind_tags(data, place):
            return another(place)
        elif found and (not name.isascii() or chunk == bytes(8) or size > data.size - begin):
            break
        place = begin + size + size % 2
    if not found:
        return Stated() if frames == 0 else Stated(problem="cut short: it has no chunk of samples")
    return Stated(frames if is_pcm else -1, is_exact=True, end=min(place, data.size))


def _w64(data: Bytes, _: int) -> Stated:
    place, kind, width, fact = 40, 0, 0, 0
    while len(chunk := data.at(place, 24)) == 24:
        size = struct.unpack("<q", chunk[16:])[0]
        if chunk[:4] == b"fmt ":
            kind, width = _wave_format(data, place + 24, "<")
        if chunk[:4] == b"fact":
            fact = data.number(place + 24, "<Q")
        if chunk[:4] == b"data":
            held = data.size - place - 24
            if (size - 24 <= 0 and held) or (size > held + 24 and is_placeholder(size)):
                return unknown(data, place + 16, struct.pack("<q", held + 24))
            if size - 24 > held:
                return cut(size - 24, held)
            if is_file_behind_tags(data, place + size):  # not filled up to 8 bytes
                return another(place + size)
            end = place + -(-size // 8) * 8
            while 24 <= (behind := data.number(end + 16, "<q")) <= data.size - end and not is_file_behind_tags(
                data, end
            ):
                end += -(-behind // 8) * 8
            return replace(_wave(kind, (size - 24) // width if width else -1, fact), end=min(end, data.size))
        if size < 24:
            break
        place += -(-size // 8) * 8
    return Stated(problem="cut short: it has no data chunk")


def _caf(data: Bytes, _: int) -> Stated:
    place, frames, width, found, is_unknown = 8, -1, 0, False, False
    while len(chunk := data.at(place, 12)) == 12:
        name, size = chunk[:4], struct.unpack(">q", chunk[4:])[0]
        held = data.size - place - 12
        if found and is_file_behind_tags(data, place):
            return another(place)
        if name == b"desc" and data.number(place + 32, ">I") == 1:  # a sample a packet
            width = data.number(place + 28, ">I")
        if name == b"pakt":
            frames = data.number(place + 20, ">q")
        if name == b"data":
            found, is_unknown = True, size == -1
            if size > held:
                return cut(size - 4, held - 4)
            frames = (size - 4) // width if width and not is_unknown else frames
        if size < 0:
            break
        place += 12 + size
    return Stated(frames, is_unknown=is_unknown) if found else Stated(problem="cut short: it has no data chunk")


# ---- a size or a number of samples at a place of its own -----------------------------------------------------------


def _au(data: Bytes, _: int) -> Stated:
    order = ">" if data.at(0, 4) == b".snd" else "<"
    begin, size = data.number(4, order + "I"), data.number(8, order + "I")
    held = data.size - begin
    if (size == 0 and held > 0) or (is_placeholder(size) and size > held):
        return unknown(data, 8, b"\xff" * 4)
    if size > held:
        return cut(size, held)
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(data.number(12, order + "I"), 0)
    width *= data.number(20, order + "I")
    return Stated(size // width if width else -1, is_exact=True, end=begin + size)


def _nist(data: Bytes, _: int) -> Stated:
    count = re.search(rb"sample_count -i (\d+)", data.at(0, 1024))
    return Stated(int(count[1]), is_exact=True) if count else Stated()


def _avr(data: Bytes, _: int) -> Stated:
    return Stated(data.number(26, ">I"), is_exact=True)


def _mpc2k(data: Bytes, _: int) -> Stated:
    return Stated(data.number(30, "<I"), is_exact=True)


def _wve(data: Bytes, _: int) -> Stated:
    return Stated(data.number(18, ">I"), is_exact=True)


# ---- films ---------------------------------------------------------------------------------------------------------


def _mp4(data: Bytes) -> Stated:
    place, is_fragmented = 0, False
    while len(box := data.at(place, 8)) == 8 and box[4:].isalnum():
        size, held = struct.unpack(">I", box[:4])[0], data.size - place
        if size == 1:
            size = data.number(place + 8, ">Q")
        if size == 0:
            break  # it goes to the end of the file, wherever that is
        if place and is_file_behind_tags(data, place):
            return another(place)
        if size > held:
            return cut(size, held, "")
        if size < 8:
            break
        is_fragmented |= box[4:] == b"moof"
        place += size
    if place and is_file_behind_tags(data, place):
        return another(place)
    return Stated(is_unknown=is_fragmented)  # of which FFmpeg counts some fragments


def _vint(data: Bytes, place: int) -> tuple[int, int]:
    """An EBML size at a place, -1 where it is unknown, and the place behind it."""
    first = (data.at(place, 1) or b"\0")[0]
    length = 9 - first.bit_length()
    held = data.at(place, length)
    if length > 8 or len(held) < length:
        return -1, place + 1
    size = int.from_bytes(held, "big") - (1 << 7 * length)
    return (-1 if size == (1 << 7 * length) - 1 else size), place + length


def _ebml(data: Bytes, _: int) -> Stated:
    size, place = _vint(data, 4)
    place += max(size, 0)
    if data.at(place, 4) != b"\x18\x53\x80\x67":
        return Stated()
    size, place = _vint(data, place + 4)
    if size > data.size - place:
        return cut(size, data.size - place, "")
    follows = size >= 0 and is_file_behind_tags(data, place + size)
    return another(place + size) if follows else Stated()


def _asf(data: Bytes, _: int) -> Stated:
    place = 0
    while len(head := data.at(place, 24)) == 24:
        if place and is_file_behind_tags(data, place):
            return another(place)
        size, held = struct.unpack("<Q", head[16:])[0], data.size - place
        if size > held:
            return cut(size, held, "")
        if size < 24:
            break
        place += size
    return Stated()


_CONTAINERS: tuple[tuple[int, bytes, Callable[[Bytes, int], Stated]], ...] = (
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
    (0, b"\xf0\x7e", uncommon.sds),
    (0, b"Creative Voice File", uncommon.voc),
    (0, b"MATLAB 5.0 MAT-file", uncommon.mat5),
    (20, b"samplerate\0", uncommon.mat4),
    (0, b"Extended Instrument: ", uncommon.xi),
    (0, b".SoX", uncommon.sox),
    (0, b"XoS.", uncommon.sox),
    (0, b"KVAG", uncommon.kvag),
    (20, b"vs12", uncommon.apm),
    (0, b"TTA1", uncommon.tta),
    (0, b"FLV\x01", uncommon.flv),
    (0, b".RMF", uncommon.real),
    (0, b"ASF\0", uncommon.alone),
    (0, b"PVF1\n", uncommon.named),
    (0, b" paf\0", uncommon.alone),
    (0, b"fap \0", uncommon.alone),
    (0, magic.NUT, uncommon.named),
    (0, magic.WTV, uncommon.alone),
    *((0, first, uncommon.named) for first in magic.IRCAM),
    (0, b"\x1a\x45\xdf\xa3", _ebml),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _asf),
    (0, b"fLaC", flac),
    (0, b"OggS", ogg),
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
