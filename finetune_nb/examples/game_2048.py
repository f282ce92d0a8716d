"""2048 as a text environment: a policy that plays it, move by move.

    run = ft.Run(env=Game2048, env_options={"max_turns": 24, "history": 0}, sampling={"max_tokens": 2})
    run.start(12)

Each move is a reply of the model, and earns what it merges.
"""

from __future__ import annotations

import random
import re
from typing import Any

__all__ = [
    "Game2048",
]

MOVES = ("left", "down", "right", "up")
"""Also told as 1, 2, 3, 4, for models that know few words."""
SIZE = 4


class Game2048:
    """The game of 4 x 4 tiles, with `reset` and `step` as gymnasium has them.

    Args:
        points: Merged tiles of this sum earn a reward of 1.
        tells_rules: Whether the first observation begins with the rules, for models that can read.
    """

    def __init__(self, points: float = 32.0, tells_rules: bool = False) -> None:
        self.points, self.tells_rules = points, tells_rules
        self.random, self.board, self.score = random.Random(0), [0] * SIZE * SIZE, 0

    def reset(self, seed: int = 0) -> tuple[str, dict[str, Any]]:
        """Begin a game.

        Args:
            seed: Decides where new tiles appear.

        Returns:
            The board as text, and the score.
        """
        self.random, self.board, self.score = random.Random(seed), [0] * SIZE * SIZE, 0
        self._add_tile()
        self._add_tile()
        rules = "2048. Merge equal tiles. Reply with one move: left, down, right or up.\n" if self.tells_rules else ""
        return rules + self.text(), self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Make a move.

        Args:
            action: The reply. Its first move counts; without one, and where nothing moves, the board stays as it is.

        Returns:
            The board, the reward (the sum of the merged tiles over `points`), whether no move is left, False, and the score.
        """
        move, merged = move_in(action), 0
        if move is not None:
            after, merged = moved(self.board, move)
            if after != self.board:
                self.board = after
                self._add_tile()
        self.score += merged
        return self.text(), merged / self.points, not moves_of(self.board), False, self._info()

    def text(self) -> str:
        """Four rows; a tile of 2 is 1, one of 4 is 2, one of 8 is 3, and so on, and an empty place a dot."""
        cells = "".join("." if not tile else f"{tile.bit_length() - 1:x}" for tile in self.board)
        return "/".join(cells[start : start + SIZE] for start in range(0, len(cells), SIZE))

    def _add_tile(self) -> None:
        place = self.random.choice([i for i, tile in enumerate(self.board) if not tile])
        self.board[place] = 4 if self.random.random() < 0.1 else 2

    def _info(self) -> dict[str, Any]:
        return {"score": self.score, "largest": max(self.board)}


def move_in(reply: str) -> str | None:
    """The first move that a reply names, as a word or as 1 to 4; None where it names none."""
    found = re.search(r"[1-4]|left|down|right|up", reply.lower())
    if found is None:
        return None
    return MOVES[int(found[0]) - 1] if found[0].isdigit() else found[0]


def moved(board: list[int], move: str) -> tuple[list[int], int]:
    """The board after a move, before a new tile appears; and the sum of the tiles that were merged."""
    after, merged = [0] * len(board), 0
    for line in range(SIZE):
        places = [line * SIZE + i if move in ("left", "right") else i * SIZE + line for i in range(SIZE)]
        if move in ("right", "down"):
            places.reverse()
        tiles = [board[place] for place in places if board[place]]
        row: list[int] = []
        while tiles:
            tile = tiles.pop(0)
            if tiles and tiles[0] == tile:
                tile += tiles.pop(0)
                merged += tile
            row.append(tile)
        for place, tile in zip(places, row, strict=False):
            after[place] = tile
    return after, merged


def moves_of(board: list[int]) -> list[str]:
    """Moves that change the board."""
    return [move for move in MOVES if moved(board, move)[0] != board]
