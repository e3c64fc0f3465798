#!/usr/bin/env bash
# One night: what was served by day teaches the drafter, and the new one is taken only if it is better.
#
#     examples/nightly.sh TARGET DRAFTER WORK LOG.jsonl[.gz] [options of `draft-opd train`]
#
# DRAFTER is the folder that is served. WORK is a new folder for this night, such as work/$(date +%F). If τ on
# conversations that were kept aside has risen, with a 95 % interval above 0, and speculation changed no text, the new
# drafter takes the place of DRAFTER, and the old one stands beside it as DRAFTER.before.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 TARGET DRAFTER WORK LOG.jsonl[.gz] [options of draft-opd train]" >&2
    exit 2
fi
target=$1 drafter=${2%/} work=$3 log=$4
shift 4
mkdir "$work"
# What the texts are sampled at when they are served; at 0 it is also checked that speculation changes no text.
temperature=0

# The answers that the target wrote, and 64 conversations kept aside.
draft-opd texts "$log" --target "$target" --temperature $temperature --output_file "$work/rows.jsonl" --held_out 64

# Draft-OPD on them. What it measures itself is left out: the judgement below is on the conversations kept aside.
draft-opd train --model "$drafter" --teacher "$target" --dataset_name "$work/rows.jsonl" \
    --rollout_source dataset --temperature $temperature --num_eval_prompts 0 --save_strategy no \
    --output_dir "$work/drafter" "$@"

# Both drafters on the same prompts, by real speculative decoding, against decoding without a drafter.
draft-opd evaluate --model "$work/drafter" --compare "$drafter" --teacher "$target" \
    --suite "$work/rows-held_out.jsonl" --temperature $temperature --output_dir "$work/results"

if python - "$work/results/results.json" <<'PYTHON'
import json
import sys

(found,) = json.load(open(sys.argv[1]))["results"]
texts = next(iter(found["drafters"].values()))["texts"]
lossless = texts is None or texts["changed"] == texts["at_ties"]
print(f"τ {found['difference']['mean']:+.3f}, at least {found['difference']['low']:+.3f}; lossless: {lossless}")
sys.exit(not (found["difference"]["low"] > 0 and lossless))
PYTHON
then
    rm -rf "$drafter.before"
    mv "$drafter" "$drafter.before"
    mv "$work/drafter" "$drafter"
    # To publish it: hf upload ORG/NAME "$drafter"
    echo "taken: $drafter is the new drafter"
else
    echo "not taken: $drafter stays as it was"
fi
