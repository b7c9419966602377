"""Options: fields of config dataclasses, whose annotations hold type and range.

`rounds: Annotated[int, Ge(1)] = 2` holds wherever a value comes from: command line, file or Python.
"""

import math
import os
from collections.abc import Callable
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import wraps
from operator import is_
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, Predicate

from rrhf_fast.data.checks import printed
from rrhf_fast.stages.other_names import hint_for_name, hint_for_value

# Options that name files or folders, or may.
_FILES = {
    "data", "train_data", "eval_data", "ranking_data", "output", "output_dir", "baseline", "model",
    "model_name_or_path", "reward_model_name_or_path", "reference_model_name_or_path",
    "checkpoint", "resume_from_checkpoint", "init_optimizer_from",
}  # fmt: skip
# Options of earlier versions, with the only value that they took: stored configs may hold them.
REMOVED = {"lora_dropout": 0.0}


def check(config: object) -> None:
    """Raise ValueError, with the option's name, unless each field, also of a config within this
    one, has the type and range of its annotation. Ranges of numbers are those of annotated_types; a
    Predicate's docstring says what it expects. Paths become text, and ~ in names of files the home
    folder."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if (plain := _plain(name, value)) is not value:
            setattr(config, name, value := plain)
        problem = _mismatch(value, kind)
        if problem and get_origin(kind) is list and isinstance(value, str):
            problem = f"a list, [{value[:40]}]"
        if problem:
            hint = hint_for_value(name, value)
            raise ValueError(f"{name}: expected {problem}, found {printed(value)}{hint}")
        if problem := _unfit(value):
            raise ValueError(f"{name}: expected {problem}, found {printed(value)}")
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            if is_dataclass(item):
                check_within(f"{name}[{i}]" if item is not value else name, check, item)


def _plain(name: str, value: object) -> object:
    """A path as text, and names of files without ~."""
    if isinstance(value, PurePath):
        value = str(value)
    if name not in _FILES:
        return value
    if isinstance(value, list):
        items = [_plain(name, item) if isinstance(item, str | PurePath) else item for item in value]
        return value if all(map(is_, items, value)) else items
    return os.path.expanduser(value) if isinstance(value, str) and value[:1] == "~" else value


def check_magnitudes(config: object) -> None:
    """Raise ValueError, with the option's name, for a number that arithmetic in float32 would turn
    into infinity: it would end in a model or in scores that are none."""
    for name, value in vars(config).items():
        if isinstance(value, float) and abs(value) > 1e30:
            raise ValueError(f"{name}: expected at most 1e30, found {value}")


def check_temperature(value: float | None) -> None:
    """Raise ValueError for a temperature that logits in float32 cannot be divided by."""
    if value is not None and 0 < value < 1e-6:
        problem = f"expected at least 1e-6 (or method greedy), found {value}"
        raise ValueError(f"temperature: {problem}")


def check_within(name: str, test: Callable[[Any], None], config: object) -> None:
    """Call `test` with the config that the option `name` holds; its ValueErrors get that name."""
    try:
        test(config)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def check_names(config_class: type, options: dict, where: str, *, dotted: bool) -> None:
    """Raise ValueError, beginning with `where`, for names in a mapping, or within it, that are no
    options of the config class. If `dotted`, names may be paths: {"train.seed": 1}."""
    kinds, unknown = get_type_hints(config_class), []
    for key, value in options.items():
        name, _, rest = str(key).partition(".") if dotted else (str(key), "", "")
        if name not in kinds and (name not in REMOVED or value != REMOVED[name]):
            near = get_close_matches(name, kinds, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            if (of_others := hint_for_name(name, kinds.keys())) is not None:
                hint = of_others
            if name == "hub_token":  # of transformers
                hint = " (set HF_TOKEN, or log in by hf auth login: options are written to files)"
            unknown.append(f"{name}: no such option{hint}")
    if unknown:
        path = where.rpartition(" ")[2]  # of options; before it may be the name of a file
        raise ValueError(where + f"; {path}".join(unknown))
    for key, value in options.items():
        name, _, rest = str(key).partition(".") if dotted else (str(key), "", "")
        kind, value = kinds.get(name), {rest: value} if rest else value
        if get_origin(kind) is list and isinstance(value, list):
            within = [(get_args(kind)[0], f"{name}[{i}]", item) for i, item in enumerate(value)]
        elif get_origin(kind) is list and rest:
            within = [(get_args(kind)[0], name, value)]
        else:
            within = [(kind, name, value)]
        for kind, path, item in within:
            if is_dataclass(kind) and isinstance(item, dict):
                check_names(kind, item, f"{where}{path}.", dotted=dotted and path == name)


def with_hints(config_class: type) -> type:
    """The same dataclass, whose TypeError for an argument that it has not says what was meant."""
    init = config_class.__init__

    @wraps(init)
    def hinting(self, *args, **options) -> None:
        if unknown := options.keys() - config_class.__dataclass_fields__.keys():
            try:
                check_names(config_class, dict.fromkeys(sorted(unknown)), "", dotted=False)
            except ValueError as error:
                raise TypeError(f"{config_class.__name__}: {error}") from None
        init(self, *args, **options)

    config_class.__init__ = hinting
    return config_class


def as_config(config_class: type, options: object, name: str) -> object:
    """The mapping that the option `name` holds as a config, or each one in its list; another value
    as it is, for `check` to refuse."""
    if isinstance(options, list | tuple):
        return [
            as_config(config_class, item, f"{name}[{i}]") if isinstance(item, dict) else item
            for i, item in enumerate(options)
        ]
    if not isinstance(options, dict):
        return options
    check_names(config_class, options, f"{name}.", dotted=False)
    return config_class(**{key: value for key, value in options.items() if key not in REMOVED})


def limits(kind: Any) -> list[str]:
    """The limits in an annotation, in words, such as ["more than 0", "at most 1"]."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return [_limit(limit)[0] for limit in args[1:]]
    inner = args if origin in (Union, UnionType) else []
    return [words for option in inner for words in limits(option)]


