"""Find stop strings in streamed text without giving out their beginnings."""

from __future__ import annotations


class StopStrings:
    """Holds text back while it could still become a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held = stops, ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take text; returns what is safe to give out, and whether a stop string was met.

        The stop string itself and what follows it are never given out. Of several, the one that
        is complete first counts (of these the longest), however the text is cut into tokens.
        """
        if not self._stops:
            return text, False
        self._held += text
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            out, self._held = self._held[: min(found)[1]], ""
            return out, True
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """Give out what was held back, when the text has ended without a stop string."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
