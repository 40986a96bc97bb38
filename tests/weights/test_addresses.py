"""Names of weights on the web: where they lead, and where they are kept."""

import hashlib
import io
import logging

import pytest
import torch
from torch import nn

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.errors import CheckpointError
from cascade_det.weights import addresses as weight_addresses
from cascade_det.weights import load_weights, read_weights_file
from cascade_det.weights.addresses import SUFFIXES, local_path
from tests.reference.web_server import Fault, serving

ZOO = "COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl"


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch):
    """What would be downloaded."""
    calls = []

    def note(address, path, *, sha256):
        calls.append((address, path, sha256))

    monkeypatch.setattr(weight_addresses, "download", note)
    return calls


def pth(weights):
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "address", "kept", "sha256"),
    [
        (
            "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
            "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl",
            "detectron2/ImageNetPretrained/MSRA/R-50.pkl",
            "",
        ),
        (
            f"detectron2://{ZOO}",
            f"https://dl.fbaipublicfiles.com/detectron2/{ZOO}",
            f"detectron2/{ZOO}",
            "",
        ),
        (
            "torchvision://ResNet50_Weights.IMAGENET1K_V2",
            "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
            "download.pytorch.org/models/resnet50-11ad3fa6.pth",
            "11ad3fa6",
        ),
        ("HTTPS://h:81/a/b.PTH", "https://h:81/a/b.PTH", "h:81/a/b.PTH", ""),
        ("http://h/w.safetensors", "http://h/w.safetensors", "h/w.safetensors", ""),
        ("http://h/w.pt#sha256=0123456789", "http://h/w.pt", "h/w.pt", "0123456789"),
        ("http://h/w.pt#sha256=DECADE01", "http://h/w.pt", "h/w.pt", "decade01"),
        # Eight digits of a checksum, of a date, and of both kinds of letters.
        ("http://h/w-43635321.pth", "http://h/w-43635321.pth", "h/w-43635321.pth", "43635321"),
        ("http://h/w-20231105.pth", "http://h/w-20231105.pth", "h/w-20231105.pth", ""),
        ("http://h/w-decade.pth", "http://h/w-decade.pth", "h/w-decade.pth", ""),
        ("http://h/w%20x.pth", "http://h/w%20x.pth", "h/w x.pth", ""),
        ("http://me:key@h/w.pth", "http://me:key@h/w.pth", "h/w.pth", ""),
    ],
)
def test_where_names_lead(asked, cache, name, address, kept, sha256):
    assert local_path(name) == cache / kept
    [(asked_address, path, digits)] = asked
    assert asked_address.lower() == address.lower()
    assert (path, digits) == (cache / kept, sha256)


def test_detectron2_keeps_its_files_where_we_look(asked, cache):
    handlers = pytest.importorskip("iopath.common.file_io")
    name = "ImageNetPretrained/MSRA/R-50.pkl"
    address = f"https://dl.fbaipublicfiles.com/detectron2/{name}"
    kept = local_path(f"detectron2://{name}")
    kept.parent.mkdir(parents=True)
    kept.write_text("weights")
    assert handlers.HTTPURLHandler()._get_local_path(address) == str(kept)
    assert local_path(address) == kept


def test_addresses_that_differ_in_the_query_are_kept_apart(asked):
    kept = {local_path(f"http://h/get.pth{query}") for query in ("", "?id=1", "?id=2")}
    assert len(kept) == 3
    assert {path.name for path in kept} == {"get.pth"}


