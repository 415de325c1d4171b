"""The process that renders chat templates: a script that ``server.chat_template`` runs, and that imports none of ours.

A template comes with a model, so it is somebody else's program. Jinja's sandbox keeps it from reaching the
interpreter; here it cannot take more than its time, memory and length either, and what it kills is this process.
One JSON object a line in, one a line out. What templates are given is what transformers gives them
(``transformers.utils.chat_template_utils``), so that a template renders here as it does there.
"""

from __future__ import annotations

import functools
import json
import re
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MESSAGE = 500
# NUL marks where a text is cut before it is encoded, so JSON must leave it as it is.
ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


class GenerationTag(Extension):
    """``{% generation %}``, with which templates mark the answer for training; what stands inside is rendered."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Everything up to ``{% endgeneration %}``, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

    def _rendered(self, caller: Callable[[], str]) -> str:
        return caller()


class PlainDict:
    """``dict(...)`` and ``dict.fromkeys``, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A new dictionary."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(*args)


class PlainNamespace(Namespace):
    """``namespace(...)`` that takes no name with an underscore before it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args  # so that a template may write namespace(self=...)
        names = dict(*given, **kwargs)
        for name in names:
            check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


def check_name(name: Any) -> None:
    """Refuse names that could reach the interpreter."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")


def raise_exception(message: Any) -> NoReturn:
    """What a template calls to refuse a conversation."""
    raise TemplateError(str(message))


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers writes it, without the escapes for HTML that Jinja's own filter puts in."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return ESCAPED_MARK.sub("\\1\0", text)


def template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: no attribute of an object can be reached that could run code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["dict"] = PlainDict()
    environment.globals["namespace"] = PlainNamespace
    return environment


def render(template: jinja2.Template, variables: dict[str, Any], max_length: int) -> str:
    """The text of a template; ValueError where it grows beyond ``max_length`` characters."""
    pieces: list[str] = []
    length = 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_length:
            raise ValueError(f"it makes more than {max_length} characters of them")
    return "".join(pieces)


def answer(compile_template: Callable[[str], jinja2.Template], job: dict[str, Any]) -> dict[str, str]:
    """``{"text"}``, or ``{"error", "kind"}``: kind ``syntax`` for a template that is none, else ``refused``."""
    try:
        template = compile_template(job["template"])
        if job["variables"] is None:
            return {"text": ""}
        return {"text": render(template, job["variables"], job["max_length"])}
    except TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"{error.message} (line {error.lineno})"[:MAX_MESSAGE]}
    except MemoryError:
        return {"kind": "refused", "error": "it takes more memory than a template may"}
    except RecursionError:
        return {"kind": "refused", "error": "it calls itself without an end, or is nested too deep"}
    except Exception as error:  # whatever somebody else's program raises is told, not raised here
        return {"kind": "refused", "error": (str(error) or type(error).__name__)[:MAX_MESSAGE]}


def limit_memory(num_bytes: int) -> None:
    """No more address space than that, where the system can hold a process to it."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, hard))


def main(cpu_s: float, wall_s: float, max_bytes: int) -> None:
    """Answer jobs until the input ends. The timers' signals end the process, whatever it is in the middle of."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends this process itself
    limit_memory(max_bytes)
    # Compiling takes far longer than rendering, and data sets are thousands of conversations.
    compile_template = functools.lru_cache(maxsize=4)(template_environment().from_string)
    has_timers = hasattr(signal, "setitimer")
    for line in sys.stdin.buffer:
        job = json.loads(line)
        if has_timers:
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            signal.setitimer(signal.ITIMER_REAL, wall_s)
        reply = json.dumps(answer(compile_template, job)).encode()
        if has_timers:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
