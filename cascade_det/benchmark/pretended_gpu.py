"""A GPU that is not there: tensors that say ``cuda:0``, with numbers in the memory of the CPU.

``PretendedGPU`` counts where a GPU would make the CPU wait, and the operations that it would be
sent. An operation on tensors of two devices fails, as on a GPU.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cascade_det.core import PartTimer
from cascade_det.core.structures.on_device import device_constant
from cascade_det.layers import gpu_kernels
from cascade_det.layers.cudnn_fused import has_fused

Moved = TypeVar("Moved", bound=Tensor | nn.Module)
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# Their results have a size that only the GPU knows, or are numbers for the CPU.
SIZED_BY_VALUES = re.compile(
    r"_local_scalar_dense|nonzero|masked_select|repeat_interleave|_?unique.*|equal|nms"
)
# They move no number.
ONLY_MEMORY = re.compile(r"(new_)?empty.*|_local_scalar_dense|_unsafe_view|lift_fresh|is_.*|set_")


def _convolved_relu(x: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
    return F.conv2d(x, weight, bias, *geometry).relu_()


def _added_relu(
    x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any
) -> Tensor:
    return F.conv2d(x, weight, bias, *geometry).add_(z, alpha=alpha).relu_()


# Operations that CPUs lack.
OF_GPUS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cudnn_convolution_relu.default: _convolved_relu,
    torch.ops.aten.cudnn_convolution_add_relu.default: _added_relu,
}


class GPUTensor(Tensor):
    """A tensor whose numbers are in ``held``, an ordinary tensor.

    To PyTorch's C++ it is a tensor without memory (``meta``), so that no kernel and no autograd
    engine asks for a GPU; Python code sees ``cuda:0``.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    held: Tensor

    @staticmethod
    def __new__(cls: type[GPUTensor], held: Tensor, requires_grad: bool = False) -> GPUTensor:
        """A tensor with the numbers, shape and strides of ``held``."""
        with _disable_current_modes():
            shell = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
            tensor = Tensor._make_subclass(cls, shell, requires_grad)
        tensor.held = held
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """``cuda:0``."""
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True."""
        return True

    def tolist(self) -> list[Any]:
        """The numbers, for which the CPU waits."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Numbers of the CPU, sent to the GPU."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def unsqueeze_(self, dim: int) -> Tensor:
        """A view: the shape of the shell cannot change."""
        return self.unsqueeze(dim)

    def numpy(self) -> Any:  # type: ignore[override]
        """Fails, as on a GPU."""
        raise AssertionError("numpy() of a tensor on the GPU")

    def __repr__(self) -> str:  # type: ignore[override]
        """The numbers."""
        return f"GPUTensor({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Never called: a ``PretendedGPU`` handles all operations."""
        raise AssertionError(f"{function} of a pretended tensor outside of its PretendedGPU")


