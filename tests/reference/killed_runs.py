"""Runs in forked processes, where torch is loaded already and a kill is a kill."""

import multiprocessing
from pathlib import Path

import torch

FORK = multiprocessing.get_context("fork")


def start(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def finish(process):
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def quick_evaluation(cfg, detector, datasets, output_dir):
    """Figures that depend on all weights: what else an evaluation does is tested elsewhere."""
    values = [value.double().sum() for value in detector.state_dict().values()]
    return {"bbox": {"AP": float(torch.stack(values).sum())}}


def final_state(cfg):
    content = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    # How long an iteration took is no part of what has to be equal.
    history = content["trainer"].pop("history")
    content["losses"] = {k: v for k, v in history.items() if "time" not in k and "eta" not in k}
    return content
