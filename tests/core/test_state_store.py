"""States that are kept: the target's own to the bit, up to a budget, never another target's, whatever lies on disk."""

import pytest
import torch
from conftest import tiny_model

from draft_opd_trl.core.state_store import GIB, StateStore
from draft_opd_trl.core.target import Target


TAPS = [0, 2]
LENGTHS = torch.tensor([14, 5, 9])
# Of one text of 14 tokens: two taps and a state of 32 float32 each.
BYTES = 14 * 3 * 32 * 4


@pytest.fixture
def tokens(qwen_target):
    return torch.randint(qwen_target.vocab_size, (3, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return tmp_path / "states" if request.param == "disk" else None


def _reads(target, monkeypatch):
    """How many texts the target has read, as it goes."""
    read, forward = [], target.forward_text
    monkeypatch.setattr(target, "forward_text", lambda *args: read.append(len(args[0])) or forward(*args))
    return read


def test_equals_a_pass_of_the_target_and_is_the_same_bits_again(qwen_target, tokens, folder, monkeypatch):
    read = _reads(qwen_target, monkeypatch)
    store = StateStore(qwen_target, TAPS, 0.01, folder)
    first, again = store.read(tokens, LENGTHS), store.read(tokens.flip(0)[:, :14], LENGTHS.flip(0))
    assert read == [1, 1, 1] and store.take_counts() == (3, 6) and store.take_counts() == (0, 0)
    for mine, second, whole in zip(first, again, qwen_target.forward_text(tokens, TAPS), strict=True):
        assert torch.equal(mine, second.flip(0)) and mine.dtype == whole.dtype and mine.shape == whole.shape
        for row, length in enumerate(LENGTHS.tolist()):
            torch.testing.assert_close(mine[row, :length], whole[row, :length], rtol=1e-5, atol=1e-5)
            assert not mine[row, length:].any()


def test_what_does_not_fit_is_read_anew_to_the_same_bits(qwen_target, tokens, folder, monkeypatch):
    read = _reads(qwen_target, monkeypatch)
    store = StateStore(qwen_target, TAPS, BYTES / GIB, folder)
    first, again = (store.read(tokens, LENGTHS) for _ in range(2))
    assert store.take_counts() == (1, 6) and len(read) == 5 and store.free == 0
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_rounds_what_it_keeps_and_what_it_reads_anew(qwen_target, tokens, folder):
    exact = StateStore(qwen_target, TAPS, 0.01, folder).read(tokens, LENGTHS)
    kept = StateStore(qwen_target, TAPS, 0.01, folder, torch.bfloat16)
    anew = StateStore(qwen_target, TAPS, 0, folder, torch.bfloat16)
    for store in (kept, kept, anew):
        for mine, whole in zip(store.read(tokens, LENGTHS), exact, strict=True):
            assert mine.dtype == torch.float32 and torch.equal(mine, whole.bfloat16().float())


def test_another_process_finds_what_is_on_disk(qwen_target, tokens, tmp_path, monkeypatch):
    store = StateStore(qwen_target, TAPS, 0.01, tmp_path)
    late = StateStore(qwen_target, TAPS, 0.01, tmp_path)
    written = store.read(tokens, LENGTHS)
    read = _reads(qwen_target, monkeypatch)
    for other in (late, StateStore(qwen_target, TAPS, 0.01, tmp_path)):
        assert all(torch.equal(*pair) for pair in zip(written, other.read(tokens, LENGTHS), strict=True))
    assert not read


def test_what_is_on_disk_counts_against_the_budget(qwen_target, tokens, tmp_path):
    StateStore(qwen_target, TAPS, 0.01, tmp_path).read(tokens, LENGTHS)
    assert StateStore(qwen_target, TAPS, BYTES / GIB, tmp_path).free < 0


@pytest.mark.parametrize("other", ["target", "taps", "dtype"])
def test_nothing_of_another_target_is_read(qwen_target, tokens, tmp_path, other):
    StateStore(qwen_target, TAPS, 0.01, tmp_path).read(tokens, LENGTHS)
    target = Target(tiny_model("qwen3", seed=7)) if other == "target" else qwen_target
    taps, dtype = [1] if other == "taps" else TAPS, torch.float16 if other == "dtype" else None
    store = StateStore(target, taps, 0.01, tmp_path, dtype)
    features, _ = store.read(tokens, LENGTHS)
    assert store.take_counts() == (0, 3)
    expected = target.forward_text(tokens, taps)[0][1, :5]
    torch.testing.assert_close(features[1, :5], expected, rtol=1e-2, atol=1e-2)


def test_a_broken_file_is_read_anew(qwen_target, tokens, tmp_path, caplog):
    store = StateStore(qwen_target, TAPS, 0.01, tmp_path)
    written = store.read(tokens, LENGTHS)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    again = store.read(tokens, LENGTHS)
    assert all(torch.equal(*pair) for pair in zip(written, again, strict=True))
    assert "is read anew" in caplog.text
    assert StateStore(qwen_target, TAPS, 0.01, tmp_path).read(tokens, LENGTHS) and store.take_counts() == (0, 6)


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_budget_beyond_the_machine_is_refused(qwen_target, tmp_path, what):
    with pytest.raises(ValueError, match=f"asks for 1e\\+06 GiB of {what}.* are free. Lower it"):
        StateStore(qwen_target, TAPS, 1e6, tmp_path if what == "disk" else None)
