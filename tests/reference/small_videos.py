"""Videos of grey frames that tests make."""

from fractions import Fraction

import numpy as np

GREY_STEP = 10


def make_video(path, frames=10, size=(48, 64), *, codec="mpeg4", rate=10, sound=None, times=None):
    """Frame i has the grey of 10 i, from 0 again after 240.

    Args:
        path: its ending chooses the format.
        frames: their number.
        size: height and width.
        codec: of the pictures.
        rate: frames per second.
        sound: a codec for a tone of 440 Hz as long as the pictures.
        times: of all frames, milliseconds; by default they come from the rate.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        voice = container.add_stream(sound, rate=44100, layout="mono") if sound else None
        for number in range(frames):
            pixels = np.full((*size, 3), GREY_STEP * number % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="bgr24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice is not None:
            _sing(container, voice, 44100 * frames // rate)


def _sing(container, voice, samples):
    import av

    wave = np.sin(2 * np.pi * 440 / 44100 * np.arange(samples))
    for start in range(0, samples, 1024):
        part = wave[None, start : start + 1024]
        planar = voice.codec_context.format.name == "fltp"
        values = part.astype(np.float32) if planar else (30000 * part).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(
            values, format="fltp" if planar else "s16", layout="mono"
        )
        frame.rate, frame.pts = 44100, start
        container.mux(voice.encode(frame))
    container.mux(voice.encode(None))
