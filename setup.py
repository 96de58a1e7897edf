from pathlib import Path

from setuptools import setup

# Why each dependency is here. The core stays small; everything else is an extra, imported only where it is used.
CORE = [
    "torch>=2.8",  # tensors, SDPA, torch.library; the first whose Triton is 3.4
    "triton>=3.4; platform_system == 'Linux'",  # the kernels; without it the CPU path runs on torch alone
    "numpy>=1.26",  # memory-mapped views of GGUF files (torch's own mapping cannot be read-only)
    "safetensors>=0.4.5",  # the official weight format, memory-mapped
    "tokenizers>=0.20",  # byte-level BPE
    "jinja2>=3.1.6",  # chat templates, in a sandbox
    "gguf>=0.10",  # names and block sizes of GGUF's tensor types
    "typer>=0.12",  # the command line
    "rich>=13",  # progress bars and tables
    "filelock>=3.12",  # one download at a time (torch depends on it too)
]
EXTRAS = {
    "hub": ["huggingface_hub>=0.25"],  # `--model Qwen/Qwen2.5-3B-Instruct`
    "bench": ["matplotlib>=3.8"],  # `qwenkern bench --plot`
    "test": [
        "pytest>=8",
        "pytest-xdist",  # the suite in parallel
        "pytest-timeout",  # a hang is a failure
        "pytest-benchmark",  # the registry's cases, for regressions on a CPU
        "hypothesis",  # malformed files and byte sequences that nobody thought of
        "transformers>=5.17",  # the oracle for logits, YaRN and chat templates
        "kernels>=0.17",  # what puts kernels/layers.py into other projects' models
        "peft",  # models with adapters must take our pieces as others do
        "accelerate",  # and so must models with its hooks
        "tiktoken",  # the oracle for tokenization: another BPE, another expression engine
        "psutil",  # peak memory of a load
        "matplotlib>=3.8",  # the runner's pictures
        "ruff",  # lint and format
    ],
}

setup(
    name="qwenkern",
    version="0.1.0",
    description="Fused Triton kernels and a thin torch runtime for the Qwen2.5 family of language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The folder kernels/ is the package qwenkern.kernels: a top-level package `kernels` would shadow Hugging Face's.
    package_dir={"qwenkern.kernels": "kernels", "qwenkern.benchmarks": "benchmarks"},
    packages=[
        "qwenkern",
        "qwenkern.checkpoint",
        "qwenkern.integrations",
        "qwenkern.kernels",
        "qwenkern.kernels.cpu",
        "qwenkern.benchmarks",
    ],
    package_data={
        "qwenkern": ["py.typed"],
        "qwenkern.kernels": ["metadata.json", "tuned/*/*.json"],
        "qwenkern.kernels.cpu": ["*.[ch]"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["qwenkern = qwenkern.cli:main"]},
)
