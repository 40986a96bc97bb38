"""What the terminal shows while predict runs."""

import io
import sys

from cascade_det.commands import progress
from cascade_det.streams.pipeline import PartTimes


class Terminal(io.StringIO):
    def isatty(self):
        return True


def metrics():
    """As of an ExitEvaluator after some images."""
    rates = {"proposals": 0.25, "stage0": 0.5, "stage1": 1 / 3, "stage2": 0.0}
    return {"exits": {"stages_per_region": 1.5, **{k: {"exit_rate": x} for k, x in rates.items()}}}


def shown(exits, monkeypatch, terminal):
    monkeypatch.setattr(progress, "_PERIOD", 0)
    monkeypatch.setattr(sys, "stderr", terminal)
    times = PartTimes()
    with progress.Progress(3, times, exits) as line:
        for _ in range(3):
            with times.part("read"), times.part("detect"):
                pass
            line.step()
    return line.summary


def test_rates_and_parts_are_shown_on_a_terminal(monkeypatch):
    terminal = Terminal()
    summary = shown(metrics, monkeypatch, terminal)
    for text in (summary, terminal.getvalue()):
        assert "ms per image: " in text
        assert "read 0." in text
        assert "exits: 25% before stage 0, 50% after 0, 33% after 1" in text
        # All regions leave after the last stage.
        assert "after 2" not in text
    assert " images/s; ms" in summary
    assert "3/3" in terminal.getvalue()


def test_tiles_that_a_gate_leaves_out(monkeypatch):
    exits = metrics()["exits"] | {"tiles": {"open_share": 0.1, "computed_share": 0.35}}
    summary = shown(lambda: {"exits": exits}, monkeypatch, io.StringIO())
    assert "exits: 65% of the tiles, 25% before stage 0" in summary


def test_elsewhere_only_the_summary_is(monkeypatch):
    written = io.StringIO()
    summary = shown(None, monkeypatch, written)
    assert written.getvalue() == ""
    assert "exits" not in summary
