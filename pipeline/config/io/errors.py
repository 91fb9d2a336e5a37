"""Readable validation errors: the dotted path as in the file, what was given, what is allowed, what was probably meant.

What is allowed is read from the models' own annotations, so it cannot drift from what is enforced. pydantic's paths
also name members of unions, which are not keys of the file; they are dropped here.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.io.yaml import Key, KeyPath, dotted
from pipeline.config.job import Job
from scldm.text import did_you_mean

Place = Callable[..., str]


def explain(error: ValidationError, data: dict[str, Any], place: Place) -> list[str]:
    """Return one line for each problem, in the order of the file's paths.

    Args:
        error: pydantic's error.
        data: The input, to tell keys from union members.
        place: path -> "file:line"; takes whole_section for errors about several keys.
    """
    messages: dict[tuple[KeyPath, str], str] = {}
    for item in error.errors(include_url=False):
        path, expected, model = locate(item["loc"], data)
        kind = item["type"]
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            path = (*path, str(item["ctx"]["discriminator"]).strip("'"))
            kind = "missing" if kind == "union_tag_not_found" else kind
        text = _message(kind, item, path, expected, model, data)
        where = place(path, whole_section=kind == "value_error")
        # Both members of a union may report the same value; once is enough.
        messages.setdefault(
            (path, "" if kind != "extra_forbidden" else kind), f"{where}: {dotted(path) or 'job'}: {text}"
        )
    return list(messages.values())


def _message(kind: str, item: Any, path: KeyPath, expected: str, model: Any, data: dict[str, Any]) -> str:
    if kind == "extra_forbidden":
        if path == (data.get("kind"),):
            return f"unknown key; {_own_settings(str(path[0]), item['input'])}"
        return f"unknown key{_suggest(path, model, job_model(data))}"
    if kind == "missing":
        return f"missing; expected {_tag_choices(item) or expected}"
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if kind == "union_tag_invalid":
        tag = item["input"].get(path[-1])
        choices = [c.strip(" '") for c in item["ctx"]["expected_tags"].split(",")]
        return f"got {as_written(tag)}, expected {_tag_choices(item)}{_hint(str(tag), choices)}"
    got = item["input"]
    meant = _hint(got, re.findall(r'"([^"]*)"', expected)) if isinstance(got, str) else ""
    return f"got {as_written(got)}, expected {expected}{meant}"


def locate(loc: tuple[Key, ...], data: Any) -> tuple[KeyPath, str, Any]:
    """Map pydantic's location to the path in the file, what is allowed there, and the model of the last key."""
    path: list[Key] = []
    holder: Any = None
    here: Any = job_model(data)
    expected = "a job"
    for i, part in enumerate(loc[1:]):  # the first part is the job's kind
        model = model_of(here, data)
        if model is not None:
            if i and part not in model.model_fields and part == _tag(here, data):
                continue  # the member of a discriminated union
            holder, field = model, model.model_fields.get(str(part))
            here = annotation_of(field) if field else None
        elif isinstance(data, dict) and part in data:
            here = _item(here, dict)
        elif isinstance(data, list) and isinstance(part, int):
            here = _item(here, list, part)
        else:
            continue  # the member of a plain union
        path.append(part)
        data = _child(data, part)
        expected = describe(here)
    return tuple(path), expected, holder


def _child(data: Any, part: Key) -> Any:
    try:
        return data[part]
    except (KeyError, IndexError, TypeError):
        return None


# ---- models and annotations --------------------------------------------------------------------------------------
def job_model(data: Any) -> type[BaseModel] | None:
    """Return the model of this kind of job."""
    kind = data.get("kind") if isinstance(data, dict) else None
    return next((m for m in members_of(Job) if kind in get_args(m.model_fields["kind"].annotation)), None)


