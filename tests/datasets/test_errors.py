"""A user's mistake is one sentence and an exit code; a bug keeps its traceback."""

import errno

import pyarrow
import pytest

from d4_datasets.errors import LONGEST, UserError, run_cli, sentence


def fail(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("the bag\n  is empty"), 2, "error: the bag is empty\n"),
        (OSError(errno.ENOSPC, "full", "/data/x"), 2, "error: disk full (/data/x): free some space"),
        (OSError(errno.ENOSPC, "full"), 2, "error: disk full: free some space"),
        (OSError(errno.EFBIG, "large"), 2, "error: a file would become too large: raise the limit"),
        (OSError(errno.EIO, "io", "/data/x"), 2, "error: the disk fails (/data/x): Input/output error\n"),
        (PermissionError(errno.EACCES, "no", "/data/x"), 2, "error: cannot use /data/x: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures_print_one_sentence_and_exit(error, code, text, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_cli(fail(error))
    assert exit_.value.code == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(text)
    assert "Traceback" not in stderr


def test_a_sentence_with_the_endless_names_of_a_damaged_file_keeps_both_ends():
    text = sentence(UserError(f"there is no feature {'[' * 5000}: write one of top, wrist"))
    assert text is not None
    assert len(text) == LONGEST
    assert text.startswith("there is no feature [[")
    assert text.endswith("[[: write one of top, wrist")


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("no errno")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_cli(fail(error))


def test_success_returns_and_a_code_is_passed_on():
    run_cli(lambda: None)
    run_cli(lambda: 0)
    with pytest.raises(SystemExit) as exit_:
        run_cli(lambda: 3)
    assert exit_.value.code == 3


def test_a_damaged_parquet_file_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> None:
        raise pyarrow.ArrowInvalid("Parquet magic bytes not found in footer.\nmore")

    with pytest.raises(SystemExit) as exit_info:
        run_cli(read)
    assert exit_info.value.code == 2
    assert "damaged (Parquet magic bytes not found in footer.)" in capsys.readouterr().err
