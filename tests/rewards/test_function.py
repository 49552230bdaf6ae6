"""Function rewards: every way to find one, to call one, and to get it wrong."""

import importlib
import math
import sys
import textwrap
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.reward import RewardRequest, RewardResult
from rlhf_dist.rewards.function import LONGEST_MESSAGE, LONGEST_TRACE, UserFunction, load_function


def write(folder: Path, text: str, name: str = "my_reward.py") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    importlib.invalidate_caches()
    return file


class FunctionReward:
    """A user's function, called once in this process; its first failure is raised."""

    def __init__(self, name: str, path: str) -> None:
        self.function = UserFunction(name, path)

    def __call__(self, given: RewardRequest) -> RewardResult:
        attempt = self.function.attempt(given)
        for failure in attempt.failures.values():
            raise failure.error()
        return RewardResult(self.function.name, attempt.values)


def reward_of(folder: Path, text: str) -> FunctionReward:
    return FunctionReward("r", f"{write(folder, text)}:reward")


def request(**columns) -> RewardRequest:
    return RewardRequest(("p1", "p2", "p3"), ("a", "bb", "ccc"), {key: tuple(value) for key, value in columns.items()})


def test_a_module_function() -> None:
    assert load_function("math:sqrt") is math.sqrt


def test_an_attribute_of_a_class() -> None:
    assert load_function("pathlib:Path.is_absolute") is Path.is_absolute


def test_a_file_by_absolute_path(tmp_path: Path) -> None:
    file = write(tmp_path, "def reward(completions): return [1.0 for _ in completions]")
    assert load_function(f"{file}:reward")(["x", "y"]) == [1.0, 1.0]


def test_a_file_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "def reward(completions): return [2.0]", "inner/relative_reward.py")
    monkeypatch.chdir(tmp_path)
    assert load_function("inner/relative_reward.py:reward")(["x"]) == [2.0]


def test_a_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "def reward(completions): return [3.0]", "reward_beside_the_config.py")
    monkeypatch.chdir(tmp_path)
    assert load_function("reward_beside_the_config:reward")(["x"]) == [3.0]


def test_files_of_one_name_in_two_folders_do_not_meet_and_two_functions_of_a_file_share_it(tmp_path: Path) -> None:
    one = write(tmp_path, "seen = []\ndef reward(completions): return [1.0]\ndef other(completions): return seen", "one/r.py")
    two = write(tmp_path, "def reward(completions): return [2.0]", "two/r.py")
    first, second = load_function(f"{one}:reward"), load_function(f"{two}:reward")
    assert first([""]) == [1.0] and second([""]) == [2.0]
    assert load_function(f"{one}:other").__globals__ is first.__globals__


def test_a_file_can_import_its_neighbours_and_the_search_path_is_put_back(tmp_path: Path) -> None:
    write(tmp_path, "BONUS = 7.0", "neighbour_of_the_reward.py")
    file = write(tmp_path, "from neighbour_of_the_reward import BONUS\ndef reward(completions): return [BONUS]")
    before = list(sys.path)
    assert load_function(f"{file}:reward")([""]) == [7.0]
    assert sys.path == before


