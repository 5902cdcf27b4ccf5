"""What `lrmt merge` is asked to do."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lrmt.flags import flag


@dataclass(kw_only=True)
class MergeSettings:
    """Which adapter, into what."""

    title: ClassVar[str] = "flags"
    description: ClassVar[str] = """\
Writes the adapter into its backbone: a folder of full weights that lrmt.load reads without PEFT. Prints how far the
logits of the merged model are from those of the unmerged one.
"""
    examples: ClassVar[str] = """\
example:
  lrmt merge --adapter_path runs/passkey --output_dir runs/passkey-merged
"""

    adapter_path: str = flag(help="Folder or Hub id of what training wrote.", metavar="DIR")
    output_dir: str = flag(help="Folder for the merged model, new or empty.", metavar="DIR")
    model_name_or_path: str | None = flag(
        None, "Another place of the backbone: a folder, GGUF or Hub id (default: where training found it).", "PATH"
    )
    merge_base: Literal["original", "nf4_roundtrip"] = flag(
        "original",
        "Weights to add the adapter to: as published (original), or rounded to NF4 and back, which is what a 4-bit "
        "adapter was trained against (nf4_roundtrip).",
    )
