"""What ``tools/train_net.py`` asks of this host; ``cascade_det.d2`` has the same."""

from cascade_det.config import check_config, load_config
from cascade_det.standalone.evaluate import evaluate
from cascade_det.standalone.train import replay_batch, train

__all__ = ["check_config", "evaluate", "join", "load_config", "replay_batch", "train"]


def join() -> None:
    """Nothing: the engine knows of the processes that train together."""
