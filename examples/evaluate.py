"""Measure any drafter–target pair by real speculative decoding: `draft-opd evaluate` as a script.

    python examples/evaluate.py --model DRAFTER --teacher TARGET --suite prompts.jsonl

Without a drafter: the pocket pair on pocket prompts.
"""

from __future__ import annotations

import sys

from pocket.quickstart import POCKET

from draft_opd_trl.cli import main


if __name__ == "__main__":
    words = sys.argv[1:]
    if not any(word.startswith(("--model", "--config", "-h", "--help")) for word in words):
        words += ["--model", str(POCKET / "drafter-dflash"), "--teacher", str(POCKET / "target"), "--suite", "pocket"]
    sys.exit(main(["evaluate", *words]))
