"""Upload an exported model to the Hugging Face hub, where a user asks for it and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public there

from xsiam.errors import HubError, InputError
from xsiam.model_folders import SETTINGS_FILE, inspect_folder
from xsiam.pretrained import hub_unreachable

__all__ = ["upload_model"]

_MESSAGE = "Upload a Siamese encoder exported by xsiam"
# What the hub's client raises on the way: the library under it, and so its class, vary.
_CLIENT_ERRORS = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, OSError, ValueError))


def upload_model(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload all files of an exported model, in one commit, and return the commit's address.

    The repository and the branch are made where they are missing. Address and token are those of
    `huggingface_hub`: ``HF_ENDPOINT`` and ``HF_TOKEN``, or what ``hf auth login`` has kept.

    Args:
        folder: What `SiameseEncoder.save_pretrained` or a training run (``export``) has written.
        repo_id: "owner/name", or "name" for the owner of the token.
        private: Whether only its owner may see the repository.
        revision: Branch; None is the main one.
        message: Of the commit.

    Raises:
        InputError: If the folder is no exported model, the name cannot be one, or no token is
            there.
        CheckpointError, ModelError: If files of the folder are damaged or missing.
        HubError: If the hub cannot be reached or refuses, or the repository is public where
            ``private`` is set. Nothing is uploaded then.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    _check_name(repo_id)
    if get_token() is None:
        raise InputError(
            "Expected a token of the Hugging Face hub, but found none. Run `hf auth login`, or set "
            "`HF_TOKEN` to a token that may write."
        )
    api = HfApi()
    if (reason := hub_unreachable()) is not None:
        raise HubError(f"Expected {api.endpoint} to answer, but it does not: {reason}.")
    try:
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise HubError(
                f"Expected {repo!r} to be private, but it is there already and public. Leave "
                "`--private` out, make it private in its settings, or choose another name."
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message or _MESSAGE,
        )
    except HubError:
        raise
    except _CLIENT_ERRORS as error:
        raise HubError(
            f"Expected {api.endpoint} to take {repo_id!r}, but it does not: "
            f"{type(error).__name__}: {' '.join(str(error).split())} Check the name, the network, "
            "and that the token may write there."
        ) from error
    return str(commit.commit_url)


def _check_folder(folder: Path) -> None:
    """Raise InputError, or what `inspect_folder` raises, for what is no exported model."""
    if not (folder / SETTINGS_FILE).is_file():
        inside = folder / "export"
        hint = f" Give {str(inside)!r}." if (inside / SETTINGS_FILE).is_file() else ""
        raise InputError(
            f"Expected the folder of a model that xsiam exported, but {str(folder)!r} has no "
            f"`{SETTINGS_FILE}`.{hint or ' Write one with `SiameseEncoder.save_pretrained`.'}"
        )
    inspect_folder(folder)
    if not (folder / "README.md").is_file():
        raise InputError(
            f"Expected a model card in {str(folder)!r}, but there is no `README.md`. "
            "Export the model again."
        )


def _check_name(repo_id: str) -> None:
    """Raise InputError for what cannot be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise InputError(
            f"Expected the name of a repository such as 'owner/name', but got {repo_id!r}: {error}"
        ) from error
