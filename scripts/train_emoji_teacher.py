"""Train the embedded text-to-image teacher on captioned emoji: autoencoder, then text encoder and denoiser together.

    python scripts/emoji_data.py --packages . --out build/emoji
    python scripts/train_emoji_teacher.py vae denoiser pack --data build/emoji --work build/emoji-teacher

On a GPU in bfloat16 and compiled, on a CPU in float32. Every stage leaves a file in the work folder and is skipped when
that is there; training stages go on from their last checkpoint. ``decoder``, for a ``vae`` stage that was short, trains
the autoencoder's second half further and leaves latents and denoiser alone. ``pack`` writes a StableDiffusionPipeline
in stock format, 64x64 pixels, float16 on disk. ``--vae-steps 2 --denoiser-steps 2 --batch 4`` is the smoke test.

A teacher that is there already goes on from where it stopped, here after 15,257 updates:

    python scripts/train_emoji_teacher.py unpack denoiser pack --data build/emoji --start 15257 --denoiser-steps 20000

``unseen`` prints the denoiser's loss on the pictures it is trained on and on those of captions that it never sees.
"""

import argparse
import functools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from teacher_training import Averaged, Muon, log, new_scheduler, normalise_latents, train
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepdistill.demo.content import VOCABULARY as VOCABULARY_FILE
from stepdistill.demo.content import words_of
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.pipeline.folder import save_pipeline

CHANNELS, SIZE, TOKENS, WIDTH = 16, 8, 16, 192
VOCABULARY = 2400


def read_facts(data: Path, split: str) -> list[dict]:
    """What is known of each picture of a split that scripts/emoji_data.py wrote."""
    lines = (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def read(data: Path, split: str) -> tuple[Tensor, list[dict]]:
    """Images uint8 (N, 3, 64, 64) of a split, and what is known of each."""
    facts = read_facts(data, split)
    pictures = [np.asarray(Image.open(data / one["image"]).convert("RGB")) for one in facts]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), facts


