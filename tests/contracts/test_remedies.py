"""Advice is followed before it is printed: what a message tells a user to set or to run, a test sets or runs.

The tables are in `tests/helpers/remedies`. A function there makes the case that prints a message, takes the setting or
the command out of the message and applies it, until the case succeeds or another error comes.
"""

from __future__ import annotations

import pytest
from helpers.remedies import cells, jobs, models, outputs, training
from helpers.remedies.collect import ROOT, remedies, remedies_of, texts_of_module
from helpers.remedies.follow import REMEDIES, Case, Remedy
from helpers.remedies.listed import FOLLOWED_ELSEWHERE, NO_ADVICE, NOT_FOLLOWED

TABLES = (cells, jobs, models, outputs, training)
pytestmark = pytest.mark.filterwarnings("ignore")
LISTED = [tuple(text.split(": ", 1)) for text in (*FOLLOWED_ELSEWHERE, *NOT_FOLLOWED, *NO_ADVICE)]
FOLLOWED = [text for remedy in REMEDIES for text in remedy.texts]
EXAMPLE = """
def check(n):
    "Set train.max_steps=3 in a docstring."
    raise InputError(f"there are {n}; set ingest.split.test=0.1")
    raise InputError("no cells: " + ("lower it, or train.export=last" if n else "ask a friend"))
    raise InputError("ingest.source.layer: there is none")
    run("--address=1", typer.Option("--all", help="as --none does"))
    echo(f"no: {'look with `scldm cells verify`' if n else 0}")
"""
WHAT_TO_DO = (
    "Follow each of these texts in a function under tests/helpers/remedies, registered with @follows('module: part of "
    "the text'), or put it into tests/helpers/remedies/listed.py with the reason why no test can follow it:"
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda remedy: remedy.follow.__name__)
def test_advice_leads_on(remedy: Remedy, tmp_path, shared, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remedy.follow(Case(tmp_path, shared, monkeypatch))


def test_every_remedy_is_followed_or_listed_with_a_reason():
    known = [*FOLLOWED, *LISTED]
    new = [
        f"  {x.module}:{x.line}: {x.text}"
        for x in remedies()
        if not any(module == x.module and part in x.text for module, part in known)
    ]
    assert not new, "\n".join([WHAT_TO_DO, *new])


def test_no_entry_is_about_a_text_that_is_gone():
    gone = [
        f"{module}: {part}"
        for module, part in [*FOLLOWED, *LISTED]
        if not any(part in x.text for x in texts_of_module(module))
    ]
    assert not gone, "\n  ".join(["These entries of tests/helpers/remedies fit no text of their module:", *gone])


def test_a_remedy_is_followed_or_listed_and_not_both():
    assert set(FOLLOWED) & set(LISTED) == set()
    assert len(LISTED) == len(set(LISTED))


@pytest.mark.parametrize("test", sorted(set(FOLLOWED_ELSEWHERE.values())))
def test_a_test_that_follows_advice_elsewhere_is_there(test):
    assert (ROOT / test).is_file()


def test_texts_with_a_setting_or_a_command_are_collected():
    assert [x.text for x in remedies_of(EXAMPLE, "module.py")] == [
        "there are {}; set ingest.split.test=0.1",
        "lower it, or train.export=last",
        "look with `scldm cells verify`",
    ]


def test_every_table_is_read():
    assert {remedy.follow.__module__ for remedy in REMEDIES} == {table.__name__ for table in TABLES}
