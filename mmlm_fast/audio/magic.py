"""Where another file begins: the first bytes of every container that is known, at a place or anywhere in a range."""

from mmlm_fast.audio.statement import Bytes

WTV = bytes.fromhex("b7d800203749da11a64e0007e95ead8d")
ASF = bytes.fromhex("3026b2758e66cf11")
EBML = b"\x1a\x45\xdf\xa3"
NUT = b"nut/multimedia container\0"
IRCAM = tuple(bytes((0x64, 0xA3, i, 0)) for i in range(1, 5)) + tuple(bytes((0, i, 0xA3, 0x64)) for i in range(1, 5))
_FIRST = (
    *(b".snd", b"dns.", b"caff", b"fLaC", b"OggS", b"riff\x2e\x91\xcf\x11", b"NIST_1A", b"2BIT", b"ALawSoundFile**"),
    *(b"Creative Voice File", b"MATLAB 5.0 MAT-file", b"Extended Instrument: ", b"PVF1\n", b" paf\0", b"fap \0"),
    *(b"TTA1", b"wvpk", b"MAC ", b".SoX", b"XoS.", b"FLV\x01", b".RMF", b"KVAG", b"#!AMR", NUT, WTV, ASF, EBML, *IRCAM),
)
_FORMS = (b"WAVE", b"AVI ", b"AIFF", b"AIFC", b"8SVX", b"16SV")
# Long enough not to be met by chance in a gigabyte of samples: bytes, how far behind the first one, and what that is.
_ANYWHERE = (
    (b"fLaC\0\0\0\x22", 0, b"fLaC"),
    (b"fLaC\x80\0\0\x22", 0, b"fLaC"),
    (b"OggS\0\x02", 0, b"OggS"),
    (b"caff\0\x01\0\0desc", 0, b"caff"),
    *((b"WAVE", 8, first) for first in (b"RIFF", b"RIFX", b"RF64", b"BW64")),
    (b"AIFF", 8, b"FORM"),
    (b"AIFC", 8, b"FORM"),
)


def begins(data: Bytes, place: int) -> bool:
    """Whether a file of a known container begins at a place."""
    head = data.at(place, 40)
    if head.startswith(_FIRST):
        return True
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM"):
        return head[8:12] in _FORMS
    if head[:2] == b"\x80\0":  # CRI ADX
        offset = int.from_bytes(head[2:4], "big")
        return data.at(place + offset - 2, 6) == b"(c)CRI"
    is_dump = head[:2] == b"\xf0\x7e" and head[3:4] == b"\x01"
    return head[4:8] == b"ftyp" or head[20:31] == b"samplerate\0" or head[20:24] == b"vs12" or is_dump


def first_within(held: bytes, begin: int = 0) -> int:
    """Where a file begins in bytes that are not known to end there; -1 where none does."""
    found = -1
    for seen, offset, first in _ANYWHERE:  # a regular expression for all of them takes thirty times as long
        end = found + offset + len(seen) if found >= 0 else len(held)
        place = held.find(seen, begin + offset, end)
        while place >= 0 and held[place - offset : place - offset + 4] != first:
            place = held.find(seen, place + 1, end)
        if place >= 0:
            found = place - offset
    return found


def repeated(data: Bytes, head: bytes) -> int:
    """Where the file's first bytes are met a second time, or another file begins; -1 where neither is."""
    block, seen = 1 << 22, 1
    while len(held := data.at(seen, block + 64)) > 8:
        places = [place for place in (held.find(head), first_within(held)) if place >= 0]
        if places:
            return seen + min(places)
        seen += block
    return -1
