"""Signatures and tables of arguments as the site shows them, read from the source: types have the names that the source gives
them, which a type at run time has lost (two aliases of one type look alike there)."""

import ast
import functools
import html
import importlib
import inspect
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = re.compile(r"\s*#\s*(noqa|type:|pragma:|fmt:)[^\n#]*")  # comments that are for tools
BREAK = re.compile(r"((?<=\w)\.(?=[A-Za-z_])|[([](?=\w))")  # where code in a cell may be broken
FENCE = re.compile(r"^```python\n.*?^```$", re.DOTALL | re.MULTILINE)
WIDTH = 88
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Argument:
    "One line of a table of arguments."

    name: str
    type: str = ""
    default: str = ""
    words: str = ""  # its comment in the source, Markdown
    before: str = ""  # a star, where it takes several values


@dataclass
class Definition:
    "What a name is called with and what it gives."

    name: str  # as one writes it: `function`, `Class` or `Class.method`
    arguments: list[Argument]
    marks: dict[int, str]  # `*` or `/` before the argument of that number
    returns: Argument | None = None
    called: bool = True  # False: a class that nobody makes by a call; its bases stand in `returns`


@functools.cache
def module_source(name: str) -> tuple[ast.Module, dict[int, str]]:
    "A module as a tree, and its comments by line."
    text = Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    return ast.parse(text), comments


def words(comments: dict[int, str], line: int | None) -> str:
    "The comment at the end of a line, without what is for tools."
    return MARK.sub("", comments.get(line or 0, "")).lstrip("# ").strip()


class Unquoted(ast.NodeTransformer):
    "Types that are written as strings become names; what a Literal lists stays."

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return node if ast.unparse(node.value).endswith("Literal") else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node


def written(node: ast.expr | None) -> str:
    "A type as the source names it."
    if node is None:
        return ""
    copy = ast.parse(ast.unparse(node), mode="eval").body
    return ast.unparse(Unquoted().visit(copy))


def default(node: ast.expr | None) -> str | None:
    "A default as the source has it; None where the field of a data class is not an argument."
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "field"):
        return "" if node is None else ast.unparse(node)
    given = {k.arg: k.value for k in node.keywords}
    if "init" in given and ast.unparse(given["init"]) == "False":
        return None
    if "default_factory" in given:
        made = ast.unparse(given["default_factory"])
        return "..." if made.startswith("lambda") else made + "()"
    return ast.unparse(given["default"]) if "default" in given else ""


