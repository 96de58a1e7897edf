import importlib.util
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

C = Path(__file__).with_name("kernels") / "c"

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
    "serve": [
        "starlette>=0.46",  # routes, streaming and disconnects of `qwenkern serve`
        "uvicorn>=0.34",  # the HTTP server under it
        "pydantic>=2.9",  # checks the bodies of requests, and describes them for OpenAPI
        "prometheus-client>=0.21",  # /metrics
        "llguidance>=1.3",  # grammars for JSON schemas and tools; also for Model.generate(json_schema=...)
    ],
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
        "setuptools>=77",  # the wheel that the tests build, without build isolation
        "psutil",  # peak memory of a load
        "matplotlib>=3.8",  # the runner's pictures
        "ruff",  # lint and format
        "clang-format",  # the same for the C files: compilers' own versions format differently
        "mypy",  # types: py.typed is a promise to those who check their own
        "jsonschema",  # the oracle for structured output
    ],
    "clients": [  # programs of others that the tests run against the server
        "openai>=2",
        "anthropic",
        "langchain-openai",
        "litellm",
        "pydantic-ai-slim[openai]",
        "lm-eval[api]",
        "schemathesis",  # requests that its OpenAPI document allows, and others
        "playwright",  # drives Debian's Chromium through the server's page
    ],
    "docs": [
        "mkdocs-material>=9.5",  # the site: search, dark mode, links that are checked
        "mkdocstrings[python]>=1",  # its API reference, from the docstrings, without importing torch
        "ruff",  # breaks long signatures there
    ],
}


def module(file: Path) -> ModuleType:
    """A file of kernels/ that imports the standard library only; the package itself needs torch."""
    spec = importlib.util.spec_from_file_location(f"setup_{file.stem}", file)
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclasses look for it
    spec.loader.exec_module(loaded)
    return loaded


class BuildWithC(build_py):
    """Also compiles the C functions, once for each target of the architecture that the wheel is for.

    CC is the compiler. Another architecture is asked for as Python's own cross builds do, for example
    ``CC=aarch64-linux-gnu-gcc _PYTHON_HOST_PLATFORM=linux-aarch64``. Without a compiler that works the package has no
    library, and the machine where it is used compiles one; QWENKERN_REQUIRE_C=1 makes that an error."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there the C files change under the library
            self.compile_c(Path(self.build_lib, "qwenkern", "kernels", "c", "built"))

    def compile_c(self, folder: Path) -> None:
        compiler, targets = module(C / "compiler.py"), module(C / "targets.py")
        required = module(C.parent / "environment.py").REQUIRE_C.get()
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier build left
        folder.mkdir(parents=True)
        machine = targets.machine(sysconfig.get_platform().rpartition("-")[2])
        for target in targets.TARGETS:
            if target.machine == machine:
                try:
                    compiler.compile_to(folder / f"{target.name}.so", target.flags)
                except compiler.CompilerError as error:
                    if required:
                        raise
                    warnings.warn(f"no C functions for {target.name} in this package: {error}", stacklevel=1)
        libraries = list(folder.glob("*.so"))
        if not libraries:
            if required:
                raise RuntimeError(f"QWENKERN_REQUIRE_C=1, and kernels/c/targets.py has no target for {machine}")
            folder.rmdir()
        self.distribution.has_libraries = bool(libraries)


class WheelOfLibraries(bdist_wheel):
    """The libraries are for one platform, and for any Python: ctypes loads them."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2] if self.distribution.has_libraries else "any"
        return "py3", "none", platform


class DistributionWithC(Distribution):
    has_libraries = False  # until they are compiled

    def has_ext_modules(self) -> bool:
        return True  # so that files go where those of a platform belong


setup(
    # The folder kernels/ is the package qwenkern.kernels: a top-level package `kernels` would shadow Hugging Face's.
    package_dir={"qwenkern.kernels": "kernels", "qwenkern.benchmarks": "benchmarks"},
    packages=[
        *find_packages(include=["qwenkern", "qwenkern.*"]),
        *(f"qwenkern.{name}" for name in find_packages(include=["kernels", "kernels.*", "benchmarks", "benchmarks.*"])),
    ],
    py_modules=["qwenkern_start"],
    package_data={
        "qwenkern": ["py.typed"],
        "qwenkern.server": ["page/index.html"],
        "qwenkern.kernels": ["metadata.json"],
        "qwenkern.kernels.triton": ["tuned/*/*.json"],
        "qwenkern.kernels.c": ["*.[ch]"],
    },
    distclass=DistributionWithC,
    cmdclass={"build_py": BuildWithC, "bdist_wheel": WheelOfLibraries},
    install_requires=CORE,
    extras_require=EXTRAS,
)
