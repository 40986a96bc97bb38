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


class _LimitedStep:
    """A step that runs out of memory above a number of images, and waits for no other process."""

    def __init__(self, most):
        self.most = most
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    def run(self, batch, iteration):
        assert distributed.world_size() == 1
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def find_batch(folder):
    """Process 0 has memory for 9 images, process 1 for 5; writes the size that they agree on."""
    from cascade_det import config
    from cascade_det.engine import automatic_batch
    from cascade_det.errors import ConfigError

    automatic_batch.resolve_device = lambda cfg: torch.device("cuda")
    cfg = config.changed(config.get_cfg(), "SOLVER.IMS_PER_BATCH", 0)
    batches = [[{"image": torch.zeros(3, 4, 4)}]]
    most = (9, 5)[distributed.rank()]
    found = automatic_batch.with_batch_size(
        cfg, lambda _: (_LimitedStep(most), batches), resume=False
    )
    synchronised = config.changed(cfg, "MODEL.FPN.NORM", "SyncBN")
    try:
        automatic_batch.with_batch_size(synchronised, None, resume=False)
    except ConfigError as error:
        (folder / f"rank{distributed.rank()}").write_text(f"{found.SOLVER.IMS_PER_BATCH} {error}")
    return 0
