"""A field of a dataclass, a command-line flag and a YAML key of one name: one thing, strictly, for the recipes and for `lrmt`.

A flag is a field with `metadata["help"]`. Unknown flags and keys are refused with a "did you mean", and so are wrong types;
nothing is guessed from an abbreviation. Light: nothing heavy is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from enum import Enum
from typing import Literal, NamedTuple, Union

import yaml

from lrmt.errors import UsageError, one_line, suggest

HELP = {"-h", "--help"}
WORDS = {"true": True, "yes": True, "t": True, "y": True, "1": True}
WORDS |= {"false": False, "no": False, "f": False, "n": False, "0": False}


def flag(default=MISSING, help: str = "", metavar: str | None = None, *, positional=False, nargs=None, **options):
    """A dataclass field that is a flag; without a default it must be given.

    Args:
        positional: given by its place, without its name. nargs: "*" lets a list be empty. options: of `dataclasses.field`.
    """
    options["metadata"] = {"help": help, "metavar": metavar, "positional": positional, "nargs": nargs}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, **options)
    return dataclasses.field(default=default, **options)


class Group(NamedTuple):
    """Flags under one title: some fields of the dataclass `owner`. What is parsed of it is a dict, not an instance."""

    title: str
    owner: type
    fields: Sequence[dataclasses.Field]


class Flag(NamedTuple):
    """One of them: `read` turns a word into a value, or raises ValueError or KeyError; of several words `many` makes one."""

    name: str
    read: Callable[[str], object]
    kind: str
    many: type | None
    nargs: str | None
    choices: tuple[str, ...]
    containers: tuple[type, ...]
    nullable: bool
    default: object
    alone: object  # its value where the flag stands alone; None: it cannot
    help: str
    metavar: str
    positional: bool

    @classmethod
    def of(cls, field: dataclasses.Field, owner: type, shown: Mapping[str, object]) -> Flag | None:
        """The flag of a field; None for one whose type has no spelling."""
        kind, many, containers, nullable = _read_type(_resolve(field, owner))
        choices: Mapping[str, object] = {}
        if typing.get_origin(kind) is Literal:
            choices = {str(value): value for value in typing.get_args(kind)}
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices = {str(member.value): member for member in kind}
        elif kind not in (str, int, float, bool, dict):
            return None
        elif "choices" in field.metadata:
            choices = {str(value): value for value in field.metadata["choices"]}
        default = field.default if field.default_factory is MISSING else field.default_factory()
        return cls(
            field.name,
            choices.__getitem__ if choices else READERS[kind],
            getattr(kind, "__name__", "str"),
            many,
            "+" if many and field.metadata.get("nargs") is None else field.metadata.get("nargs"),
            tuple(choices),
            containers,
            nullable or default is None,
            shown.get(field.name, default),
            True if kind is bool else field.metadata.get("const"),
            field.metadata.get("help", ""),
            field.metadata.get("metavar") or ("BOOL" if kind is bool else field.name.split("_")[-1].upper()),
            field.metadata.get("positional", False),
        )

    def convert(self, value, where: str):
        """The value of a word, of a list of words, or of what YAML makes of either."""
        if value is None and self.nullable or isinstance(value, self.containers):
            return value
        if self.many:
            return self.many(self._convert(each, where) for each in (value if isinstance(value, list) else [value]))
        return self._convert(value, where)

    def _convert(self, value, where: str):
        try:
            if value is None or isinstance(value, list | dict):
                raise ValueError(value)
            return self.read(str(value))
        except (ValueError, KeyError):
            if not self.choices:
                raise UsageError(f"{where}: invalid {self.kind} value: {value!r}; see --help") from None
        *others, last = self.choices
        known = f"{', '.join(others)} or {last}" if others else last
        raise UsageError(f"{where} must be {known}; got {value}{suggest(str(value), self.choices)}")

    def describe(self) -> str:
        """The help, with the default where it says nothing of one."""
        shown = self.default
        if isinstance(shown, list | tuple):
            shown = " ".join(map(str, shown))
        tells = "default" in self.help or any(self.default is no for no in (None, False, MISSING)) or shown == ""
        return self.help if tells else f"{self.help} (default: {getattr(shown, 'value', shown)})"


def _read_bool(word: str) -> bool:
    return WORDS[word.lower()]


def _read_dict(word: str) -> dict:
    value = yaml.safe_load(word)
    if not isinstance(value, dict):
        raise ValueError(word)
    return value


def _read_float(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value


READERS = {str: str, int: int, float: _read_float, bool: _read_bool, dict: _read_dict}


def _resolve(field: dataclasses.Field, owner: type):
    """The type of a field as its class has it (transformers' own parser changes that of the field); text means something there."""
    if field.name not in getattr(owner, "__dataclass_fields__", ()):  # one of no class
        return field.type
    declaring = _declaring(field, owner)
    annotation = inspect.get_annotations(declaring)[field.name]
    if not isinstance(annotation, str):
        return annotation
    return eval(annotation, vars(sys.modules[declaring.__module__]), dict(vars(declaring)))


def _is_needed(field: dataclasses.Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _declaring(field: dataclasses.Field, owner: type) -> type:
    return next(cls for cls in owner.__mro__ if field.name in inspect.get_annotations(cls))


def _read_type(annotation) -> tuple[object, type | None, tuple[type, ...], bool]:
    """What one word is, what several make, the containers that YAML may give instead, and whether None is a value.

    Of a union, `str | None` or one of transformers' such as `dict | str | None`, words are strings; but `Strategy | str`,
    where None is no value, is a Strategy.
    """
    options = [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        options = list(typing.get_args(annotation))
    nullable = type(None) in options
    options = [option for option in options if option is not type(None)]
    kinds = [typing.get_origin(option) or option for option in options]
    containers = tuple({kind for kind in kinds if kind in (dict, list)} if len(options) > 1 else ())
    if len(options) > 1:
        chosen = str if nullable else next(option for option in options if option is not str)
    else:
        (chosen,) = options
    origin = typing.get_origin(chosen)
    if origin in (list, tuple):
        return typing.get_args(chosen)[0], origin, (), nullable
    return dict if origin is dict else chosen, None, containers, nullable


def groups_of(owner: type) -> list[Group]:
    """The flags of a dataclass: its own, then those of each base, under the base's `title` or the docstring's first line."""
    seen, groups = set(), []
    for cls in (owner, *owner.__bases__):
        names = inspect.get_annotations(cls) if cls is owner else getattr(cls, "__dataclass_fields__", ())
        fields = [f for f in dataclasses.fields(owner) if f.init and "help" in f.metadata]
        fields = [f for f in fields if f.name in names and f.name not in seen]
        # what must be given, then its own, then its bases' as they are listed
        fields.sort(key=lambda f: (not _is_needed(f), owner.__mro__.index(_declaring(f, owner))))
        seen.update(f.name for f in fields)
        if fields:
            groups.append(Group(_title(cls), owner, fields))
    return groups


def _title(cls: type) -> str:
    library = cls.__module__.split(".")[0]
    if library in ("transformers", "trl"):
        return f"{cls.__name__} of {library}"
    return getattr(cls, "title", None) or (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")


class Flags:
    """The flags of dataclasses and groups; the first of a name is that flag.

    Args:
        program: the command, which errors then point to (`lrmt evaluate`); None for a recipe.
        description, examples: what stands before and after the flags in the help. shown: defaults that it shows instead of the
            fields' own.
    """

    def __init__(
        self,
        *sources: type | Group,
        program: str | None = None,
        description: str = "",
        examples: str = "",
        shown: Mapping[str, object] = types.MappingProxyType({}),
    ):
        self.program, self.sources, self.shown = program, sources, shown
        self.quote = "" if program else "`"
        self.flags: dict[str, Flag] = {}
        self.boxes = {}  # of the help, by title
        self.parser = argparse.ArgumentParser(
            prog=program,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        self.parser.error = self.refuse
        for group in (group for source in sources for group in _as_groups(source)):
            self._add(group)
        needed = [f for f in self.flags.values() if f.default is MISSING]
        spelled = (f.metavar + " …" * bool(f.many) if f.positional else f"--{f.name} {f.metavar}" for f in needed)
        self.parser.usage = " ".join(["%(prog)s", *spelled, "[flags]"])

    def _add(self, group: Group) -> None:
        for field in group.fields:
            one = Flag.of(field, group.owner, self.shown)
            if one is None or one.name in self.flags:
                continue
            self.flags[one.name] = one
            if group.title not in self.boxes:
                self.boxes[group.title] = self.parser.add_argument_group(group.title)
            needed = _is_needed(field)
            options = {"help": one.describe().replace("%", "%%"), "metavar": one.metavar}
            if one.alone is not None:
                options |= {"nargs": "?", "const": one.alone}
            elif one.many:
                options["nargs"] = one.nargs
            if one.positional:
                self.boxes[group.title].add_argument(one.name, **options)
            else:
                self.boxes[group.title].add_argument(f"--{one.name}", **options, required=needed)

    def refuse(self, message: str):
        raise UsageError(f"{message}; see {self.program} --help" if self.program else message)

    def normalise(self, words: Sequence[str]) -> list[str]:
        """--some-flag is --some_flag, --no_FLAG is --FLAG=false, and a flag that may stand alone takes no positional word."""
        normal = []
        positional = any(f.positional for f in self.flags.values())
        for place, word in enumerate(words):
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if not word.startswith("--") or word == "--":
                normal.append(word)
            elif name in self.flags:
                follows = words[place + 1 : place + 2]
                alone = self.flags[name].alone is True and positional and (follows or ["-"])[0].lower() not in WORDS
                normal.append(f"--{name}=true" if alone and not equals else f"--{name}{equals}{value}")
            elif not equals and name.removeprefix("no_") in self.flags and self._negates(name):
                normal.append(f"--{name.removeprefix('no_')}=false")
            else:
                normal.append(word)
        return normal

    def _negates(self, name: str) -> bool:
        flag = self.flags[name.removeprefix("no_")]
        return name.startswith("no_") and flag.kind == "bool" and flag.default is not False

    def unknown(self, words: Sequence[str]) -> list[str]:
        """The flags among these words that are none."""
        names = [word.split("=")[0] for word in self.normalise(words) if word.startswith("--") and word != "--"]
        return [name for name in names if name.removeprefix("--") not in {"help", *self.flags}]

    def parse(self, words: Sequence[str]) -> dict[str, object]:
        """What was given, by name. Raises UsageError for what is no flag or no value of it."""
        for name in self.unknown(words):
            near = suggest(name, [f"--{known}" for known in self.flags], self.quote)
            if self.program:
                self.refuse(f"no flag {name}{near}")
            raise UsageError(f"unknown flag `{name}`{near or '; see --help'}")
        given = vars(self.parser.parse_args(self.normalise(words)))
        for name, value in given.items():
            one = self.flags[name]
            where = one.metavar if one.positional else f"{self.quote}--{name}{self.quote}"
            if not (one.alone is not None and value is one.alone):
                given[name] = one.convert(value, where)
        return given

    def read_file(self, path: str | os.PathLike) -> dict[str, object]:
        """The keys of a YAML file. Raises UsageError for one that cannot be read, an unknown key or a wrong type."""
        keys = _read_yaml(str(path))
        for source in self.sources:  # keys that files of before have, and that changed nothing
            for key, value in getattr(source, "of_before", {}).items():
                if key in keys and keys[key] == value:
                    del keys[key]
        for key in keys:
            if key not in self.flags or key == "config":
                near = suggest(str(key), self.flags, "`")
                raise UsageError(f"unknown key in {path} `{key}`{near or '; see --help'}")
        return {key: self.flags[key].convert(value, f"key `{key}` in {path}") for key, value in keys.items()}


def _as_groups(source: type | Group) -> list[Group]:
    return [source] if isinstance(source, Group) else groups_of(source)


def _read_yaml(path: str) -> dict:
    try:
        with open(path, encoding="utf-8-sig") as file:
            keys = yaml.safe_load(file) or {}
    except OSError as error:
        folder = os.path.dirname(path) or "."
        there = sorted(n for n in os.listdir(folder) if n.endswith((".yaml", ".yml"))) if os.path.isdir(folder) else []
        holds = f"; {folder} holds {', '.join(there)}" if there else ""
        raise UsageError(f"`--config` {path}: {error.strerror}{holds}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"`--config` {path} is not YAML: {one_line(error)}") from None
    if not isinstance(keys, dict):
        raise UsageError(f"`--config` {path} must be a mapping of keys to values; got {type(keys).__name__}")
    return keys


def build(source: type | Group, given: Mapping[str, object]):
    """An instance of the dataclass, or a dict of the whole group, from what was given and the defaults."""
    if isinstance(source, Group):
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in source.fields}
        return {name: given.get(name, default) for name, default in defaults.items()}
    return source(**{f.name: given[f.name] for f in dataclasses.fields(source) if f.name in given})


def parse_settings(settings_class: type, words: Sequence[str], program: str) -> tuple[type, dict[str, object]]:
    """What `build` takes of a command of `lrmt`, from its command line."""
    texts = {name: getattr(settings_class, name, "") for name in ("description", "examples")}
    return settings_class, Flags(settings_class, program=program, **texts).parse(words)


def parse_arguments(
    *sources: type | Group, default_config: str | os.PathLike, description: str, args: Sequence[str] | None = None
) -> tuple:
    """An instance of each dataclass and a dict of each group: the command line over `--config FILE` over the defaults.

    Args:
        default_config: the YAML file used where no `--config` is given; the last one wins.

    Raises:
        UsageError: unknown key or flag (with a "did you mean"), a value of the wrong type, an unreadable file.
    """
    words = list(sys.argv[1:] if args is None else args)
    file = flag(None, f"YAML file of any of these keys; default: {os.path.basename(default_config)}", "FILE")
    file.name, file.type = "config", str | None
    every = (Group("Where the flags come from", Flag, [file]), *sources)
    flags = Flags(*every, description=description)
    given = flags.parse([word for word in words if word not in HELP])
    given = flags.read_file(given.pop("config", default_config)) | given
    if HELP & {*words}:  # of what would be used
        Flags(*every, description=description, shown=given).parse(["--help"])
    try:
        return tuple(build(source, given) for source in sources)
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # of transformers and TRL
        raise UsageError(one_line(error)) from None
