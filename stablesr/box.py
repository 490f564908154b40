"""Rectangles of a canvas."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A half-open rectangle: rows [top, bottom), columns [left, right). Not empty."""

    top: int
    left: int
    bottom: int
    right: int

    def __post_init__(self) -> None:
        if self.top >= self.bottom or self.left >= self.right:
            raise ValueError(f"empty box: rows [{self.top}, {self.bottom}), columns [{self.left}, {self.right})")

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def overlap(self, other: "Box") -> "Box | None":
        """What both cover, or None."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Box(top, left, bottom, right) if top < bottom and left < right else None

    def within(self, frame: "Box") -> tuple[slice, slice]:
        """The slices that select this box from an array that holds `frame`.

        >>> Box(2, 3, 4, 5).within(Box(2, 2, 9, 9))
        (slice(0, 2, None), slice(1, 3, None))
        """
        return (
            slice(self.top - frame.top, self.bottom - frame.top),
            slice(self.left - frame.left, self.right - frame.left),
        )

    def scaled(self, factor: int) -> "Box":
        """The same rectangle on a canvas whose cells are `factor` times finer."""
        return Box(self.top * factor, self.left * factor, self.bottom * factor, self.right * factor)
