"""What commands write to stderr: their own words, and no library's."""

import subprocess
import sys

from conftest import POCKET, SHIPPED, SHIPPED_PAIR

from draft_opd_trl.cli import COMMANDS


PROMPTS = str(POCKET / "prompts" / "quickstart.jsonl")


def _stderr(commands, cwd):
    """Of all commands in one process, as importing takes most of the time."""
    script = f"from draft_opd_trl.cli import main\nfor words in {commands!r}: main(words)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_commands_that_show_no_progress_are_silent(tmp_path):
    commands = [[name, "--help"] for name in COMMANDS]
    commands += [
        ["inspect", str(SHIPPED[0]), "--target", str(POCKET / "target")],
        ["plan", *SHIPPED_PAIR, "--output_dir", str(tmp_path)],
    ]
    assert _stderr(commands, tmp_path) == ""


def test_no_library_warns_while_training_and_measuring(tmp_path):
    sizes = ["--max_steps", "1", "--per_device_train_batch_size", "1", "--max_completion_length", "8"]
    told = ["--dataset_name", PROMPTS, "--num_eval_prompts", "1", "--output_dir", "run"]
    train = ["train", *SHIPPED_PAIR, *told, *sizes]
    evaluate = ["evaluate", *SHIPPED_PAIR, "--suite", PROMPTS, "--num_prompts", "1", "--max_new_tokens", "8"]
    told = _stderr([train, evaluate], tmp_path)
    lines = [line for line in told.replace("\r", "\n").splitlines() if line.strip()]
    assert [line for line in lines if "arning" in line or "deprecated" in line or "ailed" in line] == []
