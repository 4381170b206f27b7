"""Tiles of attention of which a pass without data runs one of each kind, and counts it as often as there are such.

A pass has hundreds of tiles and a dozen kinds of them. Nothing is known here of what a tile takes: the code that runs
all of them runs those that are handed out, and the meter multiplies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator

from groupwise.learn.meter import Meter
from groupwise.models.attention import Tiles
from groupwise.models.tiles import Options, Tile


class CountedTiles(tuple[Tile, ...]):
    """Tiles that are gone through kind by kind, while the meter counts what is done as often as a kind is there."""

    meter: Meter

    def __iter__(self) -> Iterator[Tile]:
        """One of each kind, and a second one, beside which the first one's tensors still are, for all others."""
        tiles = list(super().__iter__())
        counts = Counter(map(_kind, tiles))
        first = {_kind(tile): tile for tile in reversed(tiles)}
        try:
            for kind, count in counts.items():
                self.meter.times = 1
                yield first[kind]
                if count > 1:
                    self.meter.times = count - 1
                    yield first[kind]
        finally:
            self.meter.times = 1


class Counting:
    """Puts `CountedTiles` in place of tiles, for the passes that one meter counts."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._masked: set[tuple[int, int]] = set()

    def __call__(self, tiles: Tiles, options: Options) -> Tiles:
        """The tiles, counted; themselves where each of them will make the mask of a window, which it keeps."""
        window = options.window
        if window is not None and any(tile.reach >= window for tile in tiles):
            met = (id(tiles), window)  # a forest holds its tiles for as long as the pass lasts
            if met not in self._masked:
                self._masked.add(met)
                return tiles
        counted = CountedTiles(tiles)
        counted.meter = self.meter
        return counted


def _kind(tile: Tile) -> Hashable:
    """What decides on the operations of a tile, and on the shapes of their results."""
    bias = None if tile.bias is None else tile.bias.shape
    return tile.shape, tile.own, tile.reach, len(tile.target), tile.place is None, bias
