"""How commands end when something goes wrong."""

from __future__ import annotations

import errno
import os

import pytest

from compressor.errors import CompressorError
from compressor.streams import exits_cleanly


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CompressorError("too long"), "error: too long"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out/log"), "cannot use out/log (Permission denied)"),
        (
            NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "file/x"),
            "cannot use file/x (Not a directory)",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "standard output could not be written (No space left on device); free some space",
        ),
    ],
)
def test_what_a_person_can_mend_ends_with_status_2_and_one_line(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @exits_cleanly
    def command() -> None:
        raise error

    assert command() == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_other_errors_keep_their_traceback() -> None:
    @exits_cleanly
    def command() -> None:
        raise OSError("the hub did not answer")

    with pytest.raises(OSError, match="the hub"):
        command()