def model_of(annotation: Any, data: Any) -> type[BaseModel] | None:
    """Return the model of an annotation; for a union with a `type`, the one that the data name."""
    models = [m for m in members_of(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
    if len(models) < 2:
        return models[0] if models else None
    tag = _tag(annotation, data)
    return next((m for m in models if tag in get_args(m.model_fields["type"].annotation)), None)


def _tag(annotation: Any, data: Any) -> Any:
    return data.get("type") if isinstance(data, dict) and len(list(members_of(annotation))) > 1 else None


def annotation_of(field: FieldInfo) -> Any:
    """Return a field's annotation together with its constraints."""
    result: Any = field.annotation
    for extra in field.metadata:
        result = Annotated[result, extra]
    return result


def members_of(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, or the annotation itself."""
    if annotation is None:
        return
    if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in (Union, types.UnionType):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members_of(member)
    else:
        yield annotation


def _item(annotation: Any, container: type, index: int = -1) -> Any:
    """Return the annotation of the items of a dict, list or tuple."""
    for member in members_of(annotation):
        if get_origin(member) is container:
            return get_args(member)[-1]
        if get_origin(member) is tuple and container is list:
            return get_args(member)[min(index, len(get_args(member)) - 1)]
    return Any


def describe(annotation: Any) -> str:
    """Describe what an annotation allows."""
    return " or ".join(dict.fromkeys(_describe_one(m) for m in members_of(annotation))) or "nothing"


def _describe_one(member: Any) -> str:
    limits: list[Any] = []
    while get_origin(member) is Annotated:
        member, *more = get_args(member)
        limits += more
    origin, args = get_origin(member), get_args(member)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(json.dumps(a) for a in args)
    if origin is list:
        return f"a list{_each('item', args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} ({', '.join(describe(a) for a in args)})"
    if origin is dict or origin is Mapping:
        return f"a map{_each('value', args[1])}"
    if isinstance(member, type) and issubclass(member, BaseModel):
        return f"a section with keys {', '.join(member.model_fields)}"
    words = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        types.NoneType: "null",
        Any: "any value",
    }
    return _limited(words.get(member, str(member)), limits)


def _each(what: str, annotation: Any) -> str:
    return "" if annotation is Any else f" (each {what} {describe(annotation)})"


def _limited(noun: str, limits: list[Any]) -> str:
    """Return a noun with its bounds: `a positive integer`, `a number ≥ 0 and < 1`."""
    bounds = []
    for limit in limits:
        if isinstance(limit, at.Gt) and limit.gt == 0:
            noun = f"positive {noun}"
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            bound = getattr(limit, name, None)
            if bound is not None and not (name == "gt" and bound == 0):
                bounds.append(f"{sign} {bound:,}")
        if getattr(limit, "pattern", None):
            bounds.append(f"that matches {limit.pattern}")
    article = "" if noun in ("text", "true or false", "null", "any value") else "an " if noun[0] in "aeiou" else "a "
    return f"{article}{noun}{' ' if bounds else ''}{' and '.join(bounds)}"


# ---- words -------------------------------------------------------------------------------------------------------
def as_written(value: Any) -> str:
    """Return a value as it would be written in the file, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _hint(word: str, choices: list[str]) -> str:
    meant = did_you_mean(word, choices, quote="`")
    return f"; {meant}" if meant else ""


def _tag_choices(item: Any) -> str:
    tags = item.get("ctx", {}).get("expected_tags")
    if tags is None and item["type"] == "union_tag_not_found":
        names = [get_args(m.model_fields["kind"].annotation)[0] for m in members_of(Job)]
        tags = ", ".join(f"'{n}'" for n in names) if not item["loc"] else None
    return "one of " + tags.replace("'", '"') if tags else ""


def _suggest(path: KeyPath, model: Any, job: Any) -> str:
    """Suggest the same key elsewhere in the job, else similar keys of this section, else list the keys of this
    section."""
    key, fields = str(path[-1]), list(model.model_fields) if model is not None else []
    named_so = dict.fromkeys(p for p in all_paths(job) if p.rpartition(".")[2] == key) if job else {}
    # Another member of a union may have the key at this very place. Old cells have a source like the new ones.
    if elsewhere := [p for p in named_so if p.replace("replay.source.", "source.") != dotted(path)][:4]:
        return f" here; did you mean {' or '.join(f'`{p}`' for p in elsewhere)}?"
    return _hint(key, fields) or f"; allowed here: {', '.join(fields)}"


def _own_settings(stage: str, given: Any) -> str:
    """Say where the settings of a job of one stage are, with the first one that was given as an example."""
    path: KeyPath = ()
    while isinstance(given, dict) and given:
        key = next(iter(given))
        path, given = (*path, key), given[key]
    example = f": {dotted(path)} instead of {dotted((stage, *path))}" if path else ""
    return f"a job of kind {stage} has these settings at the top level{example}"


def all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted path that a model allows."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for member in members_of(field.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from all_paths(member, f"{prefix}{name}.")
