"""Drafter folders on the Hub: what goes there, and errors that say what to do. Knows no trainer."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, constants, create_repo, file_exists, get_token, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from transformers.trainer import TRAINING_ARGS_NAME

from ..core.errors import EnvironmentFault, InputError
from ..drafters.base import Drafter
from .model_card import write_model_card
from .run_state import read_manifest, write_manifest


_REMEDIES = {
    401: "The token is missing or not valid: log in with `hf auth login`, or pass one.",
    403: "The token may not write there: use one that may, or push under another name.",
    409: "Something else is writing there: push again.",
}
# Where a checkpoint's files hold paths of this machine.
_PATHS = {"trainer_state.json": "best_model_checkpoint", "adapter_config.json": "base_model_name_or_path"}


def check_hub_access(token: str | None) -> None:
    """
    Raises:
        `ValueError`: Nothing can be pushed from here: no token, or offline mode.
    """
    if constants.is_offline_mode():
        raise InputError("push_to_hub=True, but HF_HUB_OFFLINE is set. Unset it, or train without pushing.")
    if token is None and get_token() is None:
        raise InputError(
            "push_to_hub=True, but there is no token for the Hub. Log in with `hf auth login`, set HF_TOKEN, or pass "
            "`hub_token`; or train without pushing."
        )


@contextmanager
def push_errors(repo_id: str, kept: str = "Nothing was pushed.") -> Iterator[None]:
    """
    Whatever the Hub's client raises inside comes out as one `OSError`, in words.

    Args:
        repo_id (`str`): Where the push goes.
        kept (`str`, *optional*): What a failure does not cost, as a sentence.
    """
    try:
        yield
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        remedy = _REMEDIES.get(status, "Check the name and the network, and push again.")
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise EnvironmentFault(f"Could not push to {repo_id} ({told}). {remedy} {kept}") from error


def merged(model: PeftModel) -> Drafter:
    """A drafter with its adapter added to its weights, as engines load no adapters; `model` stays as it is."""
    target = model.get_base_model()._target
    return copy.deepcopy(model, {id(target): target}).merge_and_unload()


def copy_checkpoint(checkpoint: Path, folder: Path) -> None:
    """A Trainer's checkpoint, whole enough to resume from, without what names this machine or holds the token."""
    # Nobody reads the pickled arguments back; the card beside an adapter is PEFT's.
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(TRAINING_ARGS_NAME, "README.md"))
    for name, field in _PATHS.items():
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        if os.path.isabs(content.get(field) or ""):
            file.write_text(json.dumps({**content, field: Path(content[field]).name}, indent=2) + "\n")
    manifest = read_manifest(folder)
    if manifest is not None:  # which no longer fits
        write_manifest(folder, manifest["step"], manifest["settings"])


def push_drafter(
    drafter: Drafter,
    repo_id: str,
    commit_message: str = "Upload drafter",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Push a drafter folder that engines load by id, with a card unless the repository has one. What transformers' own
    `drafter.push_to_hub` pushes is the same folder with a blank card.

    Args:
        drafter ([`Drafter`]): The drafter; one that is bound to its target gets it named in the card.
        repo_id (`str`): Repository on the Hub; made if it is not there.
        commit_message, private, token, revision, create_pr: As in [`~huggingface_hub.upload_folder`] and
            [`~huggingface_hub.create_repo`].

    Raises:
        `OSError`: The Hub refused, or was not reached.
    """
    with TemporaryDirectory() as folder:
        drafter.save_pretrained(folder)
        with push_errors(repo_id):
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            if not file_exists(repo_id, "README.md", revision=revision, token=token):
                target = drafter._target
                write_model_card(Path(folder) / "README.md", repo_id, drafter, None if target is None else target.name)
            return upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
