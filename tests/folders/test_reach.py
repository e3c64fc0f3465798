"""Whether the Hub has something: asked once, offline not at all, and why not in words."""

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from requests import Response

from draft_opd_trl.evaluation import suites
from draft_opd_trl.folders.reach import SECONDS, why_not_on_hub
from draft_opd_trl.folders.target_folder import read_target_config


@pytest.fixture
def hub(monkeypatch):
    """A Hub that answers with `hub.answer`, raised if it is an error; `hub.asked` are the questions."""

    class Hub:
        answer, asked = None, []

    def repo_info(self, name, **options):
        Hub.asked.append((name, options))
        if isinstance(Hub.answer, BaseException):
            raise Hub.answer

    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    return Hub


def answered(kind):
    return kind("no", response=Response())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, None),
        (HFValidationError("no"), "it is no id"),
        (RevisionNotFoundError, "it has no revision 'v2' there"),
        (RepositoryNotFoundError, "there is no such model there, or not for your token"),
        (HfHubHTTPError, None),  # its client will know better: mirrors may know files alone
        (ConnectionError("no\nnetwork"), "ConnectionError: no network"),
    ],
    ids=["there", "name", "revision", "nothing", "status", "network"],
)
def test_why_not(hub, answer, why):
    hub.answer = answered(answer) if isinstance(answer, type) else answer
    assert why_not_on_hub("some/model", "model", "v2", token="x") == why
    assert hub.asked == [("some/model", {"repo_type": "model", "revision": "v2", "token": "x", "timeout": SECONDS})]


def test_offline_it_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.answer = ConnectionError("no network")
    assert why_not_on_hub("some/model", "model") is None and hub.asked == []


def test_the_hub_is_asked_once_by_whoever_needs_it(hub, monkeypatch):
    """With a name that is not there, `load_dataset` repeats itself for 23 seconds."""
    hub.answer = ConnectionError("no network")
    monkeypatch.setattr("draft_opd_trl.texts.rows.load_dataset", lambda *args, **kwargs: pytest.fail("asked again"))
    monkeypatch.setattr("draft_opd_trl.folders.target_folder.AutoConfig", None)
    with pytest.raises(FileNotFoundError, match="'some/set' is no data set here.*no network.*give a local file"):
        suites.load_suite("some/set")
    with pytest.raises(FileNotFoundError, match="target 'some/model' is no folder here.*no network"):
        read_target_config("some/model")
    with pytest.raises(FileNotFoundError, match="There is no suite 'gms8k'"):
        suites.load_suite("gms8k")
    assert [name for name, _ in hub.asked] == ["some/set", "some/model"]
