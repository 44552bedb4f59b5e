"""The page in a Hugging Face Space, or in any container: on every address, on the port that the host names.

It opens `model.onnx` beside this file, see README.md there.
"""

from __future__ import annotations

import os

from demo.cli import main

if __name__ == "__main__":
    main(["--host", "0.0.0.0", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")])
