"""What an expression, a component's name or an import of a configuration may reach, judged from its text alone.

An expression is read with `ast`, references replaced by names; it is never compiled or run. A mark says why somebody
should read the line before the bundle is run. No list of names is complete: an expression without a mark is not thereby
proven harmless. This file must not know files or bundles.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

from seg3d_monai.sharing.ids import REFERENCE, normalise

TRUSTED = frozenset({"seg3d_monai", "monai", "torch"})
"""Packages whose components are not listed."""
QUIET = TRUSTED | {"numpy", "ignite", "math"}
"""Packages whose import is listed and not marked."""
_MODULES = """
    os sys subprocess builtins importlib shutil socket ctypes ctypeslib pickle marshal shelve runpy pydoc pdb pty posix
    nt cffi dill cloudpickle joblib webbrowser requests urllib ftplib smtplib tempfile pathlib gc pip setuptools
    distutils zipimport
"""
_FUNCTIONS = "eval exec compile open input getattr setattr delattr globals locals vars breakpoint help exit quit"
_METHODS = """
    exec open system popen Popen check_call check_output execv execve fork rmtree rmdir unlink write_text write_bytes
    extractall download download_url download_and_extract hub cpp_extension load_inline load_library collect_env
    import_module optional_import run_cmd instantiate locate runstring rundocs f2py PackageImporter ConfigParser
    ConfigWorkflow ConfigExpression PythonicWorkflow create_workflow run_workflow load_submodules safe_eval unpickle
    load_url load_state_dict_from_url bundle auto3dseg benchmark testing
"""
_FRAMES = """
    gi_frame gi_code cr_frame cr_code ag_frame ag_code tb_frame tb_next f_back f_globals f_builtins f_locals f_code
"""
"""Of generators, coroutines and tracebacks: they lead to every global there is."""
_NAMES = frozenset(f"{_MODULES} {_FUNCTIONS}".split())
"""Of variables. As attributes, `eval` and `compile` are methods of every network and functions of torch."""
_ATTRIBUTES = frozenset(f"{_MODULES} {_METHODS} {_FRAMES}".split())
_UNSAFE_ARGUMENTS = {"allow_pickle": True, "weights_only": False}
_REFERENCES = "__local_refs"
"""What MONAI puts in place of references, so that the text that is judged is the one that it evaluates."""
_LONGEST = 20_000


def expression_marks(text: str) -> tuple[str, ...]:
    """Why an expression should be read before it is run.

    Args:
        text: The configuration's value without its `$`.

    Returns:
        One clause each, in the order in which they stand; empty where nothing was found.
    """
    if len(text) > _LONGEST:
        return (f"is longer than {_LONGEST:,} characters",)
    try:
        evaluated = REFERENCE.sub(lambda found: f"{_REFERENCES}[{found[0][1:]!r}]", normalise(text))
        tree = ast.parse(evaluated.strip(), mode="eval")
        found = list(_marks(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ("cannot be read as an expression",)
    return tuple(dict.fromkeys(found))


def imports(text: str) -> list[str] | None:
    """The modules, with the names taken from them, that an import statement imports.

    Args:
        text: The configuration's value without its `$`.

    Returns:
        `torch.nn.Module` for `from torch.nn import Module`; None for what is no import statement.
    """
    try:
        statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not statements or not isinstance(statements[0], ast.Import | ast.ImportFrom):
        return None
    names = []
    for statement in statements:
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            module = "." * statement.level + (statement.module or "")
            names += [f"{module}.{alias.name}" for alias in statement.names]
        else:
            names.append(ast.unparse(statement))  # MONAI leaves it out; whoever reads it should see it
    return names


def import_marks(name: str) -> tuple[str, ...]:
    """Why an import should be read before it is run.

    Args:
        name: Of `imports`.
    """
    parts = name.split(".")
    if parts[0] not in QUIET:
        return (f"imports {name}, which runs that module's code",)
    return tuple(f"reaches {part}" for part in parts[1:] if _is_dangerous(part))


def target_marks(name: object) -> tuple[str, ...]:
    """Why a component should be looked at before it is built.

    Args:
        name: What `_target_` says, references followed.
    """
    if not isinstance(name, str) or name.startswith(("$", "@", "%")):
        return ("the component is known only when it runs",)
    root, *parts = name.split(".")
    if not parts:
        # MONAI looks a short name up among its own classes first, then among built-ins and modules.
        is_class = root[:1].isupper() and root.isidentifier() and not hasattr(builtins, root)
        return () if is_class else (f"{name} is not known to be a class of MONAI",)
    if root not in QUIET:
        return (f"calls {name}, outside of {', '.join(sorted(TRUSTED))}",)
    return tuple(f"reaches {part}" for part in parts if _is_dangerous(part))


def is_listed(name: object) -> bool:
    """Whether a component is listed: it is not in a trusted package, or it is marked."""
    known = isinstance(name, str) and ("." not in name or name.split(".")[0] in TRUSTED)
    return not known or bool(target_marks(name))


def argument_marks(key: str, value: object) -> tuple[str, ...]:
    """Why an argument should be looked at: it lets a loader run code.

    Args:
        key: Its name.
        value: What the configuration gives.
    """
    if key == "pickle_module" or (key in _UNSAFE_ARGUMENTS and value is not (not _UNSAFE_ARGUMENTS[key])):
        return (f"{key} lets a file run code",)
    return ()


def literal_marks(text: str) -> tuple[str, ...]:
    """Why the arguments of a logging configuration, which Python evaluates, are more than literals.

    Args:
        text: `args`, `kwargs` or `class` of a section.
    """
    streams = ("sys.stdout", "sys.stderr")
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ("cannot be read as an expression",)
    plain = (ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Load, ast.UnaryOp, ast.USub)
    inside = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) in streams}
    for node in nodes:
        if isinstance(node, plain) or id(node) in inside:
            continue
        if not (isinstance(node, ast.Attribute) and ast.unparse(node) in streams):
            return ("is evaluated when logging is set up",)
    return ()


def _marks(tree: ast.AST) -> Iterator[str]:
    quiet_imports = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_quiet_import(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            hidden = node.id.startswith("__") and node.id != _REFERENCES and id(node) not in quiet_imports
            if hidden or node.id in _NAMES:
                yield f"uses {node.id}"
        elif isinstance(node, ast.Attribute) and _is_dangerous(node.attr):
            yield f"reaches {node.attr}"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            yield from argument_marks(node.arg, value)
        elif isinstance(node, ast.Call) and _loads_somehow(node):
            yield "loads a file with arguments that cannot be told"


def _loads_somehow(call: ast.Call) -> bool:
    """Whether a loader gets arguments that may let the file run code: the third of `torch.load`, or `**`."""
    is_load = isinstance(call.func, ast.Attribute) and call.func.attr == "load"
    return is_load and (len(call.args) > 2 or any(keyword.arg is None for keyword in call.keywords))


def _is_quiet_import(call: ast.Call) -> bool:
    """`__import__('torch')` and the like."""
    if not (isinstance(call.func, ast.Name) and call.func.id == "__import__"):
        return False
    if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], ast.Constant):
        return False
    name = call.args[0].value
    return isinstance(name, str) and not import_marks(name)


def _is_dangerous(attribute: str) -> bool:
    return attribute in _ATTRIBUTES or (attribute.startswith("_") and attribute != "__version__")
