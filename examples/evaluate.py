"""Measure any drafter–target pair by real speculative decoding: `draft-opd evaluate` as a script.

    python examples/evaluate.py --model DRAFTER --teacher TARGET --suite prompts.jsonl

Drafter, target and suite are the pocket world's where they are not named.
"""

from __future__ import annotations

import sys

from pocket import POCKET

from draft_opd_trl.cli import main


DEFAULTS = {
    ("--model", "--model_name_or_path"): str(POCKET / "drafter-dflash"),
    ("--teacher", "--teacher_model", "--teacher_model_name_or_path"): str(POCKET / "target"),
    ("--suite",): "pocket",
}


if __name__ == "__main__":
    words = sys.argv[1:]
    if not any(word.startswith(("--config", "-h", "--help")) for word in words):
        for names, value in DEFAULTS.items():
            if not any(word.split("=")[0] in names for word in words):
                words += [names[0], value]
    sys.exit(main(["evaluate", *words]))
