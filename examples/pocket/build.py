"""Rebuild the pocket world from nothing: ``python build.py target``, then ``prompts``, ``report`` and ``drafter``.

``python build.py code`` renews the code and the configs in the drafters' folders; their weights stay as they are.

Each part is one subcommand: a function that takes the parsed arguments, registered in :func:`parse_args`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


HERE = Path(__file__).resolve().parent


def target(args: argparse.Namespace) -> None:
    """Train the target."""
    from target import train_target

    train_target(args)


def prompts(args: argparse.Namespace) -> None:
    """Write the prompts that the quickstart trains on and those it is measured on."""
    from tasks import problems

    folder = HERE / "prompts"
    folder.mkdir(exist_ok=True)
    for split, count in (("quickstart", args.quickstart), ("heldout", args.heldout)):
        rows = problems(split, count)
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                message = {"role": "user", "content": row["prompt"]}
                file.write(json.dumps({"prompt": [message], "kind": row["kind"], "answer": row["answer"]}) + "\n")
        print(f"{count} prompts in {folder.name}/{split}.jsonl")


def drafter(args: argparse.Namespace) -> None:
    """Train a drafter for the target by SFT, to a plateau."""
    from drafter import train_drafter

    args.output = args.output or str(HERE / f"drafter-{args.drafter}")
    train_drafter(args)


def code(args: argparse.Namespace) -> None:
    """Write the code that loads them with ``AutoModel`` into the shipped drafters' folders, and their configs anew."""
    from tempfile import TemporaryDirectory

    from draft_opd_trl import load_drafter

    for folder in sorted([*HERE.glob("drafter-*"), *HERE.parent.glob("smollm/drafter-*")]):
        with TemporaryDirectory() as scratch:
            load_drafter(str(folder)).save_pretrained(scratch)
            for file in folder.glob("*.py"):
                file.unlink()
            new = [file for file in Path(scratch).iterdir() if file.suffix in (".py", ".json")]
            for file in new:
                (folder / file.name).write_bytes(file.read_bytes())
        print(f"{folder.name}: {len(new)} files")


def report(args: argparse.Namespace) -> None:
    """Measure the target on held-out prompts and write ``report.json`` beside it."""
    from report import write_report

    write_report(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """One subcommand for each part of the pocket world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--target", default=str(HERE / "target"), help="the target's folder")
    shared.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a CUDA device")
    shared.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")

    command = commands.add_parser("target", parents=[shared], help="train the target from nothing")
    command.add_argument("--work-dir", default="outputs/pocket", help="checkpoints; a run that was cut off resumes")
    command.add_argument("--hybrid-of", help="a target's folder to begin with; most layers become Gated DeltaNet")
    command.add_argument("--steps", type=int, default=6000)
    command.add_argument("--minutes", type=float, default=55, help="end earlier where so long was not enough")
    command.add_argument("--batch-size", type=int, default=16)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--fp32", action="store_true", help="train without bf16 autocast")
    command.add_argument("--save-seconds", type=float, default=120, help="time between checkpoints")
    command.set_defaults(run=target)

    command = commands.add_parser("prompts", help="write the quickstart's and the held-out prompts")
    command.add_argument("--quickstart", type=int, default=1600)
    command.add_argument("--heldout", type=int, default=1024)
    command.set_defaults(run=prompts)

    command = commands.add_parser("drafter", parents=[shared], help="train a drafter by SFT, to a plateau")
    command.add_argument("--drafter", default="dflash", help="architecture")
    command.add_argument("--block-size", type=int, default=8, help="anchor and proposals")
    command.add_argument("--shape", type=json.loads, default={}, help="further config fields of it, as JSON")
    command.add_argument(
        "--origin",
        help="drafter folder to begin with, of any block size, or of another kind that this one starts from",
    )
    command.add_argument("--loss", default="ce", help="ce, or another one with the teacher at temperature 1")
    command.add_argument("--output", help="folder; drafter-<architecture> beside this file by default")
    command.add_argument("--work-dir", default="outputs/pocket", help="texts and checkpoints; a cut-off run resumes")
    command.add_argument("--texts", type=int, default=4000, help="prompts the target answers to train on")
    command.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.0], help="it answers each at each of them"
    )
    command.add_argument("--steps", type=int, default=3200)
    command.add_argument("--batch-size", type=int, default=4, help="texts of a step, on each process")
    command.add_argument("--num-anchors", type=int, default=32, help="random anchors of a text at each step")
    command.add_argument("--learning-rate", type=float, default=4e-3)
    command.add_argument("--eval-prompts", type=int, default=128, help="prompts that the plateau is judged on")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=drafter)

    command = commands.add_parser("report", parents=[shared], help="measure the target on held-out prompts")
    command.add_argument("--prompts", type=int, default=330)
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--max-new-tokens", type=int, default=512)
    command.add_argument("--examples", type=int, default=0, help="print this many wrong answers of each kind")
    command.set_defaults(run=report)

    command = commands.add_parser("code", help="renew the code and configs in the shipped drafters' folders")
    command.set_defaults(run=code)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
