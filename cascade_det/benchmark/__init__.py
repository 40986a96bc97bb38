"""Detectors compared side by side: same weights, same images, one process, taking turns.

The command is ``cascade-det benchmark``. ``options`` holds what to measure, ``setup`` what all
models share, ``models`` opens them by name, ``run`` measures, ``report`` and ``picture`` show the
results. The rest of the package imports nothing from here.
"""
