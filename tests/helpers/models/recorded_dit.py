"""DiTs with the weights that upstream recorded."""

from __future__ import annotations

from parity.kinds.dit import new_dit

from helpers.models.upstream_fixtures import Fixture
from scldm.checkpoints.upstream.names_dit import dit_state_from_upstream
from scldm.nn.dit import DiT

CASES = ["dit_joint", "dit_me_single", "dit_me_two", "dit_me_single_nobias"]


def dit_of(fixture: Fixture) -> DiT:
    dit = new_dit(fixture.facts["config"])
    dit.load_state_dict(dit_state_from_upstream(fixture.under("state/")))
    return dit
