"""Options written once: fields of a dataclass, which Python takes by keyword and a command as its own.

What `--help` says of a field stands in its annotation, as typer has it: `Annotated[int, typer.Option(help=...)]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def takes(kind: Any, *, but: tuple[str, ...] = (), for_typer: bool = False) -> Callable[[FunctionT], FunctionT]:
    """Let a function with a `**` parameter show the fields of a dataclass in its place, to help() and to typer.

    They stand before the keyword-only parameters.

    Args:
        but: fields that it does not take.
        for_typer: keep what is for typer in the annotations.
    """
    hints = get_type_hints(kind, include_extras=for_typer)
    given = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(kind)
        if each.name not in but
    ]

    def show(function: FunctionT) -> FunctionT:
        signature = inspect.signature(function, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        first = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        last = own[len(first) :]
        function.__signature__ = signature.replace(parameters=[*first, *given, *last])  # type: ignore[attr-defined]
        return function

    return show
