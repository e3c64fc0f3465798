"""What engines say of their speculation, read from pages in their shapes."""

import pytest

from draft_opd_trl.texts.engine_counts import Counters, Verified, read_samples, verified_in
from draft_opd_trl.texts.server import Answer, read_answer


# As vLLM writes it, of two engines behind one address.
VLLM = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="/m/a b"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="/m/a b"} 4.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="/m/a b"} 1.79586e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="/m/a b"} 30.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="/m/a b"} 12.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="/m/a b",position="0"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="/m/a b",position="0"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="/m/a b",position="1"} 4.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="/m/a b"} 2.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="/m/a b"} 1.0
vllm:generation_tokens_total{engine="0",model_name="/m/a b"} 57.0
vllm:prefix_cache_hits_total{engine="0",model_name="/m/a b"} 16.0
"""
SGLANG = """
# TYPE sglang:num_requests_total counter
sglang:num_requests_total{model_name="m"} 3.0
sglang:generation_tokens_total{is_streaming="false",model_name="m"} 57.0
sglang:spec_verify_calls_total{model_name="m"} 14.0
sglang:spec_accept_length{model_name="m"} 3.5
"""


# As SGLang's own code writes it (`tests/serving/sglang_driver.py`), of the text of the test below.
SGLANG_ANSWER = """
{"id":"0","object":"text_completion","created":0,"model":"default","choices":[{"index":0,"text":"a b","logprobs":null,
"finish_reason":"stop","matched_stop":2,"token_ids":[0,1,2,3,4,5,6,7,8]}],"usage":{"prompt_tokens":3,"total_tokens":12,
"completion_tokens":9,"prompt_tokens_details":null,"reasoning_tokens":0,"completion_tokens_details":null},
"metadata":{"weight_version":"default"},"sglext":{"spec_tokens_details":{"spec_accept_rate":0.14285714285714285,
"spec_accept_length":2.25,"spec_cap_length":0.0,"spec_block_accept_length":0.0,"spec_num_correct_drafts":4,
"spec_num_proposed_drafts":28,"spec_verify_ct":4,"spec_correct_drafts_histogram":[1,2,1],
"spec_cap_lens_histogram":[]}}}
"""


def test_counters_of_all_engines_behind_an_address_are_added_up():
    assert Counters.read(VLLM) == Counters(requests=3, tokens=57, cached=16, verifications=14, by_slot=[9, 4])
    assert Counters.read(SGLANG) == Counters(requests=3, tokens=57, verifications=14)


def test_an_engine_that_does_not_speculate_counts_no_verifications():
    plain = "\n".join(line for line in VLLM.splitlines() if "spec_decode" not in line)
    assert Counters.read(plain) == Counters(requests=3, tokens=57, cached=16)
    assert Counters.read("<html>no such page</html>") == Counters()


def test_what_was_counted_meanwhile_is_a_difference():
    before, now = Counters(2, 50, 16, 10, [5, 2]), Counters(3, 57, 16, 14, [9, 4])
    assert now - before == Counters(1, 7, 0, 4, [4, 2])
    assert now - Counters() == now
    assert Counters() - Counters() == Counters()


def test_labels_may_hold_anything():
    [(name, labels, value)] = read_samples('a:b_total{x="say \\"hi\\" }",y="} 3"} 2.5\n')
    assert (name, labels, value) == ("a:b", {"x": 'say \\"hi\\" }', "y": "} 3"}, 2.5)
    assert read_samples("a 1\nb nonsense\n\n# a 2\n") == [("a", {}, 1.0)]


def test_answers_of_both_engines_say_the_same():
    """Four blocks of K = 7, of which 1, 0, 1 and 2 proposals were accepted."""
    vllm = {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 1 / 7,
        "acceptance_histogram": [1, 2, 1, 0, 0, 0, 0, 0],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 4,
        "num_draft_tokens": 28,
        "num_spec_tokens": 7,
    }
    expected = Verified(4, [3, 1, 0, 0, 0, 0, 0], 7)
    assert verified_in({"metrics": {"time_to_first_token_ms": None, "speculative_decoding": vllm}}) == expected
    told = read_answer(SGLANG_ANSWER.encode())
    assert told == Answer("a b", list(range(9)), True, 2, 9, expected) and told.verifications == 4


def test_a_text_from_the_prefill_has_no_verifications():
    """SGLang tells nothing of it."""
    alone = Answer("a", [0], True, 2, 1)
    assert alone.verifications == 0 and Answer("a b", [0, 1], True, 2, 2).verifications is None


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"metrics": None, "sglext": None},
        {"metrics": {"speculative_decoding": None}},
        {"metrics": [], "sglext": {"spec_tokens_details": {"spec_verify_ct": "4"}}},
        {"metrics": {"speculative_decoding": {"num_spec_steps": 4, "num_draft_tokens": 12}}},
        {
            "metrics": {
                "speculative_decoding": {
                    "num_spec_steps": -1,
                    "num_draft_tokens": 3,
                    "acceptance_histogram": [1],
                }
            }
        },
    ],
)
def test_an_answer_that_says_nothing_we_know_says_nothing(body):
    assert verified_in(body) is None
