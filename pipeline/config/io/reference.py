"""The reference of all settings, docs/configuration.md, made from the models that validate them.

The meaning of a setting is the text under it in its model. A section that occurs in several places is written once; the
others refer to it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config.io.errors import annotation_of, describe, members_of
from pipeline.config.io.units import UNITS
from pipeline.config.job import STAGE_CONFIGS, JobBase

HEAD = """# Settings

<!-- Made by `scldm config reference`; change the models in pipeline/config, not this page. -->

Every key that a job file may hold, with its type, default and unit. A job of `kind: pipeline` has the sections
`ingest`, `train_vae`, `encode`, `train_flow`, `generate` and `evaluate`, and may have `distil`; a job of one stage has
that stage's keys at the top level. On the command line: `scldm run jobs/demo.yaml train_vae.train.max_steps=20`. An
unknown key or a value of another type is an error, and `scldm validate JOB` names all of them with their lines.
`scldm config schema` prints the same as a JSON schema, for editors.

Unit 1 is a number without a unit. A default in *italics* is a section of its own.
"""


def reference() -> str:
    """Return the reference as Markdown: the keys of every job, then of each stage."""
    written: dict[type[BaseModel], str] = {}
    lines = [
        HEAD,
        "## In every job",
        "",
        "`kind` says which: " + ", ".join(f"`{k}`" for k in ("pipeline", *STAGE_CONFIGS)) + ".",
    ]
    lines += ["", *_section(JobBase, "", written)]
    for stage, model in STAGE_CONFIGS.items():
        lines += [f"## {stage}", "", _about(model), "", *_section(model, stage, written)]
    return "\n".join(lines).rstrip() + "\n"


def numbers() -> Iterator[tuple[str, str]]:
    """Yield (dotted path, name) of every numeric setting."""
    for at, _, name, field in _settings():
        if any(_is_number(m) for m in members_of(annotation_of(field))):
            yield f"{at}.{name}", name


def undescribed() -> Iterator[str]:
    """Yield settings that have neither a text nor a section with one."""
    for at, model, name, field in _settings():
        if not _is_tag(name, field) and not _meaning(field):
            yield f"{at}.{name} ({model.__module__}.{model.__name__})"


def _settings() -> Iterator[tuple[str, type[BaseModel], str, FieldInfo]]:
    """Yield (dotted path of the section, its model, name, field) of every setting; each model once."""
    seen: set[type[BaseModel]] = set()
    todo: list[tuple[str, type[BaseModel]]] = [("job", JobBase), *STAGE_CONFIGS.items()]
    while todo:
        at, model = todo.pop(0)
        if model in seen:
            continue
        seen.add(model)
        for name, field in model.model_fields.items():
            yield at, model, name, field
            todo += [(f"{at}.{name}", m) for m in _models(field)]


# ---- sections ----------------------------------------------------------------------------------------------------
def _section(model: type[BaseModel], path: str, written: dict[type[BaseModel], str]) -> list[str]:
    """Return a table of the keys of a model, and the sections below it that were not written yet."""
    written.setdefault(model, path)
    fields = {n: f for n, f in model.model_fields.items() if not _is_tag(n, f)}
    lines = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    lines += [_row(name, field, written, path) for name, field in fields.items()]
    lines.append("")
    for name, field in fields.items():
        below = f"{path}.{name}" if path else name
        for inner in _models(field):
            if inner not in written:
                written[inner] = below
                lines += [_heading(below, inner), "", _about(inner), "", *_section(inner, below, written)]
    return lines


def _heading(path: str, model: type[BaseModel]) -> str:
    tag = model.model_fields.get("type")
    kind = f", type {get_args(tag.annotation)[0]}" if tag is not None and _is_tag("type", tag) else ""
    return f"### {path}{kind}"


def _row(name: str, field: FieldInfo, written: dict[type[BaseModel], str], path: str) -> str:
    below = f"{path}.{name}" if path else name
    sections = _models(field)
    meaning = _meaning(field)
    elsewhere = [written[m] for m in sections if m in written and written[m] != below]
    if elsewhere:
        meaning += f" Keys as in `{elsewhere[0]}`."
    unit = UNITS.get(name, "") if any(_is_number(m) for m in members_of(annotation_of(field))) else ""
    cells = (f"`{name}`", _type(field), _default(field), unit, meaning)
    return "| " + " | ".join(_cell(c) for c in cells) + " |"


def _type(field: FieldInfo) -> str:
    """Return the type of a setting; sections are referred to by name."""
    plain = [m for m in members_of(annotation_of(field)) if not _is_model(m)]
    kinds = [get_args(m.model_fields["type"].annotation)[0] for m in _models(field) if "type" in m.model_fields]
    written = field.default.model_dump() if isinstance(field.default, BaseModel) else None
    if isinstance(written, int):  # a range that is written as one number where both ends are the same
        plain.append(int)
    words = [f"a section (type: {', '.join(kinds)})"] if kinds else ["a section"] if _models(field) else []
    return " or ".join([*words, *dict.fromkeys(_word(m) for m in plain)])


def _word(member: Any) -> str:
    if get_origin(member) is Literal:
        return ", ".join(f"`{a}`" for a in get_args(member))
    return describe(member)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        plain = value.model_dump(mode="json")
        return "*its defaults*" if isinstance(plain, dict) else f"`{plain}`"
    return f"`{json.dumps(value)}`"


def _meaning(field: FieldInfo) -> str:
    if field.description:
        return " ".join(field.description.split())
    return " ".join(filter(None, (_about(m) for m in _models(field)[:1])))


def _about(model: type[BaseModel]) -> str:
    """Return the first paragraph of a model's docstring."""
    own = model.__dict__.get("__doc__") or ""
    return " ".join(inspect.cleandoc(own).split("\n\n")[0].split())


# ---- fields ------------------------------------------------------------------------------------------------------
def _models(field: FieldInfo) -> list[type[BaseModel]]:
    return [m for m in members_of(annotation_of(field)) if _is_model(m)]


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _is_tag(name: str, field: FieldInfo) -> bool:
    """Return whether a key selects the member of a union; it is shown in the heading."""
    return name == "type" and get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _is_number(member: Any) -> bool:
    while hasattr(member, "__metadata__"):
        member = get_args(member)[0]
    if get_origin(member) in (dict, list, tuple):
        return any(_is_number(a) for a in get_args(member)[-1:])
    if get_origin(member) is Literal:
        return all(isinstance(a, int) and not isinstance(a, bool) for a in get_args(member))
    return member in (int, float) or (_is_model(member) and member.__name__ in ("WorkerRange", "ActorRange"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").strip()
