"""Attacks that were tried before, against the exchange in memory: each with its mirror images."""

import pytest

from domain.matching import Side
from tests.adversaries.attacks import ATTACKS, SCENES, Attack, Scene


@pytest.mark.parametrize(("side", "cross"), SCENES)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nobody_takes_what_is_not_theirs(attack: Attack, side: Side, cross: bool) -> None:
    attack(Scene(side, cross))
