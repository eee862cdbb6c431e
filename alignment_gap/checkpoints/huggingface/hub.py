"""Sends an exported folder to the Hugging Face Hub, by its own client."""

from __future__ import annotations

from pathlib import Path

from alignment_gap.checkpoints.huggingface.folder import installed, is_hub_id
from alignment_gap.errors import UserError


def push(folder: Path, name: str, private: bool = False) -> str:
    """Uploads a folder to a repository of the hub, which is made if it does not exist; returns the commit's address.

    Args:
      folder: what `checkpoint export` wrote.
      name: the repository, USER/NAME.
      private: whether a new repository is private.

    Raises:
      UserError: the folder is not an export, no token is set, or the hub refuses or does not answer.
    """
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder} is not an exported folder: give the --output of alignment-gap checkpoint export")
    if not is_hub_id(name):
        raise UserError(f"{name!r} is not a repository of the hub: write USER/NAME")
    hub = installed("huggingface_hub")
    token = hub.get_token()
    if token is None:
        raise UserError("no token of the hub is set: set HF_TOKEN, or log in with `hf auth login`")
    client = hub.HfApi(token=token)
    try:
        client.create_repo(name, private=private, exist_ok=True)
        commit = client.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by alignment_gap")
    except Exception as error:  # The client raises its own errors, those of httpx, and ValueError.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the hub does not take {folder} as {name} ({reason[:200]}): check the token's rights and the network, and "
            "run the command again"
        ) from error
    return str(commit.commit_url)
