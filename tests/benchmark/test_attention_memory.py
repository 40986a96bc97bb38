"""Attention in token groups beside plain attention: the measurement and its table."""

import functools
import json
import pickle

import pytest

from cascade_det.benchmark import attention_memory, run
from cascade_det.commands import benchmark


def test_plain_attention_and_groups_are_measured_and_shown(monkeypatch, tmp_path, capsys):
    """On few tokens; memory would be that of new processes, to which cases must be sent."""
    sizes = iter([8, 2, 16, 4])

    def known(build, **_):
        pickle.loads(pickle.dumps(build))()()
        return {"above_model": next(sizes) * 2**20}

    monkeypatch.setattr(attention_memory, "peak_memory", known)
    small = functools.partial(attention_memory.compare_attention, tokens=(48,), groups=(4,))
    monkeypatch.setattr(run, "compare_attention", small)
    arguments = ["--measure", "attention", "--contenders", "torchvision", "--rounds", "1"]
    assert benchmark.main([*arguments, "--size", "64", "96", "--output", str(tmp_path)]) == 0

    entries = json.loads((tmp_path / "benchmark.json").read_text())["attention"]
    cases = [(entry["scores"], entry["groups"]) for entry in entries]
    assert cases == [("stored", 1), ("stored", 4), ("fused", 1), ("fused", 4)]
    assert [entry["of_bytes"] for entry in entries] == [1, 0.25, 1, 0.25]
    assert [entry["of_scores"] for entry in entries] == pytest.approx([1, 1 / 3, 1, 1 / 3])
    assert all(entry["ms"]["median"] > 0 for entry in entries)
    shown = capsys.readouterr().out
    [row] = [line for line in shown.splitlines() if line.startswith("| stored") and " 4 " in line]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:6] == ["stored", "48", "4", "2.0", "0.250", "0.333"]
