# SPDX-License-Identifier: MIT
"""Named tuples that cost nothing to import.

Owns: ``Record``: ``typing.NamedTuple`` for type checkers, and at run time the part of it that mmcow
uses, without ``typing`` and ``collections``, which take as long to import as the interpreter takes
to start. For what ``mmcow info`` needs; elsewhere ``NamedTuple`` is as good, and faster to make.

Never: has a field whose default is changed.
"""

from __future__ import annotations

from _operator import itemgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
    from typing import NamedTuple as Record
else:

    class _Meta(type):
        def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> type:
            fields = tuple(space.get("__annotations__", ()))
            defaults = {field: space.pop(field) for field in fields if field in space}
            for number, field in enumerate(fields):
                space[field] = property(itemgetter(number))
            space |= {"__slots__": (), "_fields": fields, "_defaults": defaults}
            return super().__new__(cls, name, bases, space)

    class Record(tuple, metaclass=_Meta):  # noqa: SLOT001 - the metaclass sees to that
        """A tuple whose items have names: the annotated ones of its class, in order."""

        def __new__(cls, *values: Any, **named: Any) -> Record:  # noqa: D102, PYI034
            fields = cls._fields
            if named or len(values) != len(fields):
                given = {**cls._defaults, **dict(zip(fields, values, strict=False)), **named}
                if len(values) > len(fields) or given.keys() != set(fields):
                    raise TypeError(f"{cls.__name__} takes {', '.join(fields)}")
                values = [given[field] for field in fields]
            return tuple.__new__(cls, values)

        def __getnewargs__(self) -> tuple[Any, ...]:
            return tuple(self)

        def __repr__(self) -> str:
            shown = ", ".join(f"{field}={self[n]!r}" for n, field in enumerate(self._fields))
            return f"{type(self).__name__}({shown})"

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **changed: Any) -> Record:
            return type(self)(**{**self._asdict(), **changed})


__all__ = ["Record"]
