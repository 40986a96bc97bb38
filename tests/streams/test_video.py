"""Videos that are read and written, against what was put into them."""

from pathlib import Path

import numpy as np
import pytest
from small_videos import GREY_STEP, make_video

from cascade_det.errors import ConfigError, DatasetError
from cascade_det.streams.frames import BadFrame, Frame
from cascade_det.streams.video import VideoSource, is_stream_address
from cascade_det.streams.video_file import VideoFile, add_sound, has_sound

av = pytest.importorskip("av")


def greys(frames):
    return [round(float(frame.pixels.mean()) / GREY_STEP) for frame in frames]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.mov", "libx264"), ("a.mkv", "libx264")),
        ("a.webm", "libvpx-vp9"),
    ],
)
def test_all_frames_come_once_and_in_order(tmp_path, name, codec):
    make_video(tmp_path / name, codec=codec)
    source = VideoSource(tmp_path / name)
    frames = list(source.frames())
    assert [frame.number for frame in frames] == list(range(10))
    assert greys(frames) == list(range(10))
    np.testing.assert_allclose([f.seconds for f in frames], np.arange(10) / 10, atol=2e-3)
    assert {frame.pixels.shape for frame in frames} == {(48, 64, 3)}
    assert frames[3].name == f"{tmp_path / name}#3"
    assert source.rate == 10


def test_times_of_a_variable_rate_are_kept(tmp_path):
    times = [0, 10, 50, 90, 300, 310, 1000, 1001, 1500, 2600]
    make_video(tmp_path / "a.mkv", codec="libx264", times=times)
    frames = list(VideoSource(tmp_path / "a.mkv").frames())
    np.testing.assert_allclose([frame.seconds for frame in frames], np.array(times) / 1000)
    file = VideoFile(tmp_path / "b.mp4", 10)
    for frame in frames:
        file.add(frame.pixels, frame.seconds)
    file.close()
    again = list(VideoSource(tmp_path / "b.mp4").frames())
    np.testing.assert_allclose([f.seconds for f in again], np.array(times) / 1000, atol=1e-4)
    assert greys(again) == list(range(10))


def test_a_turned_video_is_upright(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:24, :32] = 250  # above, at the left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="bgr24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    upright = bytes.fromhex("00010000" + "00000000" * 3 + "00010000" + "00000000" * 3 + "40000000")
    # As a telephone that is held upright writes it: x' = -y, y' = x, a quarter clockwise.
    turned = bytes.fromhex("000000000001000000000000ffff0000" + "00000000" * 4 + "40000000")
    at = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    (frame,) = VideoSource(path).frames()
    assert frame.pixels.shape == (64, 48, 3)
    assert frame.pixels[4:28, 28:44].min() > 200  # above, at the right
    assert frame.pixels[36:].max() < 60
    assert frame.pixels[:, :20].max() < 60


def test_a_broken_frame_is_told_and_the_others_come(tmp_path):
    path = tmp_path / "a.avi"
    make_video(path, codec="mjpeg")
    content = bytearray(path.read_bytes())
    at = [i for i in range(len(content)) if content[i : i + 4] == b"00dc"][3]
    size = int.from_bytes(content[at + 4 : at + 8], "little")
    content[at + 8 : at + 8 + size] = bytes(size)
    path.write_bytes(content)
    frames = list(VideoSource(path).frames())
    (bad,) = (frame for frame in frames if isinstance(frame, BadFrame))
    assert (bad.number, bad.reason) == (frames.index(bad), "the frame is broken")
    good = [frame for frame in frames if isinstance(frame, Frame)]
    assert len(good) == 9
    assert [f.number for f in frames] == list(range(10))
    assert greys(good) == [n for n in range(10) if n != bad.number]


