"""Detectors side by side: same weights, same images, one process, runs in turn.

``tools/benchmark.py`` is its command. ``options`` says what is measured, ``setup`` has what all
contenders share, ``contenders`` opens them by name, ``run`` measures, ``report`` and ``picture``
show it. Nothing here is imported by the rest of the package.
"""
