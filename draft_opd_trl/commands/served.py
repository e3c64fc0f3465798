"""`draft-opd evaluate --by server`: what a running engine says of its speculation, beside our own measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import InputError
from .options import read_chat_kwargs, suite_paths


DEFINITION = (
    "τ: tokens committed per verification, the recovered or bonus token counted, over all prompts together: tokens "
    "that came back, without each text's first, by the verifications that the engine counted."
)


def check_served_arguments(arguments: Any) -> None:
    """
    Raises:
        `ValueError`: Options that contradict each other, or lack a drafter or its target.
    """
    pair = (arguments.model_name_or_path, arguments.teacher_model_name_or_path)
    if arguments.by == "server" and not arguments.server_url:
        raise InputError("`by` is 'server', but no --server_url says where it listens. Give one.")
    # By replay, a server writes texts for a drafter that runs here.
    if not arguments.server_url or arguments.by == "replay":
        for name, option in (("model_name_or_path", "--model"), ("teacher_model_name_or_path", "--teacher")):
            if getattr(arguments, name) is None:
                raise InputError(
                    f"evaluate measures a drafter with its target, and `{name}` ({option}) is missing. Give it, or "
                    "measure a running engine with --server_url."
                )
        return
    if arguments.by not in (None, "server"):
        raise InputError(
            f"`by` is {arguments.by!r}, which runs here, beside --server_url {arguments.server_url}. Drop one of them."
        )
    if arguments.compare:
        raise InputError("--compare is a second drafter, and a server has one. Measure them one after the other.")
    if (pair[0] is None) != (pair[1] is None):
        raise InputError("Beside --server_url, --model and --teacher come together: what is served is held to both.")
    if arguments.served_model and pair[0] is None:
        raise InputError("--served_model is compared with --model, which is missing. Give --model and --teacher.")


def measure(arguments: Any, quantized: Any) -> dict[str, Any]:
    """Every suite at every temperature: the engine, and, with a drafter and its target, ours and the difference."""
    import json

    from ..core.files import check_writable, write_atomically
    from ..core.redaction import redact_url
    from ..core.sampling_params import SamplingParams
    from ..evaluation.suites import load_suite
    from ..evaluation.turns import FOLLOW_UP
    from ..texts.engine_counts import EngineStats

    output = Path(arguments.output_dir) if arguments.output_dir else None
    if output:
        check_writable(arguments.output_dir)
    paths = suite_paths(arguments.suite_path, arguments.suite)
    chat = read_chat_kwargs(arguments.chat_template_kwargs)
    suites = {name: load_suite(name, paths.get(name), arguments.num_prompts) for name in arguments.suite}
    # Of a suite that asks twice, the first turn.
    suites = {
        name: suite.remove_columns(FOLLOW_UP) if FOLLOW_UP in suite.column_names else suite
        for name, suite in suites.items()
    }
    stats = EngineStats(arguments.server_url, arguments.server_token)
    ours = _Ours(arguments, quantized, suites, chat) if arguments.model_name_or_path else None
    results = []
    for name, suite in suites.items():
        for temperature in arguments.temperature:
            law = SamplingParams(temperature, arguments.top_k, arguments.top_p)
            stem = output and output / f"{Path(name).stem}-t{temperature:g}"
            measured = _one(arguments, stats, ours, name, suite, law, chat, stem)
            results.append({"suite": name, "temperature": temperature, **measured})
    engine = {"engine": stats.engine, "version": stats.version, "url": redact_url(arguments.server_url)}
    result = {"definition": DEFINITION, "server": engine, "results": results}
    result |= {"model": arguments.model_name_or_path, "teacher": arguments.teacher_model_name_or_path}
    if output:
        write_atomically(output / "results.json", json.dumps(result, indent=2))
    return result


class _Ours:
    """Our drafter, target and prompts."""

    def __init__(self, arguments: Any, quantized: Any, suites: dict[str, Any], chat: dict) -> None:
        from ..texts.prompts import check_fit, tokenize_dataset
        from ..training.loading import check_pair, load_pair

        models = ([arguments.model_name_or_path], arguments.teacher_model_name_or_path)
        tokenizer = check_pair(*models)
        rows = {name: tokenize_dataset(suite, tokenizer, None, chat, name=name) for name, suite in suites.items()}
        self.target, [self.drafter], self.tokenizer = load_pair(*models, arguments.dtype, quantized)
        longest = (arguments.max_new_tokens, self.drafter.num_draft_tokens)
        check_fit(rows, self.target.vocab_size, self.target.context_length, *longest)
        self.prompts = {name: list(part["prompt_ids"]) for name, part in rows.items()}


def _one(
    arguments: Any,
    stats: Any,
    ours: _Ours | None,
    name: str,
    suite: Any,
    law: Any,
    chat: dict[str, Any],
    stem: Path | None,
) -> dict[str, Any]:
    from ..core.target import stop_token_ids
    from ..decoding.speculation import SpeculationSettings
    from ..evaluation.measure import decode_all, text_seeds
    from ..evaluation.results import fingerprint_of
    from ..evaluation.served import measure_served
    from ..evaluation.served_causes import Explanation, served_folder
    from ..evaluation.served_prompts import check_prompts, served_prompts
    from ..texts.server import CompletionsClient

    theirs = served_prompts(stats, suite, chat)
    prompts = theirs or (ours and ours.prompts[name])
    if prompts is None:
        raise InputError(
            f"{arguments.server_url} has no /tokenize that says how it templates prompts. Give --teacher and --model, "
            "whose tokenizer does, or prompts as `prompt_ids`."
        )
    stops = stop_token_ids(ours.target.model, ours.tokenizer) if ours else []
    seeds = text_seeds(arguments.seed, range(len(prompts)))
    client = CompletionsClient(
        arguments.server_url,
        law,
        arguments.max_new_tokens,
        stops,
        lambda ids: None,
        model=arguments.server_model,
        token=arguments.server_token,
        concurrency=arguments.batch_size,
    )
    depends = {
        "server": client.url,
        "engine": f"{stats.engine} {stats.version}",
        "prompts": fingerprint_of(prompts)[:16],
        "max_new_tokens": arguments.max_new_tokens,
        "stop_token_ids": stops,
        "sampling": str(law),
        "seed": arguments.seed,
    }
    file = stem and stem.with_name(f"{stem.name}-served.jsonl")
    title = f"{Path(name).stem}-t{law.temperature:g}"
    served = measure_served(client, stats, prompts, seeds, file, depends, f"{title}, served")
    measured = {"served": served.summary(), "ours": None, "explained": None}
    if ours is None:
        return measured
    settings = SpeculationSettings(
        max_new_tokens=arguments.max_new_tokens,
        stop_token_ids=stops,
        sampling=law,
        sample_proposals=arguments.sample_proposals and not law.greedy,
        batch_size=arguments.batch_size,
    )
    replay = ours.target.reads_anew is not None
    runs = {"ours": ours.drafter}
    texts, _ = decode_all(ours.target, runs, ours.prompts[name], settings, arguments.seed, stem, title, replay=replay)
    explanation = Explanation(
        served,
        prompts,
        ours.target,
        ours.drafter,
        ours.tokenizer,
        settings,
        seeds,
        stats.settings,
        served_folder(arguments.served_model, stats.settings),
        lambda count: measure_served(client, stats, prompts[:count], seeds[:count], progress=f"{title}, again"),
    )
    said = check_prompts(ours.prompts[name], theirs, suite, ours.tokenizer, chat)
    measured["explained"] = explanation.explain(texts["ours"], said)
    measured["ours"] = _summary(texts["ours"])
    return measured


def _summary(texts: list) -> dict[str, Any]:
    from ..decoding.acceptance import join_reports

    return join_reports(texts).summary()


# -- shown ----------------------------------------------------------------------------------------------------------


def with_interval(value: float, interval: list[float] | None, style: str) -> str:
    return f"{value:{style}}" + (f" [{interval[0]:{style}}, {interval[1]:{style}}]" if interval else "")


def _figures(one: dict[str, Any] | None) -> dict[str, str]:
    if one is None:
        return {}
    figures = {
        "τ": with_interval(one["acceptance_length"], one["interval"], ".3f"),
        "first k accepted": " ".join(f"{share:.0%}" for share in one["acceptance_by_slot"]) or "not told",
        "verifications": str(one["verifications"]),
    }
    if "tokens_per_second" in one:
        figures["tokens/s"] = f"{one['tokens_per_second']:.0f}"
    return figures


def _how_told(served: dict[str, Any]) -> str:
    """What the interval is over, and what makes the figures doubtful."""
    said = f"Text by text, as the engine told with its answers: intervals are over {served['parts']} texts."
    if served["told"] == "by counters":
        said = (
            f"By the engine's counters, read around each of {served['parts']} batches: intervals are over batches. "
            "vLLM tells text by text when started with --per-request-spec-decode-metrics summary."
        )
        if served["others"]:
            said += (
                f" OTHERS USED IT MEANWHILE: {served['others']} requests and tokens were counted that are not ours, "
                "and τ is of all of them. Measure again on a server of your own."
            )
    return said


def _explained(told: dict[str, Any]) -> list[str]:
    mean, low, high = (told["difference"][key] for key in ("mean", "low", "high"))
    lines = [
        f"served − ours: {mean:+.3f} τ [{low:+.3f}, {high:+.3f}], of which {told['written']:+.3f} lies in what is "
        f"written (prompts, target) and {told['drafted']:+.3f} in what is drafted",
        "",
    ]
    marks = {True: "FOUND", False: "same", None: "?"}
    for check in told["checks"]:
        lines.append(f"{marks[check['found']]:>5}  {check['cause']}: {check['said']}.")
        if check["remedy"]:
            lines.append(f"       → {check['remedy']}")
    return lines


def show(result: dict[str, Any]) -> str:
    from ..core.terminal import as_text, table

    server = result["server"]
    parts = [result["definition"], "Intervals: 95 %, bootstrap."]
    for measured in result["results"]:
        served, ours = measured["served"], measured["ours"]
        figures = {"served": _figures(served), **({"ours": _figures(ours)} if ours else {})}
        lines = [[name, *(each.get(name, "") for each in figures.values())] for name in figures["served"]]
        name = " ".join(filter(None, [server["engine"], server["version"]])) or "unknown engine"
        heads = [f"{name} at {server['url']}", *([f"here: {result['model']}"] if ours else [])]
        title = f"{measured['suite']}, T = {measured['temperature']:g}, {served['prompts']} prompts"
        parts += ["", title, "", table(["", *heads], lines), _how_told(served)]
        if measured["explained"]:
            parts += ["", *_explained(measured["explained"])]
    return as_text(*parts)
