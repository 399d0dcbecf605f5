"""Names of the version before: they work for one version and warn."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Make a function take keyword arguments by their old names too: `renamed_arguments(old="new")`.

    An old name gives a DeprecationWarning. An old and its new name together are a TypeError.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def translated(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{old}= is the old name of {new}=: give {new}= alone")
                warnings.warn(f"{old}= is now {new}=", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        translated.renamed = names  # type: ignore[attr-defined]
        return translated  # type: ignore[return-value]

    return decorate
