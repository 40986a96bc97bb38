"""What a process is given to build and run where its memory is measured."""

import os

import torch

MEGA = 10**6


def take(megabytes):
    """So much memory, touched."""
    return torch.ones(megabytes * MEGA, dtype=torch.uint8)


def holding(waste, model, run, path):
    """A run that takes and gives back ``run``, beside a model; building it takes more for a moment.

    It writes down how many threads it has.
    """
    take(waste)
    kept = take(model)

    def call():
        path.write_text(f"{torch.get_num_threads()}")
        return take(run), kept

    return call


def keeping(run):
    """Each run keeps what it took."""
    kept = []
    return lambda: kept.append(take(run))


def failing():
    """A run that raises."""
    raise ValueError("no such layer")


def killed():
    """A run that ends as one does for which the system has no memory."""
    return lambda: os._exit(9)
