"""The peak memory of tensors, counted byte by byte: the same on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(TorchDispatchMode):
    """Counts what operations allocate while it is entered, not what was there before.

    Not counted is what a kernel allocates for itself. Outside of inference mode, where PyTorch
    leaves compound operations whole.

    Attributes:
        peak: largest number of bytes that lived at one time.
    """

    def __init__(self):
        super().__init__()
        self.peak = self.now = 0
        self._known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = [x.untyped_storage() for x in _tensors((args, kwargs or {}))]
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor.untyped_storage(), before)
        return result

    def _see(self, storage, before):
        if id(storage) in self._known or any(storage is known for known in before):
            return
        key, size = id(storage), storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._forget, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key, size):
        del self._known[key]
        self.now -= size


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in _tensors(part)] if isinstance(value, (list, tuple)) else []


def peak_bytes(call):
    """The peak of ``call()``, without gradients."""
    with torch.no_grad(), MemoryMeter() as meter:
        call()
    return meter.peak
