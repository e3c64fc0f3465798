"""A running engine measured: what it tells, resumed, and what makes its figures doubtful. Fakes in both shapes."""

import json

import pytest
from conftest import ScriptedDrafter, counting_target, tiny_tokenizer
from engine_server import EngineServer

from draft_opd_trl.core.endpoint import ServerError
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.evaluation.served import measure_served
from draft_opd_trl.texts.engine_counts import EngineStats
from draft_opd_trl.texts.server import CompletionsClient


PROMPTS = [[3], [4, 5], [1, 2, 3], [7], [8], [2]]
# After t the first proposal is right and the second is not, but after 5, where neither is.
PROPOSALS = [[(t + 1) % 12 if t != 5 else 0, 0] for t in range(12)]


def _engine(**options):
    return EngineServer(counting_target(), ScriptedDrafter(PROPOSALS), tiny_tokenizer(), **options)


def _measured(server, prompts=PROMPTS, concurrency=2, **options):
    client = CompletionsClient(
        server.url, SamplingParams(0.0), 21, [11], lambda ids: None, concurrency=concurrency, max_retries=0
    )
    stats = EngineStats(server.url, max_retries=0)
    return measure_served(client, stats, prompts, [0] * len(prompts), **options)


@pytest.mark.parametrize(("engine", "tells"), [("vLLM", "answer"), ("vLLM", "counters"), ("SGLang", "answer")])
def test_figures_are_those_of_the_hand(engine, tells):
    """After 2: 3 | 4 5 | 6 | 7 8 | 9 10 | 11."""
    with _engine(engine=engine, tells=tells) as server:
        one = _measured(server, [[2]], concurrency=1)
    assert one.completions == [[3, 4, 5, 6, 7, 8, 9, 10, 11]]
    summary = one.summary()
    assert summary["verifications"] == 5 and summary["acceptance_length"] == 8 / 5
    assert summary["interval"] is None  # of one text there is no spread
    assert summary["acceptance_by_slot"] == [4 / 5, 0.0]
    assert summary["num_draft_tokens"] == 2
    assert summary["told"] == {"answer": "by answer", "counters": "by counters"}[tells]


@pytest.mark.parametrize(("tells", "parts"), [("answer", 6), ("counters", 3)])
def test_an_interval_is_over_what_can_be_told_apart(tells, parts):
    with _engine(tells=tells) as server:
        report = _measured(server)
        reports = server.reports[-len(PROMPTS) :]
    summary = report.summary()
    low, high = summary["interval"]
    assert low < summary["acceptance_length"] < high
    assert summary["parts"] == parts and summary["others"] == 0 and summary["cached_prompt_tokens"] == 0
    assert summary["verifications"] == sum(len(one.accepted[0]) for one in reports)
    assert report.by_part([1] * 6).tolist() == [6 / parts] * parts


def test_counters_that_others_moved_are_said():
    with _engine(tells="counters", others=1) as server:
        assert _measured(server).summary()["others"] > 0
    with _engine(tells="answer", others=1) as server:
        assert _measured(server).summary()["others"] == 0  # of each answer nobody else is counted


@pytest.mark.parametrize("tells", ["answer", "counters"])
def test_a_killed_run_asks_for_what_is_missing(tells, tmp_path):
    file, settings = tmp_path / "served.jsonl", {"seed": 0}
    with _engine(tells=tells) as server:
        whole = _measured(server, file=file, settings=settings)
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the third part
        asked = len(server.asked)
        again = _measured(server, file=file, settings=settings)
        assert len(server.asked) - asked == (4 if tells == "answer" else 2)
    assert again.completions == whole.completions and len(again.parts) == len(whole.parts)
    assert again.verifications.tolist() == whole.verifications.tolist()
    with _engine(tells=tells) as server, pytest.raises(ValueError, match="other settings: seed was 0 and is 1"):
        _measured(server, file=file, settings={"seed": 1})
    assert json.loads(lines[0])["concurrency"] == 2


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_a_text_that_the_prefill_ends_has_no_verifications(engine):
    """10: 11. SGLang then says nothing of verification."""
    with _engine(engine=engine) as server:
        report = _measured(server, [[2], [10]])
    assert report.completions[1] == [11]
    assert report.committed.tolist() == [8, 0] and report.verifications.tolist() == [5, 0]


def test_an_engine_that_tells_with_some_answers_alone_is_said():
    class Half(EngineServer):
        def metadata(self, runs, slots):
            return super().metadata(runs, slots) if len(self.reports) < 4 else {}  # two of them found out what it is

    server = Half(counting_target(), ScriptedDrafter(PROPOSALS), tiny_tokenizer())
    with server, pytest.raises(ServerError, match="with the one to prompt 1 it does not.*start them alike"):
        _measured(server, [[2], [3]], concurrency=1)


def test_a_server_that_does_not_speculate_is_said():
    for engine in ("vLLM", "SGLang"):
        with EngineServer(counting_target(), None, tiny_tokenizer(), engine=engine) as server:
            with pytest.raises(ServerError, match="does not speculate.*draft-opd inspect"):
                _measured(server)
    with _engine(engine="SGLang", tells="nothing") as server, pytest.raises(ServerError, match="--enable-metrics"):
        _measured(server)
