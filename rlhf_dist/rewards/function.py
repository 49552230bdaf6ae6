"""A reward that is a Python function of the user's: found by import path, called by keyword, held to the contract.

This module runs in the function's own process (`rewards.child`), so it imports nothing that takes long to load.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.reward import Attempt, RewardFailure, RewardRequest, checked_attempt

FORM = "write package.module:function or path/to/file.py:function"
LONGEST_MESSAGE, LONGEST_TRACE = 2_000, 20_000
"""Characters of an exception's message and traceback that are kept."""


class UserFunction:
    """`def reward(prompts, completions, **columns) -> list[float | None]`, called with lists of one entry a row. In this process.

    A function without `**kwargs` is given only the arguments that it names, so it may leave out what it does not need.

    Args:
        name: name in metrics and messages.
        path: `package.module:function` or `file.py:function`.

    Raises:
        UserError: the function cannot be loaded, or cannot be called by keyword.
    """

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self._function = load_function(path)
        self._where = f"{path} ({_definition(self._function)})"
        self._named, self._required = self._parameters()

    def attempt(self, request: RewardRequest) -> Attempt:
        """Calls the function once.

        Raises:
            UserError: the function needs a column that the data lacks: no failure of a call, and no policy for failures mends it.
        """
        arguments = self._arguments(request)
        try:
            values = self._function(**arguments)
            return checked_attempt(self.name, values, len(request), self._where)  # inside: what it returned may run the user's code, too
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            return Attempt.failed(len(request), self._raised(error, len(request)))

    def _raised(self, error: BaseException, rows: int) -> RewardFailure:
        what = f"reward {self.name!r} raised {type(error).__name__}: {_shortened(_text(error), LONGEST_MESSAGE)}"
        where = _location(error, _file_of(self._function))
        fix = "mend the function; return None for a row it cannot judge"
        trace = _shortened("".join(traceback.format_exception(type(error), error, _users_part(error))), LONGEST_TRACE)
        return RewardFailure("exception", what, where, fix, trace, rows=rows, of_call=True)

    def _arguments(self, request: RewardRequest) -> dict[str, list[Any]]:
        taken = sorted({"prompts", "completions"} & set(request.columns))
        if taken:
            raise UserError(
                f"a data column is called {taken[0]!r}, a name that rewards receive anyway", where=self._where, fix="rename the column"
            )
        given = {"prompts": request.prompts, "completions": request.completions, **request.columns}
        missing = [parameter for parameter in self._required if parameter not in given]
        if missing:
            columns = ", ".join(sorted(request.columns)) or "none"
            raise UserError(
                f"reward {self.name!r} needs {', '.join(map(repr, missing))}, which the data does not have; its other columns: {columns}",
                where=self._where,
                fix="add the column to the data, or give the parameter a default",
            )
        return {key: list(values) for key, values in given.items() if self._named is None or key in self._named}

    def _parameters(self) -> tuple[frozenset[str] | None, tuple[str, ...]]:
        """The arguments the function takes (None: any), and those it cannot do without."""
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except ValueError:  # some compiled functions do not tell
            return None, ()
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise UserError(
                f"reward {self.name!r} has positional-only parameters",
                where=self._where,
                fix="take prompts, completions and columns by name",
            )
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return None if takes_any else frozenset(p.name for p in by_name), tuple(p.name for p in by_name if p.default is p.empty)


def load_function(path: str) -> Callable[..., Any]:
    """Finds `package.module:function` or `path/to/file.py:function`.

    Relative files start at the working directory. While it loads, a file can import its neighbours, and a module may lie in
    the working directory. A file is loaded once a process, under a module name made from its full path.

    Raises:
        UserError: no colon; module, file or function absent; the code fails while it loads; the name is not callable.
    """
    source, colon, name = path.rpartition(":")
    if not colon or not source or not name:
        raise UserError(f"not the path of a function: {path!r}", where="reward.sources", fix=FORM)
    module = _load_file(source, path) if source.endswith(".py") else _load_module(source, path)
    try:
        function = operator.attrgetter(name)(module)
    except AttributeError:
        close = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{source} has no function {name!r}{hint}", where=path, fix="correct the name after the colon") from None
    if not callable(function):
        raise UserError(
            f"{name!r} in {source} is a {type(function).__name__}, not a function", where=path, fix="name a function after the colon"
        )
    return function


def _load_file(source: str, path: str) -> ModuleType:
    file = Path(source).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"there is no file {file}", where=path, fix="correct the path; a relative one starts at the working directory")
    name = f"rlhf_dist_reward_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        with _importable(str(file.parent), first=True):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _fault(error, path, str(file)) from error
    return module


def _load_module(source: str, path: str) -> ModuleType:
    try:
        with _importable(str(Path.cwd()), first=False):
            return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (source == missing or source.startswith(f"{missing}.")):
            raise UserError(f"there is no module {missing!r}", where=path, fix=f"install it, or {FORM}") from error
        raise _fault(error, path, None) from error


@contextmanager
def _importable(folder: str, *, first: bool) -> Iterator[None]:
    """Puts a folder on the module search path, and takes it off again."""
    sys.path.insert(0 if first else len(sys.path), folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _fault(error: BaseException, path: str, file: str | None) -> UserError:
    if isinstance(error, SyntaxError):
        return UserError(f"{path} has a syntax error: {error.msg}", where=f"{error.filename}:{error.lineno}", fix="mend the syntax")
    where = _location(error, file)
    if isinstance(error, ModuleNotFoundError):
        return UserError(
            f"{path} imports {error.name!r}, which is not installed", where=where, fix=f"install {error.name!r} on every machine of the run"
        )
    return UserError(f"{path} failed while it loaded: {type(error).__name__}: {error}", where=where, fix="mend the code at that line")


def _location(error: BaseException, file: str | None) -> str:
    """file:line of the innermost frame in the user's file; None: the outermost file that is neither ours nor the importer's."""
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours and not f.filename.startswith("<frozen")]
    if not frames:
        return file or "outside Python code"
    wanted = file or frames[0].filename
    frame = next((f for f in reversed(frames) if f.filename == wanted), frames[-1])
    return f"{frame.filename}:{frame.lineno}"


def _file_of(function: Callable[..., Any]) -> str | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_filename if code else None


def _definition(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else type(function).__name__


def _users_part(error: BaseException) -> TracebackType | None:
    """The traceback from the user's first frame on: ours say nothing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def _text(error: BaseException) -> str:
    """The message of an exception whose own `__str__` may be broken."""
    try:
        return str(error)
    except Exception as broken:
        return f"(its message cannot be shown: {type(broken).__name__})"


def _shortened(text: str, limit: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= limit else f"{text[: limit // 2]}\n[… {len(text) - limit} characters left out …]\n{text[-(limit // 2) :]}"
