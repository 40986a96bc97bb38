"""Packaging of ``cascade_det``; the settings of the tools are in ``pyproject.toml``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "cascade_det/__init__.py").read_text())[1]

# Lower bounds are versions that the tests were run with, and nothing is pinned.
REQUIREMENTS = [
    # Before 2.6 a crafted file could run code in spite of weights_only=True (CVE-2025-32434).
    "torch>=2.6",
    "torchvision>=0.21",
    "fvcore>=0.1.5.post20221221",
    "yacs>=0.1.8",
    "PyYAML>=6.0",
    "pycocotools>=2.0.7",
    # The same `import cv2` as opencv-python, without its need for libGL and X11 on the machine.
    "opencv-python-headless>=4.8",
    "numpy>=1.26",
    "scipy>=1.11",
    "Pillow>=11.0",
    "tqdm>=4.66",
    "filelock>=3.12",
    "tabulate>=0.9",
    "matplotlib>=3.8",
]
EXTRAS = {
    "tensorboard": ["tensorboard>=2.14"],
    "safetensors": ["safetensors>=0.4.3"],
    "export": ["onnx>=1.23", "onnxruntime>=1.31"],
    "test": ["pytest>=8.2", "pytest-cov>=5.0", "pytest-xdist>=3.5", "hypothesis>=6.100"],
    "lint": ["ruff>=0.17", "mypy>=2.0", "codespell>=2.3", "pre-commit>=4.0"],
}
EXTRAS["all"] = EXTRAS["tensorboard"] + EXTRAS["safetensors"] + EXTRAS["export"]
EXTRAS["dev"] = EXTRAS["all"] + EXTRAS["test"] + EXTRAS["lint"]

setup(
    name="cascade_det",
    version=VERSION,
    description="Cascade R-CNN with early exits, on its own or inside Detectron2",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["cascade_det", "cascade_det.*"]),
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