@pytest.mark.parametrize("sound", [None, "aac"])
def test_a_file_that_is_cut_off_is_told(tmp_path, sound):
    name = "a.mkv"
    make_video(tmp_path / name, frames=40, codec="mjpeg", sound=sound)
    content = (tmp_path / name).read_bytes()
    assert len(list(VideoSource(tmp_path / name).frames())) == 40
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    *frames, last = VideoSource(tmp_path / name).frames()
    assert 10 < len(frames) < 30
    assert last.number is None
    assert last.reason.endswith("of 4.0 s: it is cut off")


def test_what_is_no_video_is_told(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video" * 100)
    (bad,) = VideoSource(path).frames()
    assert bad.reason.startswith("cannot be opened as a video")
    make_video(path)
    path.write_bytes(path.read_bytes()[:600])
    (bad,) = VideoSource(path).frames()
    assert bad.reason.startswith("cannot be opened as a video")
    with av.open(str(path), "w") as container:
        container.add_stream("aac", rate=44100)
    (bad,) = VideoSource(path).frames()
    assert "video" in bad.reason


def test_sound_is_copied_as_long_as_the_pictures(tmp_path):
    make_video(tmp_path / "a.mp4", frames=20, sound="aac")
    source = VideoSource(tmp_path / "a.mp4")
    assert has_sound(source)

    def copied(count):
        file = VideoFile(tmp_path / "silent.mp4", source.rate)
        for frame in list(source.frames())[:count]:
            file.add(frame.pixels, frame.seconds)
        file.close()
        add_sound(tmp_path / "silent.mp4", source, tmp_path / "b.mp4")
        return packets(tmp_path / "b.mp4")

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(p) for p in container.demux(audio=0) if p.size]

    original = packets(tmp_path / "a.mp4")
    assert copied(20) == original
    half = copied(10)
    assert half == original[: len(half)]
    assert abs(len(half) - 44100 / 1024) <= 2
    assert not has_sound(VideoSource(tmp_path / "silent.mp4"))


def test_sound_that_an_mp4_cannot_hold_is_told(tmp_path):
    make_video(tmp_path / "a.avi", sound="pcm_mulaw")
    make_video(tmp_path / "silent.mp4")
    with pytest.raises(DatasetError, match="an mp4 file cannot hold it"):
        add_sound(tmp_path / "silent.mp4", VideoSource(tmp_path / "a.avi"), tmp_path / "b.mp4")


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("12:30")
    folder.mkdir()
    make_video(tmp_path / "a.mp4", sound="aac")
    source = VideoSource(tmp_path / "a.mp4")
    file = VideoFile(folder / "silent.mp4", source.rate)
    for frame in source.frames():
        file.add(frame.pixels, frame.seconds)
    file.close()
    add_sound(folder / "silent.mp4", source, folder / "b.mp4")
    assert has_sound(VideoSource(folder / "b.mp4"))


def test_odd_sides_and_sizes_that_change(tmp_path):
    file = VideoFile(tmp_path / "a.mp4", 30)
    for number, size in enumerate([(47, 63), (47, 63), (80, 20)]):
        file.add(np.full((*size, 3), 100, np.uint8), number / 30)
    file.close()
    frames = list(VideoSource(tmp_path / "a.mp4").frames())
    assert [frame.pixels.shape for frame in frames] == [(48, 64, 3)] * 3
    assert all(abs(frame.pixels.astype(int) - 100).max() < 5 for frame in frames)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"PyAV.*cascade_det\[video\]"):
        VideoSource(Path("a.mp4"))


@pytest.mark.parametrize(
    ("address", "is_video"),
    [
        *(("rtsp://camera/1", True), ("http://a/clip.MP4?x=1", True), ("https://a/x.m3u8", True)),
        *(("video+http://a/live", True), ("http://a/photo.jpg", False), ("http://a/x", False)),
        *(("video+file:///etc/passwd", False), ("file:///a.mp4", False), ("a.mp4", False)),
    ],
)
def test_addresses_of_videos(address, is_video):
    assert is_stream_address(address) is is_video
