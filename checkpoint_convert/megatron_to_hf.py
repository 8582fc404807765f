"""Turn a checkpoint of a run into a Hugging Face folder, on one process, whatever layout saved it.

    python -m checkpoint_convert.megatron_to_hf --megatron runs/x/checkpoints/step_00000020 --hf-config MODEL --out DIR

``--hf-config`` is the Hugging Face folder that the run started from: config, tokenizer and the dtype of the tensors
come from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoint_convert.single_process import whole_model


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, required=True, help="checkpoint folder: .../checkpoints/step_XXXXXXXX")
    parser.add_argument("--hf-config", type=Path, required=True, help="Hugging Face folder that the run started from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="precision of the run")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists; name a new folder")
    if not (arguments.megatron / "metadata.json").is_file():
        parser.error(f"--megatron {arguments.megatron} is not a whole checkpoint: it has no metadata.json")
    with whole_model(arguments.hf_config, arguments.precision) as model:
        from megatron_intuitor.checkpoint import load_weights
        from megatron_intuitor.models import export_hf

        load_weights(arguments.megatron, model)
        export_hf(model, arguments.hf_config, arguments.out)


if __name__ == "__main__":
    main()