def floats(images: Tensor, device: torch.device) -> Tensor:
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE * 8,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def new_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte pairs of the captions' words, the frequent ones whole; CLIP's special tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    stored = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in stored["merges"]]
    return CLIPTokenizer(vocab=stored["vocab"], merges=merges, model_max_length=TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_denoiser() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 160),  # most of the work at 4x4, which a processor can afford
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def reconstruction(error: Tensor) -> Tensor:
    """L1 of pixels and of their differences to the neighbours, which keeps edges sharp."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges


def train_vae(images: Tensor, work: Path, steps: int, batch: int, device: torch.device, peak: float = 2e-3) -> None:
    """Reconstruction with a light KL term."""
    torch.manual_seed(0)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    parameters = dict(vae.named_parameters())
    averaged = Averaged(parameters, torch.optim.AdamW(parameters.values(), weight_decay=0.0), decay=0.999)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = floats(images[torch.randint(len(images), (batch,), generator=generator)], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(x).latent_dist
            error = vae.decode(posterior.sample()).sample - x
        return reconstruction(error.float()) + 1e-6 * posterior.kl().float().mean()

    train("vae", averaged, loss, steps, peak, work)
    vae.load_state_dict(averaged.average)
    vae.eval()
    normalise_latents(vae, (floats(part, device) for part in images.split(100)))
    save_file({k: v.cpu().contiguous() for k, v in vae.state_dict().items()}, work / "vae.safetensors")


def train_decoder(images: Tensor, work: Path, steps: int, batch: int, device: torch.device, peak: float = 1e-3) -> None:
    """The decoder alone, on latents with a tenth of noise, because a denoiser's are not exact either."""
    latents = encode_all(images, work, device)
    vae = trained_vae(work, device, "vae").to(memory_format=torch.channels_last)
    parameters = {name: p for name, p in vae.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))}
    averaged = Averaged(parameters, Muon(parameters, ("conv_in", "conv_out"), weight_decay=0.0), decay=0.999)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        x0 = latents[rows]
        eps = torch.randn(x0.shape, generator=generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoded = vae.decode((x0 + 0.1 * eps).to(device)).sample
        return reconstruction(decoded.float() - floats(images[rows], device))

    train("decoder", averaged, loss, steps, peak, work)
    vae.load_state_dict(averaged.average, strict=False)
    save_file({k: v.cpu().contiguous() for k, v in vae.state_dict().items()}, work / "decoder.safetensors")


def trained_vae(work: Path, device: torch.device, *stages: str) -> AutoencoderKL:
    """The autoencoder as the first of these stages left it that has been run."""
    vae = new_vae().to(device).eval()
    vae.load_state_dict(load_file(next(path for path in (work / f"{s}.safetensors" for s in stages) if path.exists())))
    return vae


@torch.no_grad()
def encode_all(images: Tensor, work: Path, device: torch.device) -> Tensor:
    """Latent means of images (N, 16, 8, 8); cached in the work folder."""
    cached = work / "latents.safetensors"
    if not cached.exists():
        vae = trained_vae(work, device, "vae")
        parts = [vae.encode(floats(part, device)).latent_dist.mean.cpu() for part in images.split(100)]
        save_file({"latents": torch.cat(parts).contiguous()}, cached)
    return load_file(cached)["latents"]


def thing(caption: str) -> str:
    """A caption without its style."""
    return caption.partition(" emoji of ")[2]


class Captions:
    """Token numbers of every picture's caption and of its other names."""

    def __init__(self, facts: list[dict], tokenizer: CLIPTokenizer):
        self.texts = [[one["caption"], *one["others"]] for one in facts]
        known = {text for texts in self.texts for text in texts}
        known = sorted(known | {thing(text) for text in known} | {""})
        rows = tokenizer(known, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        self.ids = dict(zip(known, rows.input_ids, strict=True))

    def draw(self, rows: Tensor, seed: int) -> Tensor:
        """(B, 16): another name for a third of those that have one; no style for a tenth, nothing for a tenth.

        Nothing is guidance's empty prompt; without a style, "pizza" alone says something too.
        """
        dice, found = random.Random(seed), []
        for row in rows.tolist():
            names = self.texts[row]
            text = dice.choice(names) if dice.random() < 1 / 3 else names[0]
            share = dice.random()
            found.append(self.ids["" if share < 0.1 else thing(text) if share < 0.2 else text])
        return torch.stack(found)


class Both(nn.Module):
    """Text encoder and denoiser as one module, for one compiled graph and one optimizer."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text, self.denoiser = new_text_encoder(tokenizer), new_denoiser()

    def forward(self, x_t: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        return self.denoiser(x_t, timestep, self.text(ids).last_hidden_state).sample


def train_denoiser(
    images: Tensor, facts: list[dict], work: Path, steps: int, batch: int, device: torch.device, peak: float = 1e-3
) -> None:
    """v-prediction MSE, captions dropped with probability 0.1 (Ho & Salimans 2022).

    Timesteps are uniform, one in each of ``batch`` equal parts (Kingma et al. 2021): less noise in the gradient.
    """
    latents = encode_all(images, work, device)
    texts = [text for one in facts for text in (one["caption"], *one["others"])]
    if not (work / "tokenizer").exists():  # made once: pairs as frequent as each other come in any order
        new_tokenizer(texts).save_pretrained(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    (work / VOCABULARY_FILE).write_text("\n".join(sorted(set(words_of(" ".join(texts))))) + "\n", encoding="utf-8")
    captions = Captions(facts, tokenizer)
    torch.manual_seed(0)
    both = Both(tokenizer).to(device, memory_format=torch.channels_last)
    parameters = dict(both.named_parameters())
    optimizer = Muon(parameters, ("embedding", "conv_in", "conv_out"), betas=(0.9, 0.99), weight_decay=0.01)
    averaged = Averaged(parameters, optimizer, decay=max(0.9, 1 - 10 / steps))
    schedule, _ = from_scheduler(new_scheduler())
    forward = torch.compile(both) if steps >= 1000 else both  # a short trial does not earn it back

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        timestep = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (1000 / batch)).long()
        timestep.clamp_(max=999)  # rounding could reach 1000
        x0, eps = latents[rows], torch.randn(batch, CHANNELS, SIZE, SIZE, generator=generator)
        t = schedule.time(timestep)
        x_t, target = schedule.add_noise(x0, eps, t).to(device), schedule.velocity(x0, eps, t).to(device)
        ids = captions.draw(rows, step).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = forward(x_t.contiguous(memory_format=torch.channels_last), timestep.to(device), ids)
        return F.mse_loss(predicted.float(), target)

    train("denoiser", averaged, loss, steps, peak, work)
    save_file({name: p.cpu().contiguous() for name, p in averaged.average.items()}, work / "denoiser.safetensors")


@torch.no_grad()
def unseen(data: Path, work: Path, device: torch.device, count: int = 384) -> None:
    """The averaged weights' loss on pictures of the training split, of unseen styles and of unseen concepts.

    The same noise and evenly spread timesteps whatever the weights, so that two calls can be compared.
    """
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    trained, both = work / "denoiser.safetensors", Both(tokenizer).to(device).eval()
    stored = load_file(trained if trained.exists() else work / "denoiser-checkpoint.safetensors")
    averages = {name.removeprefix("ema."): p for name, p in stored.items() if name.startswith("ema.")}
    both.load_state_dict(averages or stored, strict=False)
    vae, (schedule, _) = trained_vae(work, device, "vae"), from_scheduler(new_scheduler())
    for split in filter(functools.partial(read_facts, data), ("train", "styles", "concepts")):
        images, facts = read(data, split)
        generator, losses = torch.Generator().manual_seed(0), []
        rows = torch.randperm(len(images), generator=generator)[:count]
        timestep = (torch.arange(len(rows)) * 1000 // len(rows))[torch.randperm(len(rows), generator=generator)]
        captions = Captions(facts, tokenizer)
        ids = torch.stack([captions.ids[captions.texts[row][0]] for row in rows.tolist()])
        for part in torch.arange(len(rows)).split(64):
            x0 = vae.encode(floats(images[rows[part]], device)).latent_dist.mean.cpu()
            eps, t = torch.randn(x0.shape, generator=generator), schedule.time(timestep[part])
            x_t, target = schedule.add_noise(x0, eps, t).to(device), schedule.velocity(x0, eps, t).to(device)
            predicted = both(x_t, timestep[part].to(device), ids[part].to(device))
            losses.append((predicted - target).square().mean((1, 2, 3)))
        log("unseen", f"{split}: loss {torch.cat(losses).mean():.3f} over {len(rows)} pictures")


def pack(work: Path, out: Path, captions: list[str], prompts: Path) -> None:
    """Write the stock pipeline folder, float16 on disk, and the captions as a list that recipes can name."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae, both = trained_vae(work, torch.device("cpu"), "decoder", "vae"), Both(tokenizer)
    both.load_state_dict(load_file(work / "denoiser.safetensors"), strict=False)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=both.text,
        tokenizer=tokenizer,
        unet=both.denoiser,
        scheduler=new_scheduler(steps_offset=1),  # without effect on trailing steps; Stable Diffusion's asks for it
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline.to(torch.float16), out)
    prompts.write_text("\n".join(dict.fromkeys(captions)) + "\n", encoding="utf-8")
    shutil.copy(work / VOCABULARY_FILE, out)  # the demo page names words that are not in it
    # transformers would load what it finds, float16, beside diffusers' float32.
    config = out / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    size = sum(f.stat().st_size for f in out.glob("*/*.safetensors"))
    log("pack", f"{out}: {size / 1e6:.2f} MB")


def unpack(folder: Path, work: Path, step: int) -> None:
    """Undo ``pack``: the work folder of a packed teacher after ``step`` updates, without the optimizer's moments."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.tokenizer.save_pretrained(work / "tokenizer")
    save_file(pipeline.vae.state_dict(), work / "vae.safetensors")
    both = Both(pipeline.tokenizer)
    both.text, both.denoiser = pipeline.text_encoder, pipeline.unet
    weights = {name: p.detach() for name, p in both.named_parameters()}
    tensors = {f"{kind}.{name}": p.clone() for name, p in weights.items() for kind in ("weight", "ema")}
    save_file(tensors | {"step": torch.tensor(step)}, work / "denoiser-checkpoint.safetensors")
    log("unpack", f"{folder}, to go on at step {step}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=("unpack", "vae", "decoder", "denoiser", "unseen", "pack"))
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--work", type=Path, default=Path("build/emoji-teacher"))
    parser.add_argument("--out", type=Path, default=Path("assets/teachers/emoji"))
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts/emoji.txt"))
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--decoder-steps", type=int, default=4000)
    parser.add_argument("--denoiser-steps", type=int, default=20000)
    parser.add_argument("--start", type=int, default=0, help="updates that an unpacked teacher has had")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    work, device = arguments.work, torch.device(arguments.device)
    work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        if stage == "pack":
            captions = [one["caption"] for one in read_facts(arguments.data, "train")]
            pack(work, arguments.out, captions, arguments.prompts)
        elif stage == "unseen":
            unseen(arguments.data, work, device)
        elif stage == "unpack" and not (work / "denoiser-checkpoint.safetensors").exists():
            unpack(arguments.out, work, arguments.start)
        elif stage == "unpack" or (work / f"{stage}.safetensors").exists():
            log(stage, "already there, skipped")
        elif stage == "vae":
            train_vae(read(arguments.data, "train")[0], work, arguments.vae_steps, arguments.batch, device)
        elif stage == "decoder":
            train_decoder(read(arguments.data, "train")[0], work, arguments.decoder_steps, arguments.batch, device)
        else:
            images, facts = read(arguments.data, "train")
            train_denoiser(images, facts, work, arguments.denoiser_steps, arguments.batch, device)


if __name__ == "__main__":
    main()
