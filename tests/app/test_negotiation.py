"""Accept headers, as RFC 9110 has them."""

import pytest

from app.negotiation import choose
from app.problems import Problem

OFFERED = ("image/png", "application/x-npy", "application/json")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "image/png"),
        ("", "image/png"),
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("application/json", "application/json"),
        ("APPLICATION/JSON", "application/json"),
        ("application/*", "application/x-npy"),
        ("text/html, application/json;q=0.5", "application/json"),
        ("image/png;q=0.2, application/x-npy;q=0.9", "application/x-npy"),
        ("application/json, */*;q=0.1", "application/json"),
        ("*/*, image/png;q=0", "application/x-npy"),
        ("image/avif,image/webp,image/png,image/*;q=0.8,*/*;q=0.5", "image/png"),
    ],
)
def test_the_best_of_what_is_offered(accept: str | None, chosen: str) -> None:
    assert choose(accept, OFFERED) == chosen


@pytest.mark.parametrize(
    "accept", ["text/html", "image/png;q=0", "*/*;q=0", "application/json;q=nonsense", "png"]
)
def test_nothing_that_was_asked_for(accept: str) -> None:
    with pytest.raises(Problem, match="image/png, application/x-npy") as caught:
        choose(accept, OFFERED)
    assert caught.value.status == 406