def test_the_cache_of_the_home_folder(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", None):
        monkeypatch.delenv("FVCORE_CACHE") if value is None else monkeypatch.setenv(
            "FVCORE_CACHE", value
        )
        assert local_path("http://h/a.pth") == tmp_path / ".torch/iopath_cache/h/a.pth"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ftp://h/a.pth", "http://, https://, detectron2:// or torchvision://"),
        ("file:///etc/a.pth", "http://, https://"),
        ("s3://bucket/a.pth", "http://, https://"),
        ("://a.pth", "not known"),
        ("https://h/a.zip", r"ends in \.pth, \.pt, \.pkl, \.safetensors"),
        ("https://h/", "ends in|not the address"),
        ("https:///a.pth", "not the address of a file"),
        ("https://../a.pth", "not the address of a file"),
        ("https://h/../../../a.pth", "not the address of a file"),
        ("https://h/%2e%2e/%2e%2e/a.pth", "not the address of a file"),
        ("https://h/..%2f..%2fa.pth", "not the address of a file"),
        ("detectron2://../../a.pkl", "not the address of a file"),
        ("https://h/a%00.pth", "not the address of a file"),
        ("https://h/a.pth#sha256=12", "8 to 64 hexadecimal digits, not 'sha256=12'"),
        ("https://h/a.pth#md5=0123456789", "after # comes sha256="),
        ("https://[h/a.pth", "Invalid IPv6"),
        (
            "torchvision://resnet50",
            "ResNet50_Weights.IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2",
        ),
        ("torchvision://ResNet50_Weights.V9", "it has ResNet50_Weights.IMAGENET1K_V1"),
        ("torchvision://nothing", "one is ResNet50_Weights.IMAGENET1K_V2"),
        ("torchvision://", "one is ResNet50_Weights.IMAGENET1K_V2"),
    ],
)
def test_names_that_lead_nowhere(asked, cache, name, wanted):
    with pytest.raises(CheckpointError, match=wanted) as caught:
        local_path(name)
    assert name in str(caught.value)
    assert asked == []


@pytest.mark.parametrize("name", ["", "/nowhere/a.pth", "~nobody/a.pth", "a\0.pth", "x" * 5000])
def test_files_that_are_not_there(name, asked):
    with pytest.raises(CheckpointError, match="no such file"):
        local_path(name)


def test_weights_of_an_address_load_once_into_a_model(web, cache, caplog):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    web.files["/zoo/w.pth"] = pth({"model": source.state_dict()})
    web.faults = [Fault(cut=300)]
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            report = load_weights(target, web.address("/zoo/w.pth"))
    torch.testing.assert_close(target.weight, source.weight, rtol=0, atol=0)
    assert report.file.path.is_file()
    assert cache in report.file.path.parents
    assert len(web.requests) == 2  # one that broke, and its rest
    assert "Downloading http://127.0.0.1" in caplog.text


def test_a_run_starts_from_an_address(web, tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    web.files["/w.pth"] = pth(source.state_dict())
    Checkpointer(target, tmp_path).resume_or_load(web.address("/w.pth"), resume=False)
    torch.testing.assert_close(target.weight, source.weight, rtol=0, atol=0)


def test_failures_say_what_to_do(web, cache):
    address = web.address("/gone.pth")
    with pytest.raises(CheckpointError) as caught:
        read_weights_file(address)
    message = str(caught.value)
    assert message.startswith(f"{address}: the server answers 404")
    assert "set MODEL.WEIGHTS to its path" in message
    assert str(cache) in message


def test_the_checksum_of_the_name_is_checked(web):
    content = pth({"w": torch.ones(2)})
    digest = hashlib.sha256(content).hexdigest()
    web.files = {f"/good-{digest[:8]}.pth": content, "/bad-0a1b2c3d.pth": content}
    assert read_weights_file(web.address(f"/good-{digest[:8]}.pth")).weights.keys() == {"w"}
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_weights_file(web.address("/bad-0a1b2c3d.pth"))
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_weights_file(web.address(f"/good-{digest[:8]}.pth?again#sha256=00000000"))


def test_a_file_in_the_cache_with_another_checksum_is_named(web, cache):
    web.files["/w.pth"] = pth({"w": torch.ones(2)})
    kept = local_path(web.address("/w.pth"))
    with pytest.raises(CheckpointError, match=rf"{kept}: its SHA-256 is .* Delete it"):
        local_path(web.address(f"/w.pth#sha256={'0' * 64}"))


def test_a_download_that_is_no_weights_can_be_deleted(web, cache):
    web.files["/w.pth"] = b"nothing of the kind"
    with pytest.raises(CheckpointError, match=r"cache.*w\.pth: cannot be read.*Delete it to"):
        read_weights_file(web.address("/w.pth"))


def test_all_kinds_that_are_fetched_are_read(tmp_path):
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"junk")
        with pytest.raises(CheckpointError, match="cannot be read as"):
            read_weights_file(path)
