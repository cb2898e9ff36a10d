"""What may come out of a call, and a count of what was tried."""

import linecache
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sklearn

import fedrecsk

# Cases by area and by what came out; `conftest.py` writes it where a caller asks for it.
TALLY: Counter[str] = Counter()

# Whose errors speak to the caller.
SPEAKERS = tuple(str(Path(package.__file__).parent) for package in (fedrecsk, sklearn))


@dataclass(frozen=True)
class Refused:
    """A documented error, raised on purpose."""

    error: Exception

    def __str__(self) -> str:
        return str(self.error)


def outcome(
    area: str,
    call: Any,
    errors: tuple[type[Exception], ...] = (ValueError, TypeError),
    warned: tuple[type[Warning], ...] = (UserWarning,),
) -> Any:
    """Return the result of a call or its documented error; anything else fails the test.

    A documented error is of one of the classes that the docstring names, and was raised by a
    ``raise`` of this package or of scikit-learn's checks: an error of the same class out of the
    depths of NumPy or of a parser speaks of our arrays and not of the caller's data.
    """
    TALLY[f"{area} / cases"] += 1
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            result = call()
    except errors as error:
        TALLY[f"{area} / refused"] += 1
        if not raised_on_purpose(error):
            TALLY[f"{area} / undocumented"] += 1
            raise AssertionError(f"raw {type(error).__name__}: {error}") from error
        return Refused(error)
    except Exception as error:
        TALLY[f"{area} / undocumented"] += 1
        raise AssertionError(f"undocumented {type(error).__name__}: {error}") from error
    undocumented = [each for each in heard if not issubclass(each.category, warned)]
    if undocumented:
        TALLY[f"{area} / undocumented"] += 1
        raise AssertionError(f"undocumented warning: {undocumented[0]}")
    TALLY[f"{area} / accepted"] += 1
    return result


def raised_on_purpose(error: BaseException) -> bool:
    """Say whether the innermost line of a traceback is a raise statement of ours."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    line = linecache.getline(file, trace.tb_lineno).strip()
    return file.startswith(SPEAKERS) and line.startswith("raise") and len(str(error)) > 10
