"""How long and how deep code may get before it wants to be two pieces."""

import ast
from collections.abc import Iterator

import pytest

from tests.source import FUNCTIONS, functions, modules

FILE_LINES = 400
FUNCTION_LINES = 60
OBJECTIVE_STATEMENTS = 15
NESTING = 3
POSITIONS = 6
PARAMETERS = 12

NESTS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.Match)  # `with` opens no second way through
Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_files_and_functions_keep_within_their_budgets():
    assert [complaint for module, text in modules().items() for complaint in over_budget(module, text)] == []


@pytest.mark.parametrize(
    "module, text",
    [
        ("groupwise.run.loop", "x = 1\n" * (FILE_LINES + 1)),
        ("groupwise.run.loop", "def f():\n" + "    x = 1\n" * (FUNCTION_LINES + 1)),
        ("groupwise.objective.kl", "def f():\n" + "    x = 1\n" * (OBJECTIVE_STATEMENTS + 1)),
        ("groupwise.run.loop", "def f():\n for a in b:\n  if a:\n   try: pass\n   finally:\n    while a: pass"),
        ("groupwise.run.loop", "def f(a, b, c, d, e, f, g): pass"),
        ("groupwise.run.loop", "def f(*, a, b, c, d, e, f, g, h, i, j, k, l, m): pass"),
    ],
)
def test_a_planted_excess_is_found(module, text):
    assert len(list(over_budget(module, text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        'def f():\n    """' + "x\n" * 100 + '"""\n    return 1',
        "def f():\n if a: pass\n elif b: pass\n elif c: pass\n elif d: pass\n else: pass",
        "class A:\n def f(self, a, b, c, d, e, f, *, g): pass",
    ],
    ids=["a docstring is no code", "a chain is no nest", "self and keywords take no position"],
)
def test_what_costs_a_reader_nothing_is_not_counted(text):
    assert list(over_budget("groupwise.run.loop", text)) == []


def over_budget(module: str, text: str) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield f"{module} has {lines} lines, at most {FILE_LINES}"
    for function in functions(text):
        name = f"{module}.{function.name}"
        if body_lines(function) > FUNCTION_LINES:
            yield f"{name} has {body_lines(function)} lines, at most {FUNCTION_LINES}"
        if module.startswith("groupwise.objective") and statements(function) > OBJECTIVE_STATEMENTS:
            yield f"{name} has {statements(function)} statements, at most {OBJECTIVE_STATEMENTS}"
        if depth(function) > NESTING:
            yield f"{name} is nested {depth(function)} deep, at most {NESTING}"
        if positions(function) > POSITIONS and not is_command(function):
            yield f"{name} takes {positions(function)} parameters by position, at most {POSITIONS}"
        if positions(function) + len(function.args.kwonlyargs) > PARAMETERS:
            yield f"{name} takes more than {PARAMETERS} parameters"


def after_docstring(function: Function) -> list[ast.stmt]:
    return function.body if ast.get_docstring(function, clean=False) is None else function.body[1:]


def body_lines(function: Function) -> int:
    body = after_docstring(function)
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def statements(function: Function) -> int:
    """Lines that do not depend on where a long call is broken."""
    return sum(len(ast.unparse(statement).splitlines()) for statement in after_docstring(function))


def depth(node: ast.AST) -> int:
    """How many blocks stand inside each other; `elif` and an inner function begin no new level."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, NESTS) and not chained))
    return deepest


def is_command(function: Function) -> bool:
    """Whether it is a command of the command line: its parameters are flags, which are given by name."""
    return any(".command" in ast.unparse(decorator) for decorator in function.decorator_list)


def positions(function: Function) -> int:
    """Parameters that a caller may give without their name, which a reader then has to look up."""
    takes = [*function.args.posonlyargs, *function.args.args]
    return len([one for one in takes if one.arg not in ("self", "cls")])
