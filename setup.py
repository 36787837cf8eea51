"""Packaging: the distribution `podlaunch`, its console script `launch`, and extras for the accelerators.

The rooms are installed inside the package podlaunch; podlaunch/__init__.py explains why, and how they are imported.
"""

from pathlib import Path

from setuptools import find_packages, setup

REPOSITORY = "https://github.com/podlaunch/podlaunch"
ROOMS = ("configs", "launcher", "models", "trainer")
PARQUET = ["pyarrow>=17"]
ACCELERATORS = {
    "tpu": ["jax[tpu]"],
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
}

setup(
    name="podlaunch",
    version="0.1.0",
    description="One command trains a ResNet with JAX on whatever machines you have.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    license_files=["LICENSE"],
    project_urls={
        "Homepage": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    packages=[
        "podlaunch",
        *(f"podlaunch.{p}" for room in ROOMS for p in find_packages(include=[room, f"{room}.*"])),
    ],
    package_dir={f"podlaunch.{room}": room for room in ROOMS},
    package_data={"podlaunch": ["py.typed"], "podlaunch.configs": ["*.yaml", "*.json"]},
    install_requires=[
        "array_record>=0.8.1",
        "click>=8.1",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "gcsfs>=2025.3",
        "google-cloud-storage>=3",
        "google-cloud-tpu>=1.20",
        "google-crc32c>=1.6",
        "grain>=0.2.16",
        "jax>=0.10,<0.13",
        "numpy>=2",
        "opencv-python-headless>=4.10",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "pillow>=11",
        "pydantic>=2.10",
        "pyyaml>=6",
        "requests>=2.32",
        "rich>=13",
        "scikit-learn>=1.5",
        "simplejpeg>=1.8",
        "tensorboard>=2.18",
        "tensorboardX>=2.6",
    ],
    extras_require={
        **ACCELERATORS,
        "parquet": PARQUET,
        "test": [
            *PARQUET,
            "import-linter",
            "jsonschema",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["launch=podlaunch.__main__:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
