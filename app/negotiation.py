"""Content negotiation: which of the formats on offer the caller would like best."""

from dataclasses import dataclass

from app.problems import Problem


@dataclass(frozen=True)
class _Range:
    kind: str
    subtype: str
    quality: float

    def fits(self, media_type: str) -> int:
        """How exactly it names the type: 0 not at all, 3 by its full name."""
        kind, _, subtype = media_type.partition("/")
        if (self.kind, self.subtype) == (kind, subtype):
            return 3
        if (self.kind, self.subtype) == (kind, "*"):
            return 2
        return 1 if (self.kind, self.subtype) == ("*", "*") else 0


def choose(accept: str | None, offered: tuple[str, ...]) -> str:
    """The best of the offered media types (the first one on equal terms). Raises the problem 406."""
    ranges = _parse(accept) if accept and accept.strip() else [_Range("*", "*", 1.0)]
    best = max(offered, key=lambda media_type: _quality(media_type, ranges))
    if _quality(best, ranges) <= 0:
        raise Problem("not-acceptable", f"Accept asks for {accept}; on offer are {', '.join(offered)}.")
    return best


def _quality(media_type: str, ranges: list[_Range]) -> float:
    """The quality of the most exact range that fits, as RFC 9110 has it."""
    fitting = [(span.fits(media_type), span.quality) for span in ranges if span.fits(media_type)]
    return max(fitting)[1] if fitting else 0.0


def _parse(accept: str) -> list[_Range]:
    ranges = []
    for part in accept.split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        kind, slash, subtype = media_type.partition("/")
        if slash:
            ranges.append(_Range(kind, subtype, _weight(parameters)))
    return ranges


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0
