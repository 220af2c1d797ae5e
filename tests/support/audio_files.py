"""Audio files for tests: by libsndfile, by FFmpeg, and WAV by hand."""

import io
import struct
from fractions import Fraction

import numpy as np


def by_soundfile(samples, rate=16000, **settings):
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, samples, rate, **settings)
    return out.getvalue()


def by_av(path, codec, samples, rate=16000, format=None, layout="mono", sample_format=None, **options):
    """Encode float samples ``[n]`` or ``[channels, n]``; the container by `format` or the path's extension."""
    import av

    samples = np.atleast_2d(np.asarray(samples, np.float32))
    with av.open(str(path), "w", format=format, options=options) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        if sample_format is not None:
            stream.codec_context.format = sample_format
        size = stream.codec_context.frame_size or 1024
        convert = av.AudioResampler(
            format=stream.codec_context.format, layout=stream.layout, rate=rate, frame_size=size
        )
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T).reshape(1, -1), format="flt", layout=layout)
        frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in (*convert.resample(frame), *convert.resample(None), None):
            file.mux(stream.encode(part))
    return path


def pcm_format(channels=1, rate=16000, bits=16, order="<", kind=1):
    width = channels * bits // 8
    return b"fmt ", struct.pack(order + "HHIIHH", kind, channels, rate, rate * width, width, bits)


def wav(*chunks, magic=b"RIFF", order="<", size=None):
    """A RIFF file of (name, content) chunks."""
    body = b"".join(n + struct.pack(order + "I", len(c)) + c + b"\0" * (len(c) % 2) for n, c in chunks)
    return magic + struct.pack(order + "I", 4 + len(body) if size is None else size) + b"WAVE" + body
