"""What a bundle's graphs can be fed with where they are not of one shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypersd_export.errors import OptionError

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Images at once, and the pictures' sides in pixels, each (least, most).

    `unit`: a side is a multiple of it, as VAE and UNet divide it.
    """

    batch: Range
    width: Range
    height: Range
    unit: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"batch": [*self.batch], "width": [*self.width], "height": [*self.height], "unit": self.unit}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Span":
        """Read what `to_json` wrote."""
        (batch, width, height) = (tuple(data[name]) for name in ("batch", "width", "height"))
        return cls(batch=batch, width=width, height=height, unit=data["unit"])

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Span | None":
        """That of a bundle whose manifest has these options; None where the graphs are of one shape."""
        found = options.get("span")
        return None if found is None else cls.from_json(found)

    def sizes(self) -> str:
        """For people: such as 256x256 to 768x768."""
        return f"{self.width[0]}x{self.height[0]} to {self.width[1]}x{self.height[1]}"

    def check_size(self, width: int, height: int) -> None:
        """`OptionError` for a size that the graphs do not take."""
        for side, (low, high) in ((width, self.width), (height, self.height)):
            if not low <= side <= high or side % self.unit:
                raise OptionError(
                    f"size {width}x{height}: this bundle draws {self.sizes()} pixels, in multiples of {self.unit}"
                )

    def check_batch(self, batch: int) -> None:
        """`OptionError` for more or fewer images than the graphs take."""
        if not self.batch[0] <= batch <= self.batch[1]:
            raise OptionError(f"batch {batch}: this bundle draws {self.batch[0]} to {self.batch[1]} pictures at once")
