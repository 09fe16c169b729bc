"""Package metadata; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.6", "hypothesis>=6.100"]

setup(
    name="cem-kernels",
    version="0.2.0.dev0",
    description="Attention-based conditional-entropy surrogates that make split inference hard to invert",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["cem", "cem.*", "cem_kernels", "cem_kernels.*"]),
    package_data={"cem": ["py.typed", "report/templates/*"], "cem_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "numpy>=1.26",
        "scipy>=1.11",
        "scikit-learn>=1.5",
        "torchvision>=0.21",
        "torchmetrics>=1.4",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "PyYAML>=6",
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, "ruff>=0.9", "mypy>=1.14", "types-PyYAML", "types-tqdm", "pre-commit>=4"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
)
