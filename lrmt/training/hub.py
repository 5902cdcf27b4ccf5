"""`--push_to_hub`: the repository before training, what lies in the output folder after it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from lrmt.arguments import TrainingArguments
from lrmt.errors import TrainingFault, UsageError, one_line

#: what a run leaves in its folder that is no part of the adapter: checkpoints with their optimizer states, half-written files
LEFT_OUT = ["checkpoint-*", "*.tmp", "*.tmp/*", ".*"]


def open_repository(args: TrainingArguments) -> None:
    """Makes the repository, so that a run does not end before a closed door; `args.hub_model_id` becomes its full name."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    api = HfApi(token=args.hub_token)
    try:
        args.hub_model_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.hub_revision is not None:
            api.create_branch(args.hub_model_id, branch=args.hub_revision, exist_ok=True)
    except Exception as error:  # of the network, the Hub or the name
        raise UsageError(
            f"`--push_to_hub` to {name}: {one_line(error)}; log in with `hf auth login`, or name another `--hub_model_id`"
        ) from None


def push_folder(args: TrainingArguments, commit_message: str) -> None:
    """Uploads `output_dir` as it is, but for checkpoints, in one commit."""
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=args.hub_model_id,
            folder_path=args.output_dir,
            commit_message=commit_message,
            revision=args.hub_revision,
            ignore_patterns=LEFT_OUT,
        )
    except Exception as error:
        raise TrainingFault(
            f"`--push_to_hub` to {args.hub_model_id}: {one_line(error)}; the adapter is in {args.output_dir}, push it with "
            f"`hf upload {args.hub_model_id} {args.output_dir}`"
        ) from None