def test_a_file_can_define_dataclasses(tmp_path: Path) -> None:
    text = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Row:
            value: float
        def reward(completions): return [Row(4.0).value]
    """
    assert load_function(f"{write(tmp_path, text)}:reward")([""]) == [4.0]


@pytest.mark.parametrize("path", ["math.sqrt", "math:", ":sqrt", "", "file.py"])
def test_no_colon(path: str) -> None:
    with pytest.raises(UserError, match="not the path of a function") as caught:
        load_function(path)
    assert "package.module:function" in caught.value.fix


@pytest.mark.parametrize("path, missing", [("no_such_pkg.rewards:f", "no_such_pkg"), ("json.no_such_module:f", "json.no_such_module")])
def test_the_users_module_is_absent(path: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"there is no module '{missing}'"):
        load_function(path)


def test_an_import_that_fails_inside_a_module_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "import math\nimport no_such_dependency\n", "reward_with_a_dependency.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="imports 'no_such_dependency', which is not installed") as caught:
        load_function("reward_with_a_dependency:reward")
    assert caught.value.where == f"{file}:2"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_import_that_fails_inside_a_file(tmp_path: Path) -> None:
    file = write(tmp_path, "\n\nimport no_such_dependency\n")
    with pytest.raises(UserError, match="imports 'no_such_dependency'") as caught:
        load_function(f"{file}:reward")
    assert caught.value.where == f"{file}:3"


def test_the_file_is_absent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no file {tmp_path / 'gone.py'}"):
        load_function(f"{tmp_path / 'gone.py'}:reward")


@pytest.mark.parametrize("by_module", [True, False])
def test_a_syntax_error_is_named_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_module: bool) -> None:
    file = write(tmp_path, "x = 1\ndef reward(:\n", f"reward_with_bad_syntax_{by_module}.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="syntax error") as caught:
        load_function(f"{file.stem if by_module else file}:reward")
    assert caught.value.where == f"{file}:2"


@pytest.mark.parametrize("line, kind", [("raise KeyError('k')", "KeyError: 'k'"), ("import sys; sys.exit(3)", "SystemExit: 3")])
def test_code_that_fails_while_it_loads(tmp_path: Path, line: str, kind: str) -> None:
    file = write(tmp_path, f"x = 1\n{line}\n")
    with pytest.raises(UserError, match=kind) as caught:
        load_function(f"{file}:reward")
    assert caught.value.where == f"{file}:2"


def test_a_file_that_failed_can_be_mended_and_loaded(tmp_path: Path) -> None:
    file = write(tmp_path, "raise ValueError")
    with pytest.raises(UserError):
        load_function(f"{file}:reward")
    write(tmp_path, "def reward(completions): return [1.0]   # mended")
    assert load_function(f"{file}:reward")([""]) == [1.0]


def test_the_function_is_absent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no function 'rewrd'; did you mean 'reward'"):
        load_function(f"{write(tmp_path, 'def reward(): ...')}:rewrd")


def test_not_callable() -> None:
    with pytest.raises(UserError, match="'pi' in math is a float, not a function"):
        load_function("math:pi")


def test_prompts_completions_and_columns_arrive_as_lists_by_name(tmp_path: Path) -> None:
    text = """
        def reward(prompts, completions, **columns):
            assert type(prompts) is list and type(columns["answer"]) is list and sorted(columns) == ["answer", "level"]
            return [float(len(p) + len(c)) + a for p, c, a in zip(prompts, completions, columns["answer"])]
    """
    result = reward_of(tmp_path, text)(request(answer=[10, 20, 30], level=[1, 2, 3]))
    assert (result.name, result.values) == ("r", (13.0, 24.0, 35.0))


def test_without_kwargs_only_named_columns_are_passed(tmp_path: Path) -> None:
    result = reward_of(tmp_path, "def reward(completions, answer, bonus=1): return [a + bonus for a in answer]")(
        request(answer=[1, 2, 3], other=[0, 0, 0])
    )
    assert result.values == (2.0, 3.0, 4.0)


def test_a_callable_object_and_a_partial(tmp_path: Path) -> None:
    text = """
        import functools
        class Judge:
            def __call__(self, completions): return [0.5] * len(completions)
        def scaled(completions, factor): return [factor] * len(completions)
        judge = Judge()
        half = functools.partial(scaled, factor=0.25)
    """
    file = write(tmp_path, text)
    assert FunctionReward("r", f"{file}:judge")(request()).values == (0.5,) * 3
    assert FunctionReward("r", f"{file}:half")(request()).values == (0.25,) * 3


def test_a_required_column_that_the_data_lacks(tmp_path: Path) -> None:
    reward = reward_of(tmp_path, "def reward(prompts, completions, solution, **kwargs): return [0.0] * len(prompts)")
    with pytest.raises(UserError, match="needs 'solution', which the data does not have; its other columns: answer, level"):
        reward(request(answer=[1, 2, 3], level=[1, 2, 3]))
    with pytest.raises(UserError, match="its other columns: none"):
        reward(request())


def test_positional_only_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="positional-only"):
        reward_of(tmp_path, "def reward(completions, /): return []")


def test_a_data_column_that_would_hide_the_completions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a data column is called 'completions'"):
        reward_of(tmp_path, "def reward(**kwargs): return []")(request(completions=[1, 2, 3]))


def test_an_exception_names_the_users_line_even_when_a_library_raised_it(tmp_path: Path) -> None:
    text = """\
        import json

        def helper(text):
            return json.loads(text)
        def reward(completions):
            return [helper(c) for c in completions]
    """
    reward = reward_of(tmp_path, text)
    with pytest.raises(UserError, match="reward 'r' raised JSONDecodeError: Expecting value") as caught:
        reward(request())
    assert caught.value.where == f"{tmp_path / 'my_reward.py'}:4"


def test_a_failed_call_fails_for_every_row_with_the_users_part_of_the_traceback(tmp_path: Path) -> None:
    attempt = reward_of(tmp_path, "def reward(completions):\n    raise KeyError('k')").function.attempt(request())
    assert attempt.values == (None,) * 3 and sorted(attempt.failures) == [0, 1, 2]
    failure = attempt.failures[0]
    assert (failure.kind, failure.of_call, failure.rows) == ("exception", True, 3)
    assert failure.trace.startswith("Traceback") and "my_reward.py" in failure.trace and "function.py" not in failure.trace


def test_rows_fail_one_by_one_and_the_others_keep_their_scores(tmp_path: Path) -> None:
    attempt = reward_of(tmp_path, "def reward(completions):\n    return [1.0, float('nan'), None]").function.attempt(request())
    assert attempt.values == (1.0, None, None) and list(attempt.failures) == [1]
    assert (attempt.failures[1].kind, attempt.failures[1].of_call) == ("value", False)


@pytest.mark.parametrize("raised", ["SystemExit(3)", "KeyboardInterrupt()", "Mute()", "ValueError('x' * 10**6)", "RecursionError()"])
def test_whatever_it_raises_is_a_failure_of_bounded_length(tmp_path: Path, raised: str) -> None:
    text = f"class Mute(Exception):\n    def __str__(self): raise OSError\ndef reward(completions):\n    raise {raised}"
    failure = reward_of(tmp_path, text).function.attempt(request()).failures[0]
    assert raised.split("(")[0] in failure.what
    assert len(failure.what) < 2 * LONGEST_MESSAGE and len(failure.trace) < 2 * LONGEST_TRACE


def test_a_returned_object_that_raises_is_a_failure(tmp_path: Path) -> None:
    text = "class Odd(list):\n    def __len__(self): raise OSError('odd')\ndef reward(completions):\n    return Odd()"
    assert "raised OSError: odd" in reward_of(tmp_path, text).function.attempt(request()).failures[0].what


def test_an_exception_behind_a_decorator_names_the_users_line(tmp_path: Path) -> None:
    text = "import functools\n@functools.lru_cache\ndef reward(prompts, completions):\n    return []\n"
    with pytest.raises(UserError, match="raised TypeError: unhashable"):
        reward_of(tmp_path, text)(request())


@pytest.mark.parametrize(
    "returned, message",
    [
        ("[1.0]", "returned 1 values for 3 completions"),
        ("[1.0] * 4", "returned 4 values"),
        ("'abc'", "returned str, not a list"),
        ("None", "returned NoneType"),
        ("1.0", "returned float"),
        ("[1.0, '0.5', 1.0]", r"returned '0.5' \(str\) for row 1"),
        ("[1.0, 1.0, float('nan')]", "returned nan for row 2"),
        ("[float('inf'), 1.0, 1.0]", "returned inf for row 0"),
        ("[True, 1.0, 1.0]", "returned True"),
        ("{0: 1.0, 1: 2.0, 2: 3.0}", "returned dict, not a list"),
        ("{0.1, 0.2, 0.3}", "returned set, not a list"),
        ("(c for c in completions)", "returned generator"),
    ],
)
def test_what_a_reward_may_not_return(tmp_path: Path, returned: str, message: str) -> None:
    reward = reward_of(tmp_path, f"def reward(completions):\n    return {returned}")
    with pytest.raises(UserError, match=message) as caught:
        reward(request())
    assert "my_reward.py:1" in caught.value.where


def test_none_abstains_and_numbers_of_libraries_count(tmp_path: Path) -> None:
    text = """
        import numpy, torch
        GIVEN = {"numpy": numpy.array([1, 2, 3]), "torch": torch.ones(3), "none": [None, 1, numpy.float32(2)]}
        def reward(kind): return GIVEN[kind[0]]
    """
    reward = reward_of(tmp_path, text)
    assert reward(request(kind=["numpy"] * 3)).values == (1.0, 2.0, 3.0)
    assert reward(request(kind=["torch"] * 3)).values == (1.0, 1.0, 1.0)
    assert reward(request(kind=["none"] * 3)).values == (None, 1.0, 2.0)
    assert all(type(value) is float for value in reward(request(kind=["torch"] * 3)).values)
