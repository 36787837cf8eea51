"""Packaging: distribution `podlaunch`, console script `launch`, extras for the accelerators."""

from pathlib import Path

from setuptools import find_packages, setup

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
    packages=find_packages(include=["configs*", "launcher*", "trainer*", "models*"]),
    package_data={"configs": ["*.yaml", "*.json"], "launcher": ["py.typed"]},
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
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["launch=launcher.cli:main"]},
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
