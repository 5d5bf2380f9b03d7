# SPDX-License-Identifier: MIT
"""Everything the command line says, and how it names what failed.

Owns: writing to standard output and error (a closed pipe, a full disk), warnings, the shape of
error lines: the image that was opened, then the file at fault.

Never: decides an exit status (``exits``), shows progress (``progress``).
"""

from __future__ import annotations

import errno
import os
import sys

from mmcow.cli import terminal
from mmcow.errors import LockedError, MmcowError, UsageError

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import Any, TextIO

    from mmcow.cli.signals import Signals
    from mmcow.image import Image

PROGRAM = "mmcow"

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """``text`` as one line that a terminal only shows: what is not printable is escaped.

    Names come from images, and images from strangers: control characters would be acted on, line
    ends forge lines, and Unicode's invisible ones hide or turn round what stands beside them. A
    byte that is no UTF-8 is shown as that byte.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # what os.fsdecode makes of such a byte
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return _SHORT.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


class CommandLineError(UsageError):
    """The command line cannot be understood; the text says what to write instead."""


class OutputError(MmcowError):
    """Standard output could not be written; ``error`` is the system's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror or error}")
        self.error = error


class Ui:
    """One run of the command: its output, its signals, the images it has opened."""

    def __init__(self) -> None:
        self._signals: Signals | None = None
        self.quiet = False
        # The verb has -U, the user did not give it, and what is being opened is only read.
        self.can_share = False
        # What is being opened or worked on, for errors that name no file or another one.
        self.subject: str | None = None
        self._opened: list[tuple[str, frozenset[str]]] = []

    @property
    def signals(self) -> Signals:
        """The stop that the user may ask for."""
        if self._signals is None:
            from mmcow.cli.signals import Signals  # noqa: PLC0415 - slow

            self._signals = Signals()
        return self._signals

    # ---- standard output ----

    @property
    def stdout(self) -> TextIO:
        """The stream itself; OutputError where the program was started without one."""
        stream: TextIO | None = sys.stdout
        if stream is None:
            raise OutputError(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        return stream

    def out(self, text: str, end: str = "\n") -> None:
        """Write ``text`` and a line end. OutputError where that fails."""
        try:
            self.stdout.write(text + end)
        except UnicodeEncodeError:
            encoding = self.stdout.encoding or "ascii"
            self.out(text.encode(encoding, "backslashreplace").decode(encoding), end)
        except OSError as error:
            raise OutputError(error) from error

    def say(self, text: str) -> None:
        """``out``, unless the user wants it quiet."""
        if not self.quiet:
            self.out(text)

    def out_json(self, value: Any) -> None:
        """Write a value in qemu-img's layout."""
        import json  # noqa: PLC0415 - only those who ask for JSON pay for it

        self.out(json.dumps(value, indent=4))

    def flush(self) -> None:
        """Make sure that what was said has arrived."""
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError as error:
            raise OutputError(error) from error
        except ValueError:  # closed by the caller
            pass

    def abandon_output(self) -> None:
        """Nobody takes the output any more: keep the interpreter from trying at exit."""
        stream = sys.__stdout__
        if stream is not None and sys.stdout is stream:
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
            except (OSError, ValueError):
                pass

    # ---- standard error ----

    def note(self, text: str) -> None:
        """Write one line to standard error, prefixed; where that fails, nobody can be told."""
        self.err(f"{PROGRAM}: {printable(text)}")

    def draw(self, text: str) -> None:
        """Replace the line the cursor is in, on standard error's terminal."""
        try:
            sys.stderr.write("\r\x1b[K" + text)
            sys.stderr.flush()
        except (OSError, ValueError):
            pass

    def err(self, text: str) -> None:
        """Write one line to standard error as it is."""
        if sys.stderr is None:
            return
        try:
            self.flush_quietly()
            sys.stderr.write(text + "\n")  # standard error always uses backslashreplace
            sys.stderr.flush()
        except (OSError, ValueError):
            pass

    def warn(self, text: str) -> None:
        """Write a warning."""
        self.note(f"warning: {text}")

    def flush_quietly(self) -> None:
        """Keep the two streams in order on a terminal."""
        if terminal.is_terminal(sys.stdout):
            try:
                sys.stdout.flush()
            except (OSError, ValueError):
                pass

    # ---- what failed ----

    def opened(self, path: str, image: Image) -> None:
        """Remember which files belong to an opened image."""
        files = {path}
        for layer in image.chain:
            files.update((layer.path, layer.data_file))
        self._opened.append((path, frozenset(files)))

    def describe(self, error: BaseException) -> str:
        """The error's text, led by the image that was opened and a hint where there is one."""
        text = str(error) or type(error).__name__
        subject = self._subject_of(error)
        if subject is not None and not text.startswith((f"{subject}:", f"{subject} ")):
            text = f"{subject}: {text}"
        if isinstance(error, LockedError) and self.can_share:
            text += "; -U reads it nevertheless"
        return text

    def _subject_of(self, error: BaseException) -> str | None:
        if isinstance(error, CommandLineError | OutputError):
            return None
        path = getattr(error, "path", None)
        text = str(error)
        for image, files in self._opened:
            if path in files or any(text.startswith(f"{file}:") for file in files):
                return image
        return self.subject
