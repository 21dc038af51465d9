"""print_user_error, the excepthook of bundle runs: a mistake is one line, a defect keeps its traceback."""

import pytest

from seg3d_monai.user_errors import print_user_error


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def chained(mistake: Exception, wrapper: Exception) -> Exception:
    try:
        raise wrapper from raised(mistake)
    except Exception as caught:
        return caught


def test_a_wrapped_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = chained(ValueError("axes='QZ' is wrong;\n  give ZYX"), RuntimeError("Failed to instantiate"))
    print_user_error(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == "ValueError: axes='QZ' is wrong; give ZYX\n"


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyboardInterrupt()])
def test_anything_else_keeps_its_traceback(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    print_user_error(type(error), error, None)
    assert type(error).__name__ in capsys.readouterr().err


def test_the_traceback_can_be_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEG3D_TRACEBACK", "1")
    error = raised(ValueError("give ZYX"))
    print_user_error(type(error), error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err
