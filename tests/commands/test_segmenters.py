"""What commands say to the configuration of a segmenter."""

import pytest
from PIL import Image

from cascade_det.commands.main import main

SHAPES = ("--config-file", "cascade_det://quick_schedules/segment_shapes.yaml")


@pytest.mark.parametrize(
    "command",
    [
        ("export", "--output", "{folder}/out"),
        ("benchmark", "--output", "{folder}/out"),
    ],
    ids=lambda command: command[0],
)
def test_commands_for_detectors_say_so(command, tmp_path, capsys, caplog):
    (tmp_path / "weights.pth").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    name, *options = (word.format(folder=tmp_path) for word in command)
    assert main([name, *SHAPES, *options, "MODEL.WEIGHTS", str(tmp_path / "weights.pth")]) == 1
    said = capsys.readouterr().err + caplog.text
    assert "META_ARCHITECTURE is 'SemanticSegmentor', but this is for detectors" in said
