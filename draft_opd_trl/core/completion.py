"""Completion of a command line in a shell: a script that holds all words, so that nothing of Python runs at a Tab.

Knows no commands: it is given their options.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence


# By command, by option: the words that may follow it; none where that is a file's name, a number or the like.
Options = Mapping[str, Mapping[str, Sequence[str]]]

_BASH = """\
# Completion of {program} in bash: `source` it, or call it ~/.local/share/bash-completion/completions/{program}
_{name}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}        esac
        if [ -z "$words" ] && [ "${{word#-}}" != "$word" ]; then
            case ${{COMP_WORDS[1]}} in
{options}            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _{name} {program}
"""
_ZSH = """\
# Completion of {program} in zsh: `source` this file in ~/.zshrc, after compinit.
_{name}() {{
    local found=
    if (( CURRENT == 2 )); then
        found={commands}
    else
        case "${{words[2]}} ${{words[CURRENT-1]}}" in
{values}        esac
        if [[ -z $found && $PREFIX == -* ]]; then
            case ${{words[2]}} in
{options}            esac
        fi
    fi
    if [[ -n $found ]]; then compadd -- ${{=found}}; else _files; fi
}}
compdef _{name} {program}
"""
SCRIPTS = {"bash": (_BASH, "words"), "zsh": (_ZSH, "found")}


def completion_script(shell: str, program: str, commands: Options) -> str:
    """
    A script that a shell reads once.

    Args:
        shell (`str`): A key of `SCRIPTS`.
        program (`str`): What is completed.
        commands (`Options`): All of its words.
    """
    script, variable = SCRIPTS[shell]

    def branches(cases: Mapping[str, Sequence[str]], indent: int) -> str:
        return "".join(
            f"{' ' * indent}{shlex.quote(case)}) {variable}={shlex.quote(' '.join(words))} ;;\n"
            for case, words in cases.items()
        )

    return script.format(
        program=program,
        name=program.replace("-", "_"),
        commands=shlex.quote(" ".join(commands)),
        options=branches({command: list(options) for command, options in commands.items()}, 16),
        values=branches(
            {
                f"{command} {option}": words
                for command, options in commands.items()
                for option, words in options.items()
                if words
            },
            12,
        ),
    )
