"""Strings that tokenizers trip over, made from a seed: code, spaces, marks, scripts, emoji, control characters."""

import random

PIECES = [
    "Hello", "world", "the", "def f(x):", "return", "  ", "\n", "\n\n", "\t", " ", "   ", "it's", "I'LL",
    "don't", "123", "4567", "3.14", "\xe9", "\xfc", "\xdf", "na\xefve", "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u043c\u0438\u0440", "\u65e5\u672c\u8a9e", "\u4e2d\u6587", "\ud55c\uad6d\uc5b4", "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u200d", "\xa0", "\u3000", "\x01",
    "\x7f", "\u0301", "a\u0301", "!!!", "...", "?!", "#include <a>", "{}", "[]", "()", "=>", "==", "/*", "*/",
    "//", "_", "__init__", "$", "%", "&", "^", "`", "~", "|", "\\", "<", "<<", ">", "'", "\"", "\u2019s",
    "\u201cq\u201d", "\u2014", "\u2026", "\u2116", "\xbd", "\xb2", "\u0663", "\u0967\u0968", "\ufb01", "\u0133",
    "\r", "\r\n", "\u2028", "\ufeff", "\u0e01\u0e47", "\u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\U0001d518", "\U00020bb7", "<s>", "</s>", "<|endoftext|>",
    "<|user|>", "<|end|>", "<|im_start|>", "<|im_end|>",
]  # fmt: skip
RANGES = [(32, 127), (32, 127), (160, 0x250), (0x370, 0x600), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (1, 32)]


def odd_strings(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)

    def letter() -> str:
        return chr(draw.randrange(*draw.choice(RANGES)))

    def one() -> str:
        kind = draw.random()
        if kind < 0.2:
            return "".join(letter() for _ in range(draw.randint(1, 20)))
        return ("" if kind < 0.8 else " ").join(draw.choice(PIECES) for _ in range(draw.randint(1, 14)))

    return [one() for _ in range(count)]
