"""Text to ids and back. A user's text can never become a control token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from whalepod.errors import CheckpointError

_REPLACEMENT = "\ufffd"


def _byte_signs() -> dict[str, int]:
    """The signs that byte-level vocabularies write bytes with: printable ones stand for themselves."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in kept)
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_signs()


class Tokenizer:
    """The checkpoint's `tokenizer.json`, in two forms.

    One knows the control tokens and one does not, so that `<｜User｜>` typed by a user is encoded
    as ordinary text.
    """

    def __init__(self, data: str) -> None:
        self.data = data
        self._full = tokenizers.Tokenizer.from_str(data)
        fields = json.loads(data)
        self._control = {t["content"]: int(t["id"]) for t in fields["added_tokens"]}
        self._text = tokenizers.Tokenizer.from_str(json.dumps({**fields, "added_tokens": []}))
        self._ids = set(self._control.values())

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer | None:
        """Read `tokenizer.json`; None when the checkpoint has none.

        Raises:
            CheckpointError: the file is there but cannot be used.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return cls(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is no usable tokenizer: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Ids this tokenizer knows, control tokens included."""
        return int(self._full.get_vocab_size(with_added_tokens=True))

    def encode_text(self, text: str) -> list[int]:
        """Encode text; strings that look like control tokens become ordinary tokens."""
        # The batch call lets go of the interpreter lock and computes no offsets: a megabyte takes
        # a third of the time, and other threads run meanwhile.
        (found,) = self._text.encode_batch_fast([text], add_special_tokens=False)
        return list(found.ids)

    def control_id(self, name: str) -> int:
        """Id of a control token such as `<｜User｜>`. Raises KeyError."""
        return self._control[name]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control tokens are written out by name."""
        return str(self._full.decode(list(ids), skip_special_tokens=False))

    def bytes_of(self, token_id: int) -> bytes | None:
        """What an id adds to the text, which may be part of a character; None for an unknown id."""
        token = self._full.id_to_token(token_id)
        if token is None or token_id in self._ids:
            return None if token is None else token.encode()
        return bytes(_BYTES[sign] for sign in token)

    def detokenizer(self) -> Detokenizer:
        """A decoder for one stream of ids."""
        return Detokenizer(self)


class Detokenizer:
    """Decode ids one by one, giving out whole characters only.

    It decodes a short tail again with each id, so the cost of an id does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        """Take an id; returns the text that is now certain, perhaps none."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        # A character may still be on its way: at most 3 bytes, so at most 3 replacement signs.
        if text.endswith(_REPLACEMENT) and len(self._ids) < 8:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Give out what is left, incomplete characters as U+FFFD."""
        return self._take(self._tokenizer.decode(self._ids)) if self._ids else ""

    def _take(self, text: str) -> str:
        self._ids.clear()
        return text
