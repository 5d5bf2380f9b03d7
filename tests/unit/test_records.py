# SPDX-License-Identifier: MIT
"""Records do what named tuples do."""

import copy
import pickle
from typing import NamedTuple

import pytest

from mmcow.records import Record


class Made(Record):
    name: str
    size: int
    flag: bool = False

    def double(self):
        return 2 * self.size


class Oracle(NamedTuple):
    name: str
    size: int
    flag: bool = False


@pytest.mark.parametrize(
    ("values", "named"),
    [(("a", 1), {}), (("a", 1, True), {}), (("a",), {"size": 1}), ((), {"size": 1, "name": "a"})],
)
def test_made_like_a_named_tuple(values, named):
    made, oracle = Made(*values, **named), Oracle(*values, **named)
    assert made == tuple(oracle)
    assert (made.name, made.size, made.flag) == (oracle.name, oracle.size, oracle.flag)
    assert repr(made) == repr(oracle).replace("Oracle", "Made")
    assert made._asdict() == oracle._asdict()
    assert made._replace(size=7) == oracle._replace(size=7)
    assert made.double() == 2
    assert hash(made) == hash(oracle)


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), (("a",), {}), (("a", 1, True, 4), {}), (("a", 1), {"other": 2})],
)
def test_refused_like_a_named_tuple(values, named):
    for kind in (Made, Oracle):
        with pytest.raises(TypeError):
            kind(*values, **named)


def test_it_is_a_value():
    made = Made("a", 1)
    assert pickle.loads(pickle.dumps(made)) == copy.copy(made) == made
    assert isinstance(copy.copy(made), Made)
    with pytest.raises(AttributeError):
        made.size = 2
    with pytest.raises(AttributeError):
        made.other = 2
