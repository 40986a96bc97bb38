"""The kernels in Triton without a GPU: interpreted, and compiled for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
COMPILER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def test_interpreted_kernels():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A function that compiles a kernel for a GPU and returns its assembly; pointers come first."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_kernel(kernel, types, constants, capability, warps):
        names = kernel.arg_names[: len(types)]
        signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
        # As of memory of PyTorch's and of a multiple of 16 channels.
        aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(types) if x != "fp32"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        target = GPUTarget("cuda", capability, 32)
        program = triton.compile(source, target=target, options=options)
        assert len(program.asm["cubin"]) > 1000
        return program.asm["ptx"]

    return compile_kernel


needs_compiler = pytest.mark.skipif(not COMPILER.exists(), reason="Triton comes without ptxas")


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "dtype"), [(75, "fp32"), (80, "fp32"), (80, "fp64"), (90, "fp32")]
)
def test_nms_compiles(compiled, capability, dtype):
    from cascade_det.layers.triton_nms import TILE, WARPS, nms_kernel

    types = [f"*{dtype}", "*i64", "*i8", "fp32"]
    program = compiled(nms_kernel, types, {"TILE": TILE}, capability, WARPS)
    assert "fma" not in program  # else an overlap rounds otherwise than on a CPU


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "dtype"), [(75, "fp16"), (80, "fp16"), (80, "fp32"), (90, "bf16")]
)
def test_roi_align_compiles(compiled, capability, dtype):
    from cascade_det.layers.triton_roi_align import roi_align_kernel

    constants = {
        "LEVELS": 4,
        "MIN_LEVEL": 2,
        "CANONICAL_LEVEL": 4,
        "CANONICAL_SIZE": 224,
        "BINS": 7,
        "RATIO": 0,
        "ALIGNED": True,
        "BLOCK": 256,
    }
    types = [f"*{dtype}", "*fp32", *["*i64"] * 3, f"*{dtype}", "i32"]
    program = compiled(roi_align_kernel, types, constants, capability, 1)
    assert "fma" not in program
    # Every thread reads and writes 16 bytes at a time.
    assert "ld.global.v4.b32" in program
    assert "st.global.v4.b32" in program