class PretendedGPU(TorchDispatchMode):
    """Within this context there is a GPU; modules and tensors get there by ``move``.

    It has instructions for bfloat16. The counts are those of torchvision's kernels.

    Attributes:
        waits: how often the CPU waited: by kind, and by line of the package.
        launches: operations that were sent; views and allocations are none.
        parts: waits but NMS, waits of NMS and launches by the name of a ``part``, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._part = "rest"
        self._patches: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.waits: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.launches = 0
        self.parts: dict[str, Counter[str]] = {}

    @property
    def waits_but_nms(self) -> int:
        """Of all kinds but torchvision's NMS, which is called for every image."""
        return self.waits.total() - self.waits["nms"]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as that of a part, and not as that of a part around it."""
        outer, self._part = self._part, name
        yield
        self._part = outer

    def move(self, part: Moved) -> Moved:
        """A tensor on the GPU; a module with all parameters and buffers there, changed in place."""
        if isinstance(part, Tensor):
            return cast(Any, GPUTensor(part))
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        for module in part.modules():
            both: tuple[dict[str, Any], ...] = module._parameters, module._buffers
            for tensors in both:
                for name, tensor in tensors.items():
                    if tensor is None or isinstance(tensor, GPUTensor):
                        continue
                    if id(tensor) not in moved:
                        copy = GPUTensor(tensor.detach().clone(), tensor.requires_grad)
                        copy._is_param = tensors is module._parameters
                        moved[id(tensor)] = tensor, copy
                    tensors[name] = moved[id(tensor)][1]
        return part

    def __enter__(self) -> PretendedGPU:
        device_constant.cache_clear()
        has_fused.cache_clear()
        self._patches = [
            mock.patch("torch.cuda._lazy_init"),
            mock.patch("torch.cuda.device", side_effect=nullcontext),
            mock.patch("torch.cuda.is_bf16_supported", return_value=True),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
            mock.patch("torch.cuda.synchronize", self._synchronize),
            # Operations of the package do there what their kernels in Triton do on a GPU.
            mock.patch.object(gpu_kernels, "has_triton", lambda device: device.type == "cuda"),
        ]
        for patch in self._patches:
            patch.start()
        # As torch's FakeTensorMode does: torch.tensor(device="cuda") begins on the CPU.
        self._lifts_on_the_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        # Module.to() would assign to the data of parameters, which leaves ``held`` as it was.
        self._overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrites)
        torch._C._set_only_lift_cpu_tensors(self._lifts_on_the_cpu)
        for patch in self._patches:
            patch.stop()
        device_constant.cache_clear()
        has_fused.cache_clear()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the numbers, and count it if it is one of the GPU."""
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        _map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        here = [x for x in tensors if isinstance(x, GPUTensor)]
        target = kwargs.get("device")
        if kwargs.get("pin_memory"):  # memory of the CPU that a GPU reads by itself
            pinned: Any = function(*args, **{**kwargs, "pin_memory": False})
            pinned.is_pretended_pinned = True
            return pinned
        if not here and (target is None or _is_cpu(target)):
            return function(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            with self._again():  # Inference mode leaves compound functions whole.
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
        if name == "_to_copy" and here and target is not None and not _is_cpu(target):
            # Its C++ device is another one: on a GPU there is no copy, unless something changes.
            same = kwargs.get("dtype") in (None, args[0].dtype)
            if same and kwargs.get("memory_format") in (None, torch.preserve_format):
                function, kwargs = torch.ops.aten.alias.default, {}
        if not function.is_view and not ONLY_MEMORY.fullmatch(name):
            self.launches += 1
            self._of_part["launches"] += 1
        stays = not _is_cpu(target) if target is not None else bool(here)
        return self._run(function, args, kwargs, here, stays)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """This mode, within an operation that it handles."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def _run(
        self, function: Any, args: Any, kwargs: Any, here: Sequence[GPUTensor], stays: bool
    ) -> Any:
        def held(x: Any) -> Any:
            if isinstance(x, torch.device):
                return CPU
            return x.held if isinstance(x, GPUTensor) else x

        function = OF_GPUS.get(function, function)
        result = function(*_map(held, args), **_map(held, kwargs))
        wrappers = {id(x.held): x for x in here}  # an operation in place returns its argument

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if not stays:
                return x.clone() if id(x) in wrappers else x
            return wrappers[id(x)] if id(x) in wrappers else GPUTensor(x)

        return _map(wrapped, result)

    def _count(self, name: str, args: Any, kwargs: Any, elsewhere: Sequence[Tensor]) -> None:
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

    def _count_copy(self, name: str, args: Any, kwargs: Any) -> None:
        was, target = (args[1], args[0]) if name == "copy_" else (args[0], kwargs.get("device"))
        from_gpu = isinstance(was, GPUTensor)
        if isinstance(target, Tensor):
            # A single number of the CPU is an argument of a kernel.
            to_gpu = isinstance(target, GPUTensor) and (from_gpu or was.dim() > 0)
        else:
            to_gpu = from_gpu if target is None else not _is_cpu(target)
        # From memory that is not pinned, a copy waits in any case; PyTorch pins what it copies to.
        asynchronous = from_gpu or hasattr(was, "is_pretended_pinned")
        if from_gpu != to_gpu and not (kwargs.get("non_blocking") and asynchronous):
            self._wait("to the GPU" if to_gpu else "to the CPU")

    def _synchronize(self, *_: object) -> None:
        self._wait("synchronize")

    def _wait(self, kind: str, times: int = 1) -> None:
        if times:
            self.waits[kind] += times
            self._of_part["nms" if kind == "nms" else "waits"] += times
            frame: Any = sys._getframe(1)
            while frame.f_back and not _is_ours(frame.f_code.co_filename):
                frame = frame.f_back
            name = frame.f_code.co_filename.split("/")[-1]
            self.places[f"{kind}: {name}:{frame.f_lineno}"] += times

    @property
    def _of_part(self) -> Counter[str]:
        return self.parts.setdefault(self._part, Counter())


class PartCounter(PartTimer):
    """A timer that counts the waits and launches of parts instead of their milliseconds."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as that of part ``name``."""
        with self._gpu.part(name):
            yield


def _is_ours(file: str) -> bool:
    return "/cascade_det/" in file and file != __file__


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """PyTorch's own maps of nested values take longer than the operations of small detectors."""
    if isinstance(value, (list, tuple)):
        return type(value)([_map(change, x) for x in value])
    if isinstance(value, dict):
        return {name: _map(change, x) for name, x in value.items()}
    return change(value)


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"
