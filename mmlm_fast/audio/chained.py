"""FLAC, Ogg and MP3: what they state of their lengths, and where one file begins behind another."""

import struct
from itertools import pairwise

from mmlm_fast.audio.magic import begins, first_within
from mmlm_fast.audio.statement import Bytes, Stated, another, ranges


def id3_size(data: Bytes, place: int = 0) -> int:
    """Where ID3v2 tags end that begin at a place: FLAC, AAC and MP3 files may have them in front."""
    while (head := data.at(place, 10))[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = head[6:10]
        place += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if head[5] & 0x10 else 0)
    return place


def flac(data: Bytes, tags: int) -> Stated:
    total = data.number(tags + 18, ">Q") & (1 << 36) - 1
    ends = [_flac_frame_end(data, data.size * i // 4, data.number(tags + 10, ">H")) for i in (1, 2, 3, 4)]
    last = ends[-1]
    tail = max(data.size - (1 << 16), tags + 8)
    if (place := first_within(data.at(tail, 1 << 16))) >= 0 and data.at(tail + place, 4) != b"fLaC":
        return another(tail + place)
    if total and last == total and all(a <= b for a, b in pairwise(ends)):
        return Stated(total, is_exact=True)
    # Another file behind this one? Looked for only here, since it takes a tenth of the time that decoding does.
    starts, block, seen = [0], 1 << 20, tags + 8
    while len(held := data.at(seen, block + 16)) > 7:
        place = first_within(held)
        while 0 <= place < block:
            if held[place : place + 4] != b"fLaC":
                return another(seen + place)
            starts.append(seen + place)
            place = first_within(held, place + 1)
        seen += block
    problem = None
    if len(starts) == 1 and 0 < total < last:
        problem = f"its header promises {total} samples, its last frame ends at {last}"
    return Stated(total or -1, is_exact=True, is_unknown=total == 0, problem=problem, parts=ranges(data, starts))


def _flac_frame_end(data: Bytes, end: int, frame_length: int) -> int:
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


def ogg(data: Bytes, _: int) -> Stated:
    """Follow the pages. A stream ends on a page that says so; one without was cut off, or whoever wrote it killed."""
    place, starts, is_body, problem = 0, [0], False, None
    opened: set[bytes] = set()
    ended: set[bytes] = set()
    numbers: dict[bytes, int] = {}
    granules: list[int] = []
    while len(head := data.at(place, 27)) == 27 and head[:4] == b"OggS":
        flags, serial, number = head[5], head[14:18], struct.unpack("<I", head[18:22])[0]
        if flags & 2:
            if is_body:
                starts.append(place)
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
            return Stated(problem=problem, parts=ranges(data, starts))
        place += size
    if is_file_behind_tags(data, place):
        return another(place)
    if data.at(place, 1).strip(b"\0") and b"OggS" in data.at(place, 1 << 17):
        problem = problem or f"broken at byte {place}: no page begins there"
    problem = problem or _unended(opened, ended)
    if len(starts) > 1 or len(opened) > 1:
        return Stated(problem=problem, parts=ranges(data, starts))
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


def frames_begin(data: Bytes, place: int) -> bool:
    for _ in range(3):
        if (frame := _mp3_frame(data.at(place, 4))) is None:
            return False
        place += frame[0]
    return True


def mp3(data: Bytes, tags: int) -> Stated:
    head = data.at(tags, 4096)
    begin = next((i for i in range(len(head)) if head[i] == 0xFF and frames_begin(data, tags + i)), None)
    if begin is None or (begin and not tags):
        return Stated()
    frame = _mp3_frame(head[begin : begin + 4])
    assert frame is not None
    place = tags + begin
    tag = data.at(place + frame[2], 160)
    if tag[:4] not in (b"Xing", b"Info") or not tag[7] & 1:
        return _vbri(data, place, frame[1])
    frames, trim = int.from_bytes(tag[8:12], "big"), 0
    at = 8 + 4 * (tag[7] & 1) + 4 * (tag[7] >> 1 & 1) + 100 * (tag[7] >> 2 & 1) + 4 * (tag[7] >> 3 & 1)
    if tag[at : at + 4].strip(b"\0"):
        delays = int.from_bytes(tag[at + 21 : at + 24], "big")
        trim = (delays >> 12) + (delays & 0xFFF)
    num_samples = max(frames * frame[1] - trim, 0)
    size = int.from_bytes(tag[12:16], "big") if tag[7] & 2 else 0
    if problem := _mp3_problem(data, place, frames, size):
        return Stated(num_samples, problem=problem)
    if not size:
        return Stated(num_samples)
    # Another file behind this one, and behind the tags that may end it?
    end = place + size
    if is_file_behind_tags(data, end, with_mp3=False):
        return another(end)
    behind = data.at(end, 1 << 16)
    for i in range(len(behind)):
        if behind[i : i + 3] == b"ID3" or (behind[i] == 0xFF and frames_begin(data, end + i)):
            return Stated(num_samples, parts=ranges(data, [0, end + i]))
    return Stated(num_samples)


def is_file_behind_tags(data: Bytes, place: int, with_mp3: bool = True) -> bool:
    """Whether a file begins at a place or behind the tags that stand there; with or without a look for MP3."""
    while True:
        head = data.at(place, 16)
        if head[:3] == b"TAG":
            place += 128
        elif head[:8] == b"APETAGEX":
            place += 32 + int.from_bytes(head[12:16], "little")
        elif (tags := id3_size(data, place)) > place:
            place = tags
        else:
            return begins(data, place) or (with_mp3 and frames_begin(data, place))


def _vbri(data: Bytes, place: int, samples: int) -> Stated:
    """Fraunhofer's tag of the first frame, or a file without one."""
    tag = data.at(place + 36, 18)
    if len(tag) < 18 or tag[:4] != b"VBRI":
        return Stated(is_guessed=True)
    size, frames = struct.unpack(">II", tag[10:])
    return Stated(frames * samples, is_guessed=True, problem=_mp3_problem(data, place, frames, size))


def _mp3_problem(data: Bytes, place: int, frames: int, size: int) -> str | None:
    """What is wrong where a tag counts more than there is; `size` is 0 where it does not count bytes.

    Encoders differ on whether the bytes include tags, so frames decide.
    """
    held = data.size - place
    if 0 < size <= held:
        return None
    first, count = place, 0
    while count <= frames and (frame := _mp3_frame(data.at(place, 4))) and frame[0] and place + frame[0] <= data.size:
        place, count = place + frame[0], count + 1
    count -= 1  # the one with the tag
    if count >= frames:
        return None
    counted = f"{size} bytes, {data.size - first} are there" if size else f"{frames} frames, {count} are there"
    return f"cut short: its header promises {counted}"
