"""Measure a drafter on its target by real speculative decoding, with intervals, against decoding without it.

Suites: gsm8k, math500, aime25, mbpp, humaneval, mt-bench and swe-bench-lite from the Hub (or from a local copy:
--suite_path), pocket and pocket-<kind> from the source tree, or any data set with a `prompt` column: an id, a folder,
a .json, .jsonl or .parquet file. With --server_url a running vLLM or SGLang is measured, and, where --model and
--teacher are given too, held to what is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..core.checks import check_value, path
from ..core.errors import InputError
from ..evaluation.best_k import advised
from . import served
from .options import QuantizationArguments, drafters_by_name, read_chat_kwargs, settle_options, suite_paths
from .replay_texts import ServerTexts
from .served import check_served_arguments, with_interval


@dataclass
class EvaluateArguments:
    """What to measure."""

    suite: list[str] = field(metadata={"help": "Suites or data sets, separated by commas or spaces."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Drafter: path or id.", "aliases": ["--model"]}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Target: path or id.", "aliases": ["--teacher", "--teacher_model"]}
    )
    suite_path: list[str] = field(
        default_factory=list, metadata={"help": "Local copies of suites, as name=path, for use without a network."}
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Prompts a suite, instead of its own number."})
    compare: str | None = field(default=None, metadata={"help": "A second drafter, compared pairwise: path or id."})
    temperature: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "Sampling temperatures of the target."}
    )
    top_k: int = field(default=0, metadata={"help": "Top-k of the target; 0 keeps all."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p of the target."})
    sample_proposals: bool = field(default=False, metadata={"help": "Draw proposals instead of taking the argmax."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest completion. The paper's tables: 8192."})
    batch_size: int = field(default=16, metadata={"help": "Texts decoded side by side."})
    dtype: str = field(default="float32", metadata={"help": "Of target and drafters: float32, bfloat16, auto."})
    chat_template_kwargs: str = field(
        default="{}", metadata={"help": 'JSON for the chat template, such as {"enable_thinking": false}.'}
    )
    baseline: bool = field(default=True, metadata={"help": "Also decode plainly: speedup, and that no text changed."})
    by: str | None = field(
        default=None,
        metadata={
            "help": "speculation, or replay: the target writes alone, and replay counts, without speeds. By default "
            "speculation, unless the target would have to read every text anew at each round. server: a running "
            "engine, which is the default with --server_url.",
            "choices": ["speculation", "replay", "server"],
        },
    )
    serve_batch_sizes: list[int] = field(
        default_factory=list, metadata={"help": "Batch sizes to say for how many proposals to serve with."}
    )
    server_url: str | None = field(
        default=None,
        metadata={
            "help": "A running vLLM or SGLang that speculates, as http://localhost:8000; with --by replay, a "
            "completions server of the target that writes the texts."
        },
    )
    server_model: str | None = field(default=None, metadata={"help": "Model to ask the server for."})
    server_token: str | None = field(default=None, metadata={"help": "Bearer token for the server."})
    served_model: str | None = field(
        default=None, metadata={"help": "Drafter's folder that the server was started with, held to --model."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where texts go as they end; resumed if there."})
    seed: int = field(default=0, metadata={"help": "Of draws at temperature > 0."})

    def __post_init__(self) -> None:
        settle_options(self)
        check_served_arguments(self)
        if self.server_url and self.serve_batch_sizes:
            raise InputError(
                f"serve_batch_sizes={self.serve_batch_sizes} asks for rounds to be timed here, beside --server_url. "
                "Drop one of them."
            )
        self.suite = check_value("suite", [name for word in self.suite for name in word.split(",")], list[str], path)
        for name in ("suite", "temperature"):
            if not getattr(self, name):
                raise InputError(f"`{name}` is []; give at least one.")


ARGUMENTS = (EvaluateArguments, QuantizationArguments)


def run(arguments: EvaluateArguments, quantization: QuantizationArguments) -> dict[str, Any]:
    try:
        with TemporaryDirectory() as scratch:
            return _measured(arguments, quantization, Path(arguments.output_dir or scratch))
    except KeyboardInterrupt as error:
        kept = "nothing was kept. With --output_dir texts are kept as they end, and the same command goes on."
        if arguments.output_dir:
            kept = f"what had ended is in {arguments.output_dir}. The same command goes on from there."
        raise KeyboardInterrupt(f"interrupted; {kept}") from error


def _measured(arguments: EvaluateArguments, quantization: QuantizationArguments, texts_folder: Path) -> dict[str, Any]:
    import json

    from accelerate import PartialState

    from ..core.files import check_writable, write_atomically
    from ..core.sampling_params import SamplingParams
    from ..core.target import stop_token_ids
    from ..decoding.acceptance import DEFINITION
    from ..decoding.speculation import SpeculationSettings
    from ..evaluation.measure import evaluate_drafters
    from ..evaluation.round_costs import check_timed
    from ..evaluation.suites import load_suite
    from ..evaluation.turns import second_turns
    from ..texts.prompts import check_fit, tokenize_dataset
    from ..training.loading import check_pair, load_pair

    if PartialState().num_processes > 1:
        raise InputError("Evaluation runs in one process. Start it without `accelerate launch` or `torchrun`.")
    if arguments.server_url and arguments.by != "replay":
        return served.measure(arguments, quantization.quantization_config())
    if arguments.output_dir:
        check_writable(arguments.output_dir)
    names = arguments.suite
    paths = suite_paths(arguments.suite_path, names)
    sampling = [SamplingParams(value, arguments.top_k, arguments.top_p) for value in arguments.temperature]
    chat, quantized = read_chat_kwargs(arguments.chat_template_kwargs), quantization.quantization_config()
    suites = {name: load_suite(name, paths.get(name), arguments.num_prompts) for name in names}
    named = drafters_by_name([arguments.model_name_or_path, *([arguments.compare] if arguments.compare else [])])
    models = (list(named.values()), arguments.teacher_model_name_or_path)
    tokenizer = check_pair(*models)
    rows = {name: tokenize_dataset(suite, tokenizer, None, chat, name=name) for name, suite in suites.items()}
    target, drafters, _ = load_pair(*models, arguments.dtype, quantized)
    replay = arguments.by == "replay" or (arguments.by is None and target.reads_anew is not None)
    check_timed(target, arguments.serve_batch_sizes)
    output = Path(arguments.output_dir) if arguments.output_dir else None
    longest_block = max(drafter.num_draft_tokens for drafter in drafters)
    check_fit(rows, target.vocab_size, target.context_length, arguments.max_new_tokens, longest_block)
    ask_again, unanswered = second_turns(suites, tokenizer, chat)
    # What is asked second stands behind an answer of any length.
    check_fit(unanswered, target.vocab_size, target.context_length, 2 * arguments.max_new_tokens, longest_block)
    results = []
    for name, part in rows.items():
        for law in sampling:
            settings = SpeculationSettings(
                max_new_tokens=arguments.max_new_tokens,
                stop_token_ids=stop_token_ids(target.model, tokenizer),
                sampling=law,
                sample_proposals=arguments.sample_proposals and not law.greedy,
                batch_size=arguments.batch_size,
            )
            title = f"{Path(name).stem}-t{law.temperature:g}"
            write = None
            if arguments.server_url:
                write = ServerTexts(target, tokenizer, settings, texts_folder, arguments, chat)
            measured = evaluate_drafters(
                target,
                dict(zip(named, drafters, strict=True)),
                list(part["prompt_ids"]),
                settings,
                arguments.seed,
                arguments.baseline,
                output and output / title,
                title,
                replay=replay,
                ask_again=ask_again.get(name),
                write=write,
                serve_batch_sizes=arguments.serve_batch_sizes,
            )
            told = {} if write is None else {"server_texts": dict(write.counts)}
            results.append({"suite": name, "temperature": law.temperature, **measured, **told})
    teacher = arguments.teacher_model_name_or_path
    result = {"definition": DEFINITION, "teacher": teacher, "drafters": named, "results": results}
    if output:
        write_atomically(output / "results.json", json.dumps(result, indent=2))
    return result


def _figures(drafter: dict[str, Any]) -> dict[str, str]:
    """What was measured of a drafter, as it is shown, by name."""

    def of(name: str, style: str) -> str:
        return with_interval(drafter[name]["value"], drafter[name]["interval"], style)

    positions = [
        f"{place['start']}–{place['stop'] - 1}: {place['value']:.2f}" for place in drafter["acceptance_by_position"]
    ]
    figures = {
        "τ": with_interval(drafter["acceptance_length"], drafter["interval"], ".3f"),
        "mean of prompts' own τ": of("acceptance_length_per_prompt", ".3f"),
        "blocks fully accepted": of("blocks_fully_accepted", ".1%"),
        "stop tokens in blocks": of("stops_in_blocks", ".1%"),
        "first k accepted": " ".join(f"{share:.0%}" for share in drafter["acceptance_by_slot"]),
        "τ by position": ", ".join(positions),
    }
    if drafter["replayed"]:
        figures["measured"] = "by replay, along texts that the target wrote alone; no speed"
    else:
        figures["seconds"] = (
            f"{drafter['seconds']:.1f}: {drafter['draft_seconds']:.1f} in the drafter, "
            f"{drafter['verify_seconds']:.1f} in the target; {drafter['tokens_per_second']:.0f} tokens/s"
        )
    if drafter["speedup"] is not None:
        beside = "over decoding without a drafter"
        if drafter["speedup_interval"] is None:
            beside += ", without an interval: texts decoded side by side share their seconds (--batch_size 1)"
            figures["speedup"] = f"{drafter['speedup']:.2f} {beside}"
        else:
            figures["speedup"] = f"{with_interval(drafter['speedup'], drafter['speedup_interval'], '.2f')} {beside}"
    if drafter.get("serving"):
        figures["to serve with"] = advised(drafter["serving"])
    if drafter["texts"] is not None:
        figures["lossless"] = _losslessness(drafter["texts"])
    if drafter["resumed"]:
        figures["resumed"] = f"{drafter['resumed']} texts came from an earlier run, and so did their times"
    return figures


def _losslessness(texts: dict[str, Any]) -> str:
    if not texts["changed"]:
        return f"all {texts['checked']} greedy texts are the target's own"
    where = f"{texts['changed']} of {texts['checked']} greedy texts differ from decoding without a drafter"
    gap = f"largest gap {texts['largest_gap']:.3g} between the logits of the tokens that differ"
    if texts["changed"] == texts["at_ties"]:
        return f"CHANGED AT TIES: {where}, all where two logits are equal to rounding ({gap})"
    return f"*** NOT LOSSLESS *** {where}, {texts['at_ties']} of them at ties ({gap}). Do not trust these numbers."


def show(result: dict[str, Any]) -> str:
    if "server" in result:
        return served.show(result)
    from ..core.terminal import as_text, table

    parts = [result["definition"], "Intervals: 95 %, bootstrap over prompts."]
    for measured in result["results"]:
        figures = {name: _figures(drafter) for name, drafter in measured["drafters"].items()}
        names = dict.fromkeys(name for each in figures.values() for name in each)
        lines = [[name, *(each.get(name, "") for each in figures.values())] for name in names]
        heads = [f"{name}: {result['drafters'][name]}" for name in figures]
        title = f"{measured['suite']}, T = {measured['temperature']:g}, {measured['prompts']} prompts"
        parts += ["", title, "", table(["", *heads], lines)]
        if "server_texts" in measured:
            asked, dropped = (measured["server_texts"][name] for name in ("asked", "dropped"))
            parts.append(
                f"texts of the server: {asked}, of which {dropped} were not the target's, which wrote them anew"
            )
        if measured["difference"]:
            mean, low, high = (measured["difference"][key] for key in ("mean", "low", "high"))
            parts.append(f"{' − '.join(figures)}: {mean:+.3f} τ [{low:+.3f}, {high:+.3f}], paired by prompt")
    return as_text(*parts)
