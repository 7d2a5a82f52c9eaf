"""What all settings share: strictness, common types, and tables that are one of several kinds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

DType = Literal["auto", "float32", "bfloat16"]
"""`auto`: bfloat16 where the hardware multiplies it natively, else float32."""


Fraction = Annotated[float, Field(gt=0, lt=1)]


def _whole_or_fraction(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError(f"GPUs are whole or a fraction below 1, got {gpus}")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_whole_or_fraction)]


Temperature = Annotated[float, Field(ge=0.01)]
"""Of sampling. vLLM raises what lies between 0 and 0.01 to 0.01, with a warning in its log."""


Port = Annotated[int, Field(ge=0, le=65535)]
"""Of TCP; 0: one that the system hands out."""


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def changed(section: Section, *names: str) -> list[str]:
    """Which settings of a section (of all, or of those named) are not their defaults. By value: a
    configuration that was written out and is read again has set all of them."""
    fields = type(section).model_fields
    return [
        name
        for name in names or fields
        if getattr(section, name) != fields[name].get_default(call_default_factory=True)
    ]


TAG = re.compile(r'^(kind|type) = "\w+"$')


def kind_by(name: str, default: str, known: tuple[str, ...]) -> Callable[[object], str]:
    """Which of several sections a table is, by its key `name`: a discriminator with a default.
    What is none of them goes to the default's section, which refuses it by that key."""

    def tag(value: object) -> str:
        given = value.get(name, default) if isinstance(value, dict) else getattr(value, name, "")
        return f'{name} = "{given if given in known else default}"'

    return tag


def one_of(own: str, known: tuple[str, ...]) -> Callable[[object], object]:
    """Refuses what is none of `known`; the others never get here but for `own`."""

    def check(value: object) -> object:
        if value != own:
            raise PydanticCustomError("unknown", f"input should be one of {', '.join(known)}")
        return value

    return check
