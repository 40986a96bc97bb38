"""A GPU that is not there: tensors that say ``cuda:0``, with numbers in the memory of the CPU.

``PretendedGPU`` counts where a GPU would make the CPU wait, and the operations that it would be
sent. An operation on tensors of two devices fails, as on a GPU.
"""

import re
import sys
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cascade_det.core.structures.on_device import device_constant

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# Their results have a size that only the GPU knows, or are numbers for the CPU.
SIZED_BY_VALUES = re.compile(
    r"_local_scalar_dense|nonzero|masked_select|repeat_interleave|_?unique.*|equal|nms"
)
# They move no number.
ONLY_MEMORY = re.compile(r"(new_)?empty.*|_local_scalar_dense|_unsafe_view|lift_fresh|is_.*|set_")


class GPUTensor(torch.Tensor):
    """A tensor whose numbers are in ``held``, an ordinary tensor.

    To PyTorch's C++ it is a tensor without memory (``meta``), so that no kernel and no autograd
    engine asks for a GPU; Python code sees ``cuda:0``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        with _disable_current_modes():
            shell = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
            tensor = torch.Tensor._make_subclass(cls, shell, requires_grad)
        tensor.held = held
        return tensor

    @property
    def device(self):
        return CUDA

    @property
    def is_cuda(self):
        return True

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, *, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def numpy(self):
        raise AssertionError("numpy() of a tensor on the GPU")

    def __repr__(self):
        return f"GPUTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} of a pretended tensor outside of its PretendedGPU")


class PretendedGPU(TorchDispatchMode):
    """Within this context there is a GPU; modules and tensors get there by ``move``.

    Attributes:
        waits: how often the CPU waited: by kind, and by line of the package.
        launches: operations that were sent; views and allocations are none.
    """

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.waits, self.places, self.launches = Counter(), Counter(), 0

    @property
    def waits_but_nms(self):
        """Of all kinds but torchvision's NMS, which is called for every image."""
        return self.waits.total() - self.waits["nms"]

    def move(self, part):
        """A tensor on the GPU; a module with all parameters and buffers there, changed in place."""
        if isinstance(part, torch.Tensor):
            return GPUTensor(part)
        moved = {}
        for module in part.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or isinstance(tensor, GPUTensor):
                        continue
                    if id(tensor) not in moved:
                        copy = tensor.detach().clone()
                        moved[id(tensor)] = tensor, GPUTensor(copy, tensor.requires_grad)
                        moved[id(tensor)][1]._is_param = tensors is module._parameters
                    tensors[name] = moved[id(tensor)][1]
        return part

    def __enter__(self):
        device_constant.cache_clear()
        self._patches = (
            mock.patch("torch.cuda._lazy_init"),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
            mock.patch("torch.cuda.synchronize", self._synchronize),
        )
        for patch in self._patches:
            patch.start()
        # As torch's FakeTensorMode does: torch.tensor(device="cuda") begins on the CPU.
        self._lifts_on_the_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts_on_the_cpu)
        for patch in self._patches:
            patch.stop()
        device_constant.cache_clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = []
        _map(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, (args, kwargs))
        here = [x for x in tensors if isinstance(x, GPUTensor)]
        target = kwargs.get("device")
        if not here and (target is None or _is_cpu(target)):
            return function(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            with self:  # Inference mode leaves compound functions whole.
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = function._overloadpacket.__name__
        elsewhere = [x for x in tensors if not isinstance(x, GPUTensor)]
        moves = name in ("_to_copy", "copy_", "set_")
        if here and not moves:
            large = [tuple(x.shape) for x in elsewhere if x.dim() > 0]
            assert not large, f"{name} of tensors on the GPU and {large} on the CPU"
        self._count(name, args, kwargs, elsewhere)
        if not function.is_view and not ONLY_MEMORY.fullmatch(name):
            self.launches += 1
        if name == "_to_copy" and here and target is not None and not _is_cpu(target):
            # Its C++ device is another one: on a GPU there is no copy, unless something changes.
            same = kwargs.get("dtype") in (None, args[0].dtype)
            if same and kwargs.get("memory_format") in (None, torch.preserve_format):
                self.launches -= 1
                function, kwargs = torch.ops.aten.alias.default, {}
        stays = not _is_cpu(target) if target is not None else bool(here)
        return self._run(function, args, kwargs, here, stays)

    def _run(self, function, args, kwargs, here, stays):
        def held(x):
            if isinstance(x, torch.device):
                return CPU
            return x.held if isinstance(x, GPUTensor) else x

        result = function(*_map(held, args), **_map(held, kwargs))
        wrappers = {id(x.held): x for x in here}  # an operation in place returns its argument

        def wrapped(x):
            if not isinstance(x, torch.Tensor):
                return x
            if not stays:
                return x.clone() if id(x) in wrappers else x
            return wrappers[id(x)] if id(x) in wrappers else GPUTensor(x)

        return _map(wrapped, result)

    def _count(self, name, args, kwargs, elsewhere):
        if name in ("_to_copy", "copy_"):
            self._count_copy(name, args, kwargs)
        elif name in ("index", "_unsafe_index"):
            self._wait("mask", sum(i.dtype == torch.bool for i in args[1] if i is not None))
        elif "index_put" in name:
            masks = [i.dtype == torch.bool for i in args[1] if i is not None]
            # One number for a mask is masked_fill; for indices it is sent first.
            if args[2].numel() != 1:
                self._wait("mask", sum(masks))
            elif args[2].dim() == 0 and not all(masks):
                self._wait("to the GPU")
        elif name == "where":
            self._wait("to the GPU", len(elsewhere))  # PyTorch sends single numbers
        elif name == "bincount":
            self._wait(name, 2)  # for the smallest value and for the largest
        elif SIZED_BY_VALUES.fullmatch(name) and args[0].numel():
            self._wait(name)

    def _count_copy(self, name, args, kwargs):
        was, target = (args[1], args[0]) if name == "copy_" else (args[0], kwargs.get("device"))
        from_gpu = isinstance(was, GPUTensor)
        if isinstance(target, torch.Tensor):
            # A single number of the CPU is an argument of a kernel.
            to_gpu = isinstance(target, GPUTensor) and (from_gpu or was.dim() > 0)
        else:
            to_gpu = from_gpu if target is None else not _is_cpu(target)
        if from_gpu != to_gpu and not kwargs.get("non_blocking"):
            self._wait("to the GPU" if to_gpu else "to the CPU")

    def _synchronize(self, *_):
        self._wait("synchronize")

    def _wait(self, kind, times=1):
        if times:
            self.waits[kind] += times
            frame = sys._getframe(1)
            while frame.f_back and "/cascade_det/" not in frame.f_code.co_filename:
                frame = frame.f_back
            name = frame.f_code.co_filename.split("/")[-1]
            self.places[f"{kind}: {name}:{frame.f_lineno}"] += times


def _map(change, value):
    """PyTorch's own maps of nested values take longer than the operations of small detectors."""
    if isinstance(value, (list, tuple)):
        return type(value)([_map(change, x) for x in value])
    if isinstance(value, dict):
        return {name: _map(change, x) for name, x in value.items()}
    return change(value)


def _is_cpu(device):
    return device is not None and torch.device(device).type == "cpu"
