"""Makes GRIT a PEFT method: `get_peft_model`, `PeftModel.from_pretrained` and the Auto classes know it afterwards.

PEFT has a public `register_peft_method`, but it takes only names that its closed enum `PeftType` lists. Adding one is
the single private step; the rest is the public call.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


def add_peft_type(enum: Any, name: str) -> Any:
    """The member `name` of a string enum, added if it is not there. Copies, pickles and JSON treat it as any other."""
    if name in enum.__members__:
        return enum[name]
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum
    member._sort_order_ = len(enum.__members__)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    type.__setattr__(enum, name, member)  # Enum's own __setattr__ refuses
    assert isinstance(member, Enum)
    return member


def register(name: str, config_class: Any, model_class: Any) -> None:
    """Registers a tuner with PEFT under `name`, once."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    if add_peft_type(PeftType, name.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)
