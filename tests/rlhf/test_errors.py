import copy
import inspect
import pickle

import pytest

from rlhf import errors
from rlhf.errors import PavlovError, RunError, UserError

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, BaseException)
]


def example(error_class):
    """An instance with a telling value for each constructor argument."""
    if "__init__" not in vars(error_class):
        return error_class("one clear sentence")
    names = list(inspect.signature(error_class).parameters)
    return error_class(*(f"the {name}" for name in names))


@pytest.mark.parametrize("error_class", CLASSES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling_with_its_attributes(error_class, protocol):
    error = example(error_class)
    copied = pickle.loads(pickle.dumps(error, protocol))
    assert type(copied) is error_class
    assert copied.args == error.args
    assert vars(copied) == vars(error)
    assert str(copied) == str(error)
    assert str(copy.deepcopy(error)) == str(error)


@pytest.mark.parametrize("error_class", CLASSES)
def test_every_error_is_ours_and_stands_in_the_tree(error_class):
    assert issubclass(error_class, PavlovError)
    assert error_class.__name__ in errors.__doc__


@pytest.mark.parametrize("error_class", CLASSES)
def test_what_the_user_can_put_right_exits_with_2_and_all_else_with_1(error_class):
    assert error_class.exit_code == (2 if issubclass(error_class, UserError) else 1)


def test_an_error_is_the_users_or_the_runs():
    for error_class in set(CLASSES) - {PavlovError}:
        assert issubclass(error_class, UserError) != issubclass(error_class, RunError)


def test_a_refused_weight_update_names_the_check():
    error = errors.WeightUpdateError("checksum", "expected 1a, got 2b")
    assert (error.check, error.detail) == ("checksum", "expected 1a, got 2b")
    assert str(error) == "weight update refused by the checksum check: expected 1a, got 2b"
