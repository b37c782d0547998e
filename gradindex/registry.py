"""Implementations by name: a second one is one new file and one registration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from .errors import check_choice

T = TypeVar("T")
Implementation = TypeVar("Implementation")


class Registry(Mapping[str, T]):
    """A mapping from name to implementation.

        PROJECTIONS: Registry[type[BlockMap]] = Registry("projection")

        @PROJECTIONS.register("none")
        class Whole(BlockMap): ...

        PROJECTIONS.check("nome")  # ArgumentError: projection is 'nome', but must be one of: none.

    Args:
        what: what a name is called in errors, such as ``"projection"``.
        order: names that come first, in this order; others follow as they are registered.
    """

    def __init__(self, what: str, order: Sequence[str] = ()) -> None:
        self._what, self._order = what, order
        self._implementations: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Implementation], Implementation]:
        """A decorator that enters a class, or whatever implements it, under ``name`` and leaves it as it is.

        Raises:
            ValueError: the name is taken.
        """

        def enter(implementation: Implementation) -> Implementation:
            if name in self._implementations:
                raise ValueError(f"There is a {self._what} {name!r} already: {self._implementations[name]!r}.")
            self._implementations[name] = implementation  # type: ignore[assignment]  # else its own type were lost
            return implementation

        return enter

    def check(self, name: Any) -> None:
        """Refuse a name that nothing is registered under.

        Raises:
            ArgumentError: says which names there are.
        """
        check_choice(self._what, name, tuple(self))

    def __getitem__(self, name: str) -> T:
        return self._implementations[name]

    def __iter__(self) -> Iterator[str]:
        first = [name for name in self._order if name in self._implementations]
        return iter(first + [name for name in self._implementations if name not in first])

    def __len__(self) -> int:
        return len(self._implementations)
