"""qwenkern: Qwen2.5 language models on fused kernels: Triton on a GPU, C on a CPU.

>>> import qwenkern
>>> model = qwenkern.Model.from_pretrained("demo")
>>> model.chat([{"role": "user", "content": "Write a haiku about compilers."}]).text
"""

import qwenkern_start

if qwenkern_start.is_module_run(__name__):
    qwenkern_start.watch()  # before torch is imported

from .config import Config, YarnScaling
from .engine import AsyncStream, Completion, Score, Stream
from .errors import CheckpointError, ConfigError, EngineError, Error, NonFiniteError, RequestError
from .Model import Model  # `import qwenkern.Model` works too: this name hides the module behind its class
from .sampling import SamplingParams, TokenLogprob

__version__ = "0.1.0"

__all__ = [
    "AsyncStream",
    "CheckpointError",
    "Completion",
    "Config",
    "ConfigError",
    "EngineError",
    "Error",
    "Model",
    "NonFiniteError",
    "RequestError",
    "SamplingParams",
    "Score",
    "Stream",
    "TokenLogprob",
    "YarnScaling",
    "__version__",
]
