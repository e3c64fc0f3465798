"""Named sets of evaluation prompts: the paper's benchmarks, the pocket world by kind of task, or any data set.

Which rows, in which wording. Knows no tokenizer and no models: what leaves is a data set with a `prompt` column.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from ..core.checks import check_value, nearest
from ..core.errors import InputError, NotFoundError
from ..core.limits import LIMITS
from ..texts.rows import FORMATS, load_prompts
from .turns import FOLLOW_UP


@dataclass(frozen=True)
class Suite:
    """
    A benchmark on the Hub, and how its rows become prompts.

    Args:
        dataset, config, split (`str`): Where it is.
        size (`int`): Rows drawn.
        column (`str`): What a row asks; of a list of turns, the first, and the second after its answer.
        template (`str`): The user's message around it.
    """

    dataset: str
    config: str | None
    split: str
    size: int
    column: str
    template: str = "{}"


_STEP_BY_STEP = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_CODE = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```"
_ISSUE = "Problem Statement:\n{}\nPlease fix the issue described above."

# Data sets, wording and sizes as in the paper's own evaluation code (docs/source/evaluation.md names the files).
SUITES = {
    "gsm8k": Suite("openai/gsm8k", "main", "test", 128, "question", _STEP_BY_STEP),
    "math500": Suite("HuggingFaceH4/MATH-500", None, "test", 128, "problem", _STEP_BY_STEP),
    "aime25": Suite("math-ai/aime25", None, "test", 30, "problem", _STEP_BY_STEP),
    "mbpp": Suite("google-research-datasets/mbpp", "sanitized", "test", 128, "prompt"),
    "humaneval": Suite("openai/openai_humaneval", None, "test", 128, "prompt", _CODE),
    "mt-bench": Suite("HuggingFaceH4/mt_bench_prompts", None, "train", 80, "prompt"),
    "swe-bench-lite": Suite("princeton-nlp/SWE-bench_Lite", None, "test", 128, "problem_statement", _ISSUE),
}
POCKET_PROMPTS = Path(__file__).resolve().parents[2] / "examples" / "pocket" / "prompts" / "heldout.jsonl"
SEED = 0  # of the draw of rows, the paper's


def _pocket(name: str, path: str | None, count: int | None) -> Dataset:
    file = path or str(POCKET_PROMPTS)
    if path is None and not POCKET_PROMPTS.is_file():
        raise NotFoundError(
            f"The pocket prompts are part of the source tree, and {POCKET_PROMPTS} is not there. Point at a copy of "
            f"examples/pocket/prompts/heldout.jsonl: --suite_path {name}=FILE."
        )
    dataset = load_prompts(file)
    if "kind" not in dataset.column_names:
        raise InputError(f"{file} has no column 'kind', so it is no copy of the pocket prompts. Give one.")
    kind = name.removeprefix("pocket").removeprefix("-")
    kinds = sorted(set(dataset["kind"]))
    if kind and kind not in kinds:
        known = [f"pocket-{kind}" for kind in kinds]
        raise InputError(
            f"There is no suite {name!r}.{nearest(name, known)} Suites of pocket tasks: {', '.join(known)}."
        )
    if kind:
        dataset = dataset.filter(lambda row: row["kind"] == kind)
    return dataset.select(range(min(count or 200, len(dataset))))


def load_suite(name: str, path: str | None = None, count: int | None = None) -> Dataset:
    """
    Prompts of a suite.

    Args:
        name (`str`): A key of `SUITES`; `pocket`, or `pocket-<kind>` for one kind of task; or whatever
            [`load_prompts`] reads, with a `prompt` column of text or messages.
        path (`str`, *optional*): A local copy of the suite's data set, for machines without a network.
        count (`int`, *optional*): Rows, instead of the suite's own number: the same draw, shorter or longer.

    Returns:
        [`~datasets.Dataset`] with a `prompt` column, and `follow_up` where a suite asks twice. Rows of the paper's
        benchmarks are drawn as the paper draws them; of the pocket world and of other data sets the first are taken.

    Raises:
        `FileNotFoundError`: No such suite, or the data set is not here and cannot be fetched.
        `ValueError`: No such kind of pocket task, or a copy that lacks the suite's column.
    """
    count = check_value("num_prompts", count, int | None, LIMITS["num_prompts"])
    if name == "pocket" or name.startswith("pocket-"):
        return _pocket(name, path, count)
    suite = SUITES.get(name)
    if suite is None:
        if path is None and "/" not in name and not Path(name).exists() and Path(name).suffix not in FORMATS:
            # No id either, so there is nothing to ask the Hub.
            known = [*SUITES, "pocket"]
            raise NotFoundError(
                f"There is no suite {name!r} and no such file or folder.{nearest(name, known)} Suites: "
                f"{', '.join(known)}. A data set of the Hub is named owner/name."
            )
        dataset = load_prompts(path or name)
        return dataset.select(range(min(count or len(dataset), len(dataset))))
    try:
        dataset = load_prompts(path or suite.dataset, suite.config, suite.split)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"Suite {name!r}: {error} Then pass --suite_path {name}=DIR (the data set is {suite.dataset})."
        ) from error
    if suite.column not in dataset.column_names:
        raise InputError(
            f"{path or suite.dataset} has the columns {dataset.column_names}, without {suite.column!r}, so it is no "
            f"copy of {suite.dataset}. Pass one: --suite_path {name}=DIR."
        )
    size = count or suite.size
    if len(dataset) > size:
        dataset = dataset.shuffle(seed=SEED).select(range(size))

    def ask(row: dict) -> dict:
        turns = row[suite.column]
        text, *later = [turns] if isinstance(turns, str) else turns
        prompt = {"prompt": [{"role": "user", "content": suite.template.format(text)}]}
        return {**prompt, FOLLOW_UP: later[0]} if later else prompt

    return dataset.map(ask, remove_columns=dataset.column_names)
