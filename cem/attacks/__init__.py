"""Reconstructing images from what a client sends. A file each."""

from cem.attacks.base import Attack
from cem.attacks.decoder import Decoder
from cem.attacks.gan import Gan
from cem.attacks.query_free import QueryFree
from cem.attacks.white_box import WhiteBox
from cem.terms import Family

ATTACKS: Family[type[Attack]] = Family("attacks", Attack, weighted=False)
"""The attacks by the names that ``--attacks`` takes."""
for _member in (Decoder, WhiteBox, Gan, QueryFree):
    ATTACKS.register(_member)

DEFAULT = (Decoder.name, WhiteBox.name)

__all__ = ["ATTACKS", "DEFAULT", "Attack"]
