"""Convert a checkpoint to another format or to other degrees; the same as ``megatron-dsp convert``.

    python tools/convert_checkpoint.py --load-dir runs/a --save-dir exported --saver safetensors

docs/converting.md has all flags and formats.
"""

from __future__ import annotations

import sys

from megatron_dsp.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
