"""Turn a Hugging Face folder into a Megatron dist-checkpoint that any parallel layout can load, on one process.

    python -m checkpoint_convert.hf_to_megatron --hf MODEL --out DIR

Training does not need it (it reads Hugging Face folders itself); it is for other Megatron programs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoint_convert.single_process import whole_model


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="dtype of the checkpoint")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists; name a new folder")
    with whole_model(arguments.hf, arguments.precision) as model:
        from megatron_intuitor.checkpoint import save_weights

        save_weights(arguments.out, model)


if __name__ == "__main__":
    main()
