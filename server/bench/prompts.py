"""Prompts to measure with: the suites that ship beside this file, or a JSONL file of the user's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUITES = Path(__file__).parent / "suites"


class SuiteError(ValueError):
    """A suite that is unknown, or a file of prompts that is wrong; the message names the line."""


@dataclass(frozen=True)
class Prompt:
    """Either ``text``, to be continued as it stands, or ``turns``: what a user says, one after another, in a chat."""

    name: str
    text: str | None = None
    turns: tuple[str, ...] = ()

    def as_chat(self) -> Prompt:
        """The text as the one turn of a chat."""
        return self if self.text is None else Prompt(self.name, turns=(self.text,))


def list_suites() -> list[str]:
    """Names of the suites that ship."""
    return sorted(path.stem for path in SUITES.glob("*.jsonl"))


def load_prompts(suite: str, limit: int | None = None) -> list[Prompt]:
    """The first ``limit`` prompts of a suite, or of a JSONL file with ``prompt`` or ``turns`` a line.

    Errors: SuiteError.
    """
    file = SUITES / f"{suite}.jsonl" if suite in list_suites() else Path(suite).expanduser()
    if not file.is_file():
        raise SuiteError(f"{suite!r} is neither a suite ({', '.join(list_suites())}) nor a file")
    prompts: list[Prompt] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and (limit is None or len(prompts) < limit):
                    prompts.append(parse_line(line, f"{file.name}, line {number}"))
    except UnicodeDecodeError as error:
        raise SuiteError(f"{file} is not UTF-8 text: {error}") from error
    if not prompts:
        raise SuiteError(f"{file} holds no prompts")
    return prompts


def parse_line(line: str, place: str) -> Prompt:
    """One line of a suite; ``place`` is how an error calls it."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise SuiteError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("turns" in row):
        raise SuiteError(f"{place} must be an object with either 'prompt' or 'turns'")
    name = str(row.get("id", place))
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise SuiteError(f"{place}: 'prompt' must be a text that is not empty")
        return Prompt(name, text=row["prompt"])
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise SuiteError(f"{place}: 'turns' must be a list of texts, none of them empty")
    return Prompt(name, turns=tuple(turns))
