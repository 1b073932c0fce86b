"""Turn the cells of a notebook into the module that a check can be called on.

Of what stands in a notebook only the answer counts, so nothing is run that trains or draws: all imports, and all of the
cells that are exported or hold an exercise, and the functions, classes and plain values of cells that a student added.
"""

import ast
import inspect
import sys
import types


def tree_of(source):
    "The syntax tree of a cell, without IPython's magics. Raises SyntaxError if it is not Python."
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def names_of(node):
    "The names that a statement defines at the top of a module."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if hasattr(node, "name"):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


def is_stub(node):
    "Whether a function, or some method of a class, still only raises NotImplementedError."
    functions = [function for function in ast.walk(node) if isinstance(function, ast.FunctionDef)]
    last = [function.body[-1] for function in functions]
    return any(isinstance(end, ast.Raise) and "NotImplementedError" in ast.unparse(end) for end in last)


def statements(cells, released, answers):
    """What makes the module of a notebook: [(label of a cell, one statement as a tree)], {name: why its cell is lost}.

    `cells`: what was handed in; `released`: sources of the lesson's own cells; `answers`: names that exercises define.
    Of two definitions of one name the later one counts, unless it is a stub.
    """
    found, written, problems = [], set(), {}
    for number, cell in enumerate(cells, start=1):
        if cell["cell_type"] != "code":
            continue
        source = cell["source"]
        try:
            body = tree_of(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = (
                f"cell {number} is not Python: {getattr(error, 'msg', error)}, line {getattr(error, 'lineno', '?')}"
            )
            problems |= {name: reason for name in answers if name in source}
            continue
        names = {name for node in body for name in names_of(node)}
        whole = source.startswith("#| export") or names & answers
        for node in body:
            defines = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            plain = isinstance(node, (ast.Assign, ast.AnnAssign)) and not any(
                isinstance(part, ast.Call) for part in ast.walk(node)
            )
            own = source.strip() not in released and (defines or plain)
            if isinstance(node, (ast.Import, ast.ImportFrom)) or whole or own:
                if defines and node.name in answers and node.name in written and is_stub(node):
                    continue
                written |= {node.name} if defines and not is_stub(node) else set()
                found.append((f"cell {number}", node))
    return found, problems


def build(cells, released, answers):
    """Run those statements in a new module. Returns its names, and {name: why it is missing}."""
    found, problems = statements(cells, released, answers)
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses look their module up
    for label, node in found:
        try:
            exec(compile(ast.Module([node], []), f"<{label}>", "exec"), module.__dict__)
        except Exception as error:
            problems |= {name: f"{label}: {type(error).__name__}: {error}" for name in names_of(node)}
    return module.__dict__, problems


def verdict(check, names, problems=()):
    "Why an answer among `names` fails its check, in one line, or None if it passes."
    wanted = list(inspect.signature(check).parameters)
    for name in wanted:
        if name not in names:
            return dict(problems).get(name, f"not defined: {name}")
    try:
        check(*(names[name] for name in wanted))
    except NotImplementedError:
        return "not written yet"
    except BaseException as error:  # SystemExit, too: whatever it is, it is not a pass
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = " ".join(f"{error}".split())[:400] or type(error).__name__
        return reason.removeprefix(check.__name__.removeprefix("check_") + ": ")
    return None