def without_removed(options: dict) -> dict:
    """A stored config, and those within it, without options that only earlier versions had."""
    return {
        name: without_removed(value) if isinstance(value, dict) else value
        for name, value in options.items()
        if name not in REMOVED
    }


def describe(kind: Any) -> str:
    """An annotation in words, such as "int, at least 1, or auto". None is not named."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return ", ".join([describe(args[0]), *limits(kind)])
    if origin in (Union, UnionType):
        return ", or ".join(describe(option) for option in args if option is not NoneType)
    if origin is Literal:
        # In quotes, as YAML files need them: without, these two are true and false.
        *others, last = (repr(word) if word in ("on", "off") else word for word in args)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (list, dict):
        return f"{origin.__name__} of {' to '.join(map(describe, args))}"
    return "dict" if is_dataclass(kind) else kind.__name__


def fits(value: object, kind: Any) -> bool:
    """Whether the value has the type and range of the annotation."""
    return _mismatch(value, kind) is None


def _unfit(value: object, depth: int = 0) -> str | None:
    """What is expected of the plain data within a value, if it is not so: what JSON can hold and
    systems accept as names of files."""
    if isinstance(value, str):
        if "\0" in value:
            return "a text without NUL"
        is_whole = value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
        return None if is_whole else "valid Unicode"
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "a number below 2**63"
    if isinstance(value, float):
        return None if math.isfinite(value) else "finite numbers"
    if isinstance(value, list | tuple | dict):
        if depth > 50:
            return "less nesting"
        within = [*value, *value.values()] if isinstance(value, dict) else value
        return next((bad for item in within if (bad := _unfit(item, depth + 1))), None)
    is_plain = value is None or is_dataclass(value)
    return None if is_plain else "texts, numbers, lists and mappings"


def _mismatch(value: object, kind: Any) -> str | None:
    """What an error says was expected, if the value does not fit the annotation."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        problems = [_mismatch(value, option) for option in args]
        if None in problems:
            return None
        pairs = zip(problems, args, strict=True)
        return ", or ".join(problem for problem, option in pairs if option is not NoneType)
    if origin is Annotated and _is_of(value, args[0]):
        is_fit = abs(value) < math.inf and all(_limit(limit)[1](value) for limit in args[1:])
        return None if is_fit else ", ".join(limits(kind))
    return None if _is_of(value, kind) else describe(kind)


def _is_of(value: object, kind: Any) -> bool:
    """Whether the value is of a type without limits; an int is a float too, and a bool no int."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and not any(_mismatch(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and not any(
            _mismatch(name, args[0]) or _mismatch(item, args[1]) for name, item in value.items()
        )
    if kind in (int, float):
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    return origin is not Annotated and isinstance(value, kind)


def _limit(limit: object) -> tuple[str, Callable[[Any], bool]]:
    """What one limit of a number expects, in words and as a test."""
    match limit:
        case Ge(low):
            return "0 or more" if low == 0 else f"at least {low}", lambda value: value >= low
        case Gt(low):
            return f"more than {low}", lambda value: value > low
        case Le(high):
            return f"at most {high}", lambda value: value <= high
        case Lt(high):
            return f"below {high}", lambda value: value < high
        case Predicate(test):
            return test.__doc__, test
    raise TypeError(f"{limit} is no limit that options know")
