"""Which trained model a command opens, and how it reads: flags that depend on the method of the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from lrmt.adapters.find import find_adapter
from lrmt.errors import UsageError
from lrmt.flags import HELP, Flags, Group, flag
from lrmt.tasks.options import Options


@dataclass(kw_only=True)
class OpeningSettings(Options):
    """A trained model on disk; raises UsageError, one line, for whatever cannot work.

    `adapter_path` of the Hub becomes the folder of its files; `adapter_name` is what it is called. `reading` holds the method's
    own settings of reading that were given.
    """

    title: ClassVar[str] = "method"
    description: ClassVar[str] = ""
    examples: ClassVar[str] = ""

    adapter_path: str = flag(
        help="Folder or Hub id of what training wrote (an adapter) or lrmt merge.", metavar="DIR", kw_only=False
    )
    model_name_or_path: str | None = flag(
        None, "Another place of the backbone: a folder, GGUF or Hub id (default: where training found it).", "PATH"
    )
    load_in_4bit: bool | None = flag(None, "Backbone in NF4; false: in full (default: as trained).")
    dequantize: bool = flag(False, "4 bits as full weights of the same values: faster on a CPU, more memory.")
    reading: dict[str, object] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        folder = find_adapter(self.adapter_path)
        self.from_hub = not Path(self.adapter_path).exists()
        self.adapter_name = Path(self.adapter_path if self.from_hub else folder.resolve()).name
        self.adapter_path = str(folder)
        known = method_settings(self.adapter_path, self.reading) if self.reading else ()
        for name in self.reading:
            if name not in known:
                raise UsageError(
                    f"`--{name}` is no setting of how a {read_config(folder)['model_type']} model reads "
                    f"(known: {', '.join(known) or 'none'}); leave it out"
                )

    def place(self, output_dir: str | None, name: str) -> Path:
        """Where the files go: by default a folder `name` in the adapter's, or, of one of the Hub, in runs/ADAPTER."""
        if output_dir:
            return Path(output_dir)
        return (Path("runs") / self.adapter_name if self.from_hub else Path(self.adapter_path)) / name

    @classmethod
    def modes(cls) -> tuple[type, ...]:
        """The classes of settings that the flags choose from."""
        return (cls,)

    @classmethod
    def choose(cls, given: Mapping[str, object]) -> type:
        """The class of settings that such flags mean."""
        return cls

    @classmethod
    def refuse(cls, others: list[str]) -> None:
        """Raises UsageError for flags of other modes that would be misread here; the rest changes nothing."""

    @classmethod
    def parse(cls, words: Sequence[str], program: str) -> tuple[type, dict[str, object]]:
        """What `build` takes, from a command line; flags that are none here are looked up among METHODS' reading settings."""
        flags = Flags(*cls.modes(), program=program)
        if HELP & {*words}:
            cls._show_help(words, program)
        groups = reading_groups(_value_of("--adapter_path", words)) if flags.unknown(words) else []
        given = Flags(*cls.modes(), *groups, program=program).parse(words)
        reading = {name: given.pop(name) for name in [*given] if name not in flags.flags}
        mode = cls.choose(given)
        own = {f.name for f in fields(mode)}
        others = [n for n, one in flags.flags.items() if n in given and n not in own and given[n] != one.default]
        mode.refuse([f"--{name}" for name in others])
        return mode, given | {"reading": reading}

    @classmethod
    def _show_help(cls, words: Sequence[str], program: str):
        parts = [part for word in words for part in word.split("=", 1)]
        mode = cls.choose({part.removeprefix("--"): parts for part in parts if part.startswith("--")})
        adapter = _value_of("--adapter_path", words)
        config = read_config(adapter)
        groups = [] if "model_type" not in config else reading_groups(adapter, config["model_type"])
        more = (
            f"How the model reads, flags of its own method: {program} --adapter_path DIR --help lists those of DIR's."
        )
        texts = {"description": mode.description, "examples": mode.examples if groups else f"{mode.examples}\n{more}"}
        shown = {f.name: config[f.name] for group in groups for f in group.fields if f.name in config}
        Flags(mode, *groups, program=program, **texts, shown=shown).parse(["--help"])


def _value_of(name: str, words: Sequence[str]) -> str | None:
    """The last value of a flag."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith(f"{name}=") else [word])]
    return next((value for part, value in list(zip(parts, parts[1:], strict=False))[::-1] if part == name), None)


def read_config(adapter_path: str | Path | None) -> dict:
    """What an adapter's config.json says; nothing where it cannot be read."""
    try:
        config = json.loads((Path(adapter_path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return {}
    return config if isinstance(config, dict) else {}


def reading_groups(adapter_path: str | None, method: str | None = None) -> list[Group]:
    """The flags of how a model reads, of `method` or of all, those of the adapter's own first. Imports the models."""
    from lrmt.models import METHODS

    own = read_config(adapter_path).get("model_type")
    names = sorted(METHODS, key=lambda name: name != own) if method is None else {method} & METHODS.keys()
    groups = []
    for name in names:
        config = METHODS[name].config_class
        settings = [f for f in config.own_settings() if f.name in config.reading_settings]
        groups.append(Group(f"reading ({name})", config, settings))
    return groups


def method_settings(adapter_path: str, given: Mapping[str, object], *, measured: bool = False) -> tuple[str, ...]:
    """The reading settings of an adapter's method, or those that change what is `measured`; of an unknown method, the given."""
    from lrmt.models import METHODS

    method = read_config(adapter_path).get("model_type")
    if method not in METHODS:
        return tuple(given)
    config = METHODS[method].config_class
    return tuple(name for name in config.reading_settings if not measured or name not in config.placement_settings)
