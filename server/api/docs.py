"""GET /docs: what /openapi.json says, as one page without scripts and without another host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse

router = APIRouter()

Schema = Mapping[str, Any]
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%;display:block;overflow-x:auto}td,th{border-bottom:1px solid #8884;"
    "padding:.2rem .6rem;text-align:left;vertical-align:top}h2{margin-top:2.5rem}code{font-size:.95em}"
    ":root{color-scheme:light dark}"
)
BOUNDS = (
    ("minimum", "from {}"), ("exclusiveMinimum", "above {}"), ("maximum", "to {}"), ("exclusiveMaximum", "below {}"),
    ("minLength", "{} characters or more"), ("maxLength", "at most {} characters"), ("minItems", "{} entries or more"),
    ("maxItems", "at most {} entries"),
)  # fmt: skip


@router.get("/docs", include_in_schema=False)
async def read_docs(request: HttpRequest) -> HTMLResponse:
    """Every route with its fields and statuses."""
    return HTMLResponse(page(request.app.openapi()), headers=HEADERS)


def page(description: Schema) -> str:
    """A description of OpenAPI as HTML."""
    title = escape(f"{description['info']['title']} {description['info']['version']}")
    parts = [f"<h1>{title}</h1><p>The same for programs: <a href='openapi.json'>openapi.json</a></p>"]
    for path, operations in description["paths"].items():
        parts += [operation_html(path, method, operation) for method, operation in operations.items()]
    for name, schema in description["components"]["schemas"].items():
        parts.append(f"<h2 id='{escape(name)}'>{escape(name)}</h2>{described(schema)}{fields_html(schema)}")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}</title>"
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def operation_html(path: str, method: str, operation: Schema) -> str:
    """One route: what it does, what it takes, what it answers."""
    contents: Mapping[str, Any] = operation.get("requestBody", {}).get("content", {})
    bodies = "".join(f"<p>Body ({escape(kind)}): {kind_html(body['schema'])}</p>" for kind, body in contents.items())
    own = next((body["schema"] for body in contents.values() if "properties" in body["schema"]), None)
    rows = [(status, escape(answer["description"])) for status, answer in operation["responses"].items()]
    parameters = [
        (f"<code>{escape(each['name'])}</code>", escape(each.get("description", "")))
        for each in operation.get("parameters", ())
    ]
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2>{described(operation)}{table(parameters)}{bodies}"
        f"{fields_html(own) if own else ''}{answer_html(operation)}{table(rows)}"
    )


def answer_html(operation: Schema) -> str:
    """The keys of a success."""
    content = operation["responses"]["200"].get("content", {}).get("application/json", {})
    return fields_html(content.get("schema", {}))


def described(schema: Schema) -> str:
    """A description as a paragraph."""
    text = schema.get("description", "")
    return f"<p>{escape(text)}</p>" if text else ""


def fields_html(schema: Schema) -> str:
    """An object's fields: name, type and range, default, meaning."""
    required = schema.get("required", ())
    rows = [
        (
            f"<code>{escape(name)}</code>",
            kind_html(field) + (", required" if name in required else default_html(field)),
            escape(field.get("description", "")),
        )
        for name, field in schema.get("properties", {}).items()
    ]
    return table(rows)


def default_html(field: Schema) -> str:
    """The default where it says something."""
    default = field.get("default")
    return f", default {escape(str(default).lower())}" if isinstance(default, bool | int | float) else ""


def kind_html(schema: Schema) -> str:
    """A type and its range, a reference as a link."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            kinds = [kind_html(part) for part in schema[word] if part.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(escape(str(value)) for value in schema.get("enum", [schema.get("const")]))
    kind = escape(str(schema.get("type", "any")))
    if kind == "array" and "items" in schema:
        kind = f"list of {kind_html(schema['items'])}"
    return ", ".join([kind, *bounds(schema)])


def bounds(schema: Schema) -> Iterator[str]:
    """The limits of a schema in words."""
    return (form.format(plain_number(schema[name])) for name, form in BOUNDS if name in schema)


def plain_number(value: float) -> float:
    """A whole number without a point."""
    return int(value) if float(value).is_integer() else value


def table(rows: Sequence[Sequence[str]]) -> str:
    """Cells that are HTML already."""
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{lines}</table>" if rows else ""
