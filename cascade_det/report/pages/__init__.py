"""Self-contained HTML pages: of an evaluation, of a calibration, of two runs side by side."""
