"""Packaging of dr2net_d2; exact versions are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "dr2net_d2" / "__init__.py").read_text())[1]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
# scikit-image for the photographs of projects/parity.
TEST = [
    *EXPORT,
    "hypothesis>=6",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "sahi>=0.12",
    "scikit-image>=0.22",
    "timm>=1.0",
]

setup(
    name="dr2net_d2",
    version=VERSION,
    description="Finetune pretrained ViT detectors as reversible dual-residual networks (Dr2Net)",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["dr2net_d2", "dr2net_d2.*"]),
    package_data={
        "dr2net_d2": ["weights/pretrained/*", "report/page.html", "report/style.css", "py.typed"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "fvcore>=0.1.5,<0.1.6",
        "jinja2>=3.1",
        "numpy>=1.26",
        "opencv-python>=4.8",
        "pyyaml>=6",
        "pycocotools>=2.0.7",
        "matplotlib>=3.7",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "tensorboard>=2.14",
        "tqdm>=4.60",
    ],
    extras_require={
        "export": EXPORT,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.12", "mypy>=1.16", "import-linter>=2.5"],
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6,<10",
            "mkdocstrings[python]>=1,<2",
            "ruff>=0.12",  # formats the signatures
        ],
        # Not on the package index: install it by its own guide first.
        "detectron2": ["detectron2", "timm>=1.0"],
    },
)
