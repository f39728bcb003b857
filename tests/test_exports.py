"""What `druvarpc` exports: also the types of what users pass to it."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import druvarpc

PACKAGE = Path(druvarpc.__file__).parent
# Names that users need not write: type variables.
VARIABLES = {"A", "F", "S", "T"}


def defined() -> set[str]:
    """Return the classes and aliases at the top level of all modules."""
    found: set[str] = set()
    for path in PACKAGE.glob("**/*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found - VARIABLES


@pytest.mark.parametrize(
    "function",
    [
        druvarpc.connect,
        druvarpc.serve,
        druvarpc.authorize,
        druvarpc.windowed,
        druvarpc.Client.stub,
        druvarpc.Client.club,
        druvarpc.InterceptedCall.wrap_requests,
        druvarpc.InterceptedCall.wrap_responses,
        druvarpc.testing.connected,
    ],
    ids=lambda function: function.__qualname__,
)
def test_types_of_parameters_are_public(function: Callable[..., Any]) -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    annotations = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg)]
    names = {
        node.id
        for annotation in annotations
        if annotation is not None
        for node in ast.walk(annotation)
        if isinstance(node, ast.Name)
    }
    hidden = (names & defined()) - {*druvarpc.__all__, *druvarpc.testing.__all__}
    assert not hidden


def test_every_name_is_there() -> None:
    for name in druvarpc.__all__:
        assert hasattr(druvarpc, name), name
