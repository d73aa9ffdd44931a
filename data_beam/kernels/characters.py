"""What every Unicode character is, as one table of flags, looked up for a whole text at once."""

from __future__ import annotations

import functools
import sys
import unicodedata

import numpy as np

from data_beam.kernels.tokens import IDEOGRAPH as _UNSPACED
from data_beam.kernels.tokens import character_classes

# The kind of a character, in the three low bits of its flags. The marks come last.
ABNORMAL, LETTER, DIGIT, SPACE, PUNCTUATION, SYMBOL = range(6)
KIND = 7
WIDE = 8  # takes two columns (East Asian Width W or F)
IDEOGRAPH = 16  # of a script without spaces between words, see `tokens`
TERMINAL = 32  # ends a sentence
CLOSER = 64  # closing quotation mark or bracket: may stand after the end of a sentence
QUOTE = 128  # closing quotation mark
BULLET = 256  # begins an item of a list
SOFT = 512  # ends a line of prose, though no sentence
CONTINUATION = 1024  # what a UTF-8 continuation byte looks like when read as Latin-1 or cp1252

# Sentence terminals (Unicode's Sentence_Terminal) of the scripts in use today, and the ellipsis.
_TERMINALS = ".!?…。！？．｡︒﹒﹖﹗‼‽⁇⁈⁉؟۔।॥။၊።፧։៕។།༎᠃᠉꓿"
_QUOTES = "\"'”’»›」』〞＂＇"
_BRACKETS = ")]}）］｝】〉》〕"
_SOFT = ":;`：；"
_BULLETS = "-*+•‣◦·・●○■□▪–—"
# Zero-width joiners are part of words in Persian, Indic scripts and emoji.
_JOINERS = "\u200c\u200d"


@functools.cache
def flags() -> np.ndarray:
    """[0x110000] uint16: kind and properties by code point.

    Abnormal are controls, the replacement character, private, unassigned and surrogate code points,
    and invisible formatting but for the joiners.
    """
    table = np.full(sys.maxunicode + 1, ABNORMAL, np.uint16)
    kinds = {"L": LETTER, "M": LETTER, "N": DIGIT, "P": PUNCTUATION, "S": SYMBOL, "Z": SPACE}
    # Planes 4 to 16 hold no characters but the variation selectors.
    for point in (*range(0x40000), *range(0xE0100, 0xE01F0)):
        character = chr(point)
        flag = SPACE if character.isspace() else kinds.get(unicodedata.category(character)[0], 0)
        if unicodedata.east_asian_width(character) in "WF":
            flag |= WIDE
        table[point] = flag
    for point in map(ord, _JOINERS):
        table[point] = LETTER
    table[0xFFFD] = ABNORMAL
    table[character_classes() == _UNSPACED] |= IDEOGRAPH
    misread = {chr(byte) for byte in range(0x80, 0xC0)}
    misread.update(bytes(range(0x80, 0xA0)).decode("cp1252", "ignore"))
    for characters, flag in (
        (_TERMINALS, TERMINAL), (_QUOTES, CLOSER | QUOTE), (_BRACKETS, CLOSER),
        (_SOFT, SOFT), (_BULLETS, BULLET), (misread, CONTINUATION),
    ):  # fmt: skip
        for character in characters:
            table[ord(character)] |= flag
    return table


@functools.cache
def quarter_words() -> np.ndarray:
    """[0x110000] uint8: how many quarters of a word a word of `tokens` counts that begins with this
    character.

    A choice, so that limits in words and n-grams mean the same in every script: Chinese words have
    about two characters, Thai ones about four letters.
    """
    quarters = np.where(character_classes() == _UNSPACED, 2, 4).astype(np.uint8)
    for first, last in ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)):
        quarters[first : last + 1] = np.minimum(quarters[first : last + 1], 1)
    return quarters
