"""Whether the Hub has something, asked once: its client asks five times more before it gives up, for half a minute."""

from __future__ import annotations

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError


SECONDS = 10.0


def why_not_on_hub(
    name: str, repo_type: str, revision: str | None = None, token: str | bool | None = None
) -> str | None:
    """
    Why nothing can be fetched from there, in words; `None` where it can, or where its client will know better.

    Args:
        name (`str`): Id.
        repo_type (`str`): `model` or `dataset`.
        revision, token (*optional*): As for the Hub's client.
    """
    if constants.is_offline_mode():
        return None
    try:
        HfApi().repo_info(name, repo_type=repo_type, revision=revision, token=token, timeout=SECONDS)
    except HFValidationError:
        return "it is no id"
    except RevisionNotFoundError:
        return f"it has no revision {revision!r} there"
    except RepositoryNotFoundError:
        return f"there is no such {repo_type} there, or not for your token"
    except HfHubHTTPError:
        return None  # mirrors may know files alone
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
