"""Completion scripts: what bash offers, asked as a Tab asks it; and that zsh reads its own."""

import shutil
import subprocess

import pytest

from draft_opd_trl.core.completion import completion_script


COMMANDS = {"train": {"--model": (), "--recipe": ("default", "paper")}, "trace": {"--suite": ()}}


def offered(*words):
    """What bash offers after `my-prog` and these words, the last of which is begun."""
    line = " ".join(f"'{word}'" for word in ("my-prog", *words))
    tab = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _my_prog; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    script = f"{completion_script('bash', 'my-prog', COMMANDS)}\n{tab}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], ["train", "trace"]),
        (["tra"], ["train", "trace"]),
        (["trai"], ["train"]),
        (["train", "--"], ["--model", "--recipe"]),
        (["train", "--m"], ["--model"]),
        (["train", "--recipe", ""], ["default", "paper"]),
        (["train", "--recipe", "pa"], ["paper"]),
        # A file, which bash finds itself.
        (["train", "--model", ""], []),
        (["trace", "--m"], []),
        (["other", "--"], []),
    ],
)
def test_bash_offers_commands_options_and_values(words, expected):
    assert offered(*words) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_reads_its_script():
    script = completion_script("zsh", "my-prog", COMMANDS)
    subprocess.run(["zsh", "-n", "-c", script], check=True)


def test_zsh_knows_the_same_words():
    script = completion_script("zsh", "my-prog", COMMANDS)
    assert "found='train trace'" in script and "train) found='--model --recipe' ;;" in script
    assert "'train --recipe') found='default paper' ;;" in script and script.endswith("compdef _my_prog my-prog\n")