def of_function(name: str, node: Function, comments: dict[int, str]) -> Definition:
    "The arguments of a function or method; without `self`."
    a, marks = node.args, {}
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    rows = [(x, d, "") for x, d in zip(plain, defaults, strict=True)]
    bound = "." in name and "staticmethod" not in {ast.unparse(d) for d in node.decorator_list}
    rows = rows[1:] if bound else rows
    if a.posonlyargs[1 if bound else 0 :]:
        marks[len(a.posonlyargs) - bound] = "/"
    if a.vararg:
        rows.append((a.vararg, None, "*"))
    elif a.kwonlyargs:
        marks[len(rows)] = "*"
    rows += [(x, d, "") for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    rows += [(a.kwarg, None, "**")] if a.kwarg else []
    last = [(d or x).end_lineno for x, d, _ in rows]  # a comment behind several arguments belongs to none of them
    alone = [line if last.count(line) == 1 and line != node.body[0].lineno else None for line in last]
    arguments = [
        Argument(x.arg, written(x.annotation), default(d) or "", words(comments, line), stars)
        for (x, d, stars), line in zip(rows, alone, strict=True)
    ]
    end = node.returns.end_lineno if node.returns else None
    told = words(comments, end) if end not in last else ""
    return Definition(
        name, arguments, marks, Argument("returns", written(node.returns), "", told) if node.returns else None
    )


def fields(kind: type) -> dict[str, Argument]:
    "The fields of a data class or a named tuple, inherited ones first."
    found: dict[str, Argument] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("steering_vectors"):
            continue
        tree, comments = module_source(base.__module__)
        node = find(tree, base.__qualname__)
        for line in node.body if isinstance(node, ast.ClassDef) else []:
            value = default(line.value) if isinstance(line, ast.AnnAssign) else None
            if isinstance(line, ast.AnnAssign) and value is not None and "ClassVar" not in ast.unparse(line.annotation):
                name = ast.unparse(line.target)
                found[name] = Argument(name, written(line.annotation), value, words(comments, line.end_lineno))
    return found


def of_class(name: str, kind: type, node: ast.ClassDef, comments: dict[int, str]) -> Definition:
    "What a class is made with; for one that is only derived from, its bases."
    own = find(ast.Module(node.body, []), "__init__")
    if isinstance(own, Function):
        made = of_function(f"{name}.__init__", own, comments)
        return Definition(name, made.arguments, made.marks)
    known, protocol = fields(kind), getattr(kind, "_is_protocol", False)
    try:
        asked = {} if protocol else inspect.signature(kind).parameters
    except (TypeError, ValueError):
        asked = {}
    if not asked or set(asked) - set(known):
        return Definition(name, [], {}, Argument("", ", ".join(map(ast.unparse, node.bases))), called=False)
    keyword = [i for i, p in enumerate(asked.values()) if p.kind is p.KEYWORD_ONLY]
    return Definition(name, [known[n] for n in asked], {keyword[0]: "*"} if keyword else {})


def find(tree: ast.AST, name: str) -> ast.AST | None:
    "The definition of a dotted name; the last one where there are overloads."
    node: ast.AST | None = tree
    for part in name.split("."):
        body = getattr(node, "body", [])
        node = next((x for x in reversed(body) if isinstance(x, ast.ClassDef | Function) and x.name == part), None)
    return node


def exported(name: str) -> Any:
    "What the package itself exports under a name."
    return getattr(importlib.import_module("steering_vectors"), name, None)


def source_of(module: str, name: str) -> str:
    "The code of a method, folded; Markdown."
    thing = getattr(importlib.import_module(module), name.split(".")[0], None) or exported(name.split(".")[0])
    try:
        lines = inspect.getsource(functools.reduce(getattr, name.split(".")[1:], thing))
    except (AttributeError, TypeError, OSError):
        return ""
    body = MARK.sub("", textwrap.dedent(lines)).rstrip()
    opening = f'<details class="code-fold"><summary>Source of {name}</summary>'
    return f"```{{=html}}\n{opening}\n```\n\n```python\n{body}\n```\n\n```{{=html}}\n</details>\n```"


def definition(module: str, name: str) -> Definition | None:
    "What is called `name` in a module, or None where that is no function and no class of this package."
    thing = getattr(importlib.import_module(module), name.split(".")[0], None) or exported(name.split(".")[0])
    home = getattr(thing, "__module__", "") or ""
    if not home.startswith("steering_vectors"):
        return None
    tree, comments = module_source(home)
    node = find(tree, name)
    if isinstance(node, ast.ClassDef) and isinstance(thing, type):
        return of_class(name, thing, node, comments)
    return of_function(name, node, comments) if isinstance(node, Function) else None


def signature(d: Definition) -> str:
    "One line where it fits, else one line per argument."
    if not d.called:
        return f"class {d.name}({d.returns.type if d.returns else ''})".replace("()", "")
    parts = []
    for i, a in enumerate(d.arguments):
        parts += [d.marks[i]] if i in d.marks else []
        given = f"{' = ' if a.type else '='}{a.default}" if a.default else ""
        parts.append(f"{a.before}{a.name}{': ' * bool(a.type)}{a.type}{given}")
    parts += [d.marks[len(d.arguments)]] if len(d.arguments) in d.marks else []
    end = f" -> {d.returns.type}" if d.returns else ""
    line = f"{d.name}({', '.join(parts)}){end}"
    return line if len(line) <= WIDTH else "\n".join([f"{d.name}(", *(f"    {p}," for p in parts), f"){end}"])


def as_html(text: str) -> str:
    "A comment as HTML: code, emphasis and links."
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        part = html.escape(part, quote=False)
        if i % 2 == 0:
            part = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', part)
            part = re.sub(r"(?<!\w)\*([^*\s][^*]*)\*(?!\w)", r"<em>\1</em>", part)
        parts[i] = f"<code>{part}</code>" if i % 2 else part
    return "".join(parts)


def documented(
    text: str,  # what `show_doc` gives, Markdown
    module: str,  # where the page's code is
    name: str,
) -> str:  # Markdown
    "The same with the signature as the source has it, and the arguments as a table under the docstring."
    found = definition(module, name)
    if found is None:
        return text
    method = f"\n\n{source_of(module, name)}" if "." in name else ""  # the code of anything else has a cell of its own
    text = FENCE.sub(lambda _: f"```python\n{signature(found)}\n```", text, count=1)
    return f"{text.rstrip()}\n\n{table(found)}".rstrip() + method


def code(text: str) -> str:
    "Code in a cell: it may be broken at brackets and dots, and not inside of words."
    breakable = BREAK.sub(r"\1<wbr>", html.escape(text, quote=False))
    return f"<code>{breakable}</code>" if text else ""


def table(d: Definition) -> str:
    "The arguments as an HTML table; nothing where there are none. A column that would be empty is left out."
    rows = list(d.arguments)
    if d.called and d.returns and d.returns.type not in ("", "None"):
        rows.append(d.returns)
    if not d.arguments or not rows:
        return ""
    columns = {"type": "type", "default": "default", "words": "description"}
    kept = [c for c in columns if any(getattr(row, c) for row in rows)]
    head = "".join(f"<th>{columns[c]}</th>" for c in ["name", *kept] if c != "name")
    lines = []
    for row in rows:
        cells = "".join(
            f'<td class="words">{as_html(row.words)}</td>' if c == "words" else f"<td>{code(getattr(row, c))}</td>"
            for c in kept
        )
        name = "<em>returns</em>" if row is d.returns else code(row.before + row.name)
        lines.append(f"<tr><td>{name}</td>{cells}</tr>")
    return (
        '```{=html}\n<div class="sd-table"><table class="steer-arguments">'
        f"<thead><tr><th>argument</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>\n```"
    )
