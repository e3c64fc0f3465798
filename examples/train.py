"""Train a drafter with Draft-OPD (or, with `--lmbda 0`, by SFT): `draft-opd train` as a script.

    accelerate launch examples/train.py                       # the pocket quickstart: SFT against Draft-OPD
    accelerate launch examples/train.py --config recipe.yaml  # any option, from YAML
    accelerate launch examples/train.py \
        --model_name_or_path z-lab/Qwen3-4B-DFlash-b16 \
        --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name prompts.jsonl --output_dir my-drafter
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from trl import TrlParser

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.cli import main


@dataclass
class QuickstartArguments:
    """Of the quickstart alone."""

    drafter: str = field(default="dflash", metadata={"help": "Architecture the pocket quickstart starts from."})


if __name__ == "__main__":
    # With neither a drafter nor prompts, on the command line or in YAML, it is the quickstart.
    if any(word.startswith(("--model", "--teacher", "--dataset", "--config", "-h", "--help")) for word in sys.argv):
        sys.exit(main(["train", *sys.argv[1:]]))
    from pocket.quickstart import run_quickstart

    quickstart, config = TrlParser((QuickstartArguments, DraftOPDConfig)).parse_args_and_config()
    run_quickstart(config, kind=quickstart.drafter)
