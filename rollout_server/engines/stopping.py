"""When a completion is over: EOS tokens, stop strings, the token budget."""

from typing import Any


class StopStrings:
    """Watches rows for their stop strings as tokens arrive."""

    def __init__(self, tokenizer: Any, stops: dict[int, list[str]]):
        """`stops`: row -> its stop strings; rows without any are not watched and cost nothing."""
        self.tokenizer = tokenizer
        self.stops = stops
        self.token_ids: dict[int, list[int]] = {row: [] for row in stops}
        # A token may hold one byte of a character, so a string of n bytes may span n tokens; the slack covers what
        # tokenizers do to the first characters of a text.
        self.window = {row: max(len(stop.encode()) for stop in strings) + 8 for row, strings in stops.items()}

    def __bool__(self) -> bool:
        return bool(self.stops)

    def push(self, row: int, token_id: int) -> bool:
        """Take in a row's next token; true when it completes one of the row's stop strings."""
        if row not in self.stops:
            return False
        token_ids = self.token_ids[row]
        token_ids.append(token_id)
        tail = self.tokenizer.decode(token_ids[-self.window[row] :], skip_special_tokens=True)
        return any(stop in tail for stop in self.stops[row])


def cut(text: str, stops: list[str]) -> str:
    """The text before the first stop string in it."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
