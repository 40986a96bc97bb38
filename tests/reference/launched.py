"""What is launched in the tests of several processes; light to import, as each start imports it."""

import os
import signal

import torch
from torch import nn

from cascade_det.parallel import distributed


def work_together(folder, ground_truth):
    """See :func:`tests.reference.shared_work.work_together`."""
    from tests.reference import shared_work

    return shared_work.work_together(folder, ground_truth)


def die_in_training(folder):
    """Process 1 kills itself while process 0 waits for its gradients."""
    model = distributed.wrap(nn.Linear(2, 1))
    for step in range(3):
        model(torch.ones(1, 2)).sum().backward()
        (folder / f"rank{distributed.rank()}_step{step}").touch()
        if distributed.rank() == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return 0
