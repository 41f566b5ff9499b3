"""Train the embedded class-conditional teacher on Fashion-MNIST: autoencoder, classifier, denoiser.

    python scripts/train_class_teacher.py vae classifier denoiser pack --work build/teacher

Every stage leaves a file in the work folder and is skipped when that file is there; the denoiser stage
also resumes from its last checkpoint. ``pack`` writes assets/teachers/fashion-dit in stock diffusers
format. scripts/measure_teacher.py then records the reference statistics and the teacher's quality.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from teacher_training import Averaged, batches, log, new_scheduler, normalise_latents, one_cycle, train

from stepdistill.data import fashion_mnist
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.eval.features import Classifier
from stepdistill.pipeline.folder import save_pipeline

LATENT = (4, 8, 8)
NULL_CLASS = 1000


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT[0],
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_vae(work: Path, steps: int, batch: int = 64, peak: float = 2e-3) -> None:
    """L1 + L2 reconstruction with a light KL term; latents are then normalised inside the 1x1 convolutions."""
    torch.manual_seed(0)
    images = fashion_mnist.load("train")[0].float() / 127.5 - 1
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)
    index = batches(len(images), batch, seed=1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = one_cycle(step, steps, peak)
        x = images[next(index)].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        difference = vae.decode(posterior.sample()).sample - x
        reconstruction = difference.abs().mean() + difference.square().mean()
        loss = reconstruction + 1e-4 * posterior.kl().mean() / math.prod(LATENT)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            log("vae", f"step {step}/{steps} reconstruction {reconstruction.item():.4f}")
    normalise_latents(vae, iter(images[:10_000].split(500)))
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, work / "vae.safetensors")


@torch.no_grad()
def encode_all(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent means of the training set, (60000, 4, 8, 8), and labels; cached in the work folder."""
    cached = work / "latents.safetensors"
    if not cached.exists():
        vae = new_vae().eval()
        vae.load_state_dict(load_file(work / "vae.safetensors"))
        images, labels = fashion_mnist.load("train")
        parts = [vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in images.split(500)]
        save_file({"latents": torch.cat(parts), "labels": labels}, cached)
    stored = load_file(cached)
    return stored["latents"], stored["labels"]


def new_denoiser() -> DiTTransformer2DModel:
    """3.5 M parameters, 16 tokens. 1,000 labels because DiTPipeline's null class is number 1000."""
    denoiser = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=24,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_layers=6,
        sample_size=LATENT[1],
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    # As in DiT (Peebles & Xie 2023): residual branches and the output start at zero; so do unused labels.
    for block in denoiser.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        table = block.norm1.emb.class_embedder.embedding_table.weight
        torch.nn.init.normal_(table, std=0.02)
        with torch.no_grad():
            table[len(fashion_mnist.CLASS_NAMES) : NULL_CLASS] = 0
    torch.nn.init.zeros_(denoiser.proj_out_2.weight)
    torch.nn.init.zeros_(denoiser.proj_out_2.bias)
    # Always eval mode: in train mode diffusers' label embedding drops labels by itself.
    return denoiser.eval()


def train_denoiser(work: Path, steps: int, batch: int = 128, peak: float = 1e-3, ema_decay: float = 0.9995) -> None:
    """v-prediction MSE at uniform timesteps, labels dropped with probability 0.1 (Ho & Salimans 2022)."""
    torch.manual_seed(0)
    latents, labels = encode_all(work)
    denoiser = new_denoiser()
    parameters = dict(denoiser.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.99), weight_decay=0.01)
    averaged = Averaged(parameters, optimizer, ema_decay)
    schedule, _ = from_scheduler(new_scheduler())
    forward = torch.compile(denoiser)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        timestep = torch.randint(1000, (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        x0, eps = latents[rows], torch.randn(batch, *LATENT, generator=generator)
        t = schedule.time(timestep)
        x_t = schedule.add_noise(x0, eps, t)
        target = schedule.velocity(x0, eps, t)
        predicted = forward(x_t, timestep=timestep, class_labels=labels[rows].masked_fill(dropped, NULL_CLASS)).sample
        return F.mse_loss(predicted, target)

    train("denoiser", averaged, loss, steps, peak, work)
    save_file({name: p.contiguous() for name, p in averaged.average.items()}, work / "denoiser.safetensors")


def train_classifier(work: Path, epochs: int = 4, batch: int = 128, peak: float = 2e-3) -> None:
    """The feature network of FD-classifier: cross-entropy on the training set, accuracy on the test set logged."""
    torch.manual_seed(0)
    images, labels = fashion_mnist.load("train")
    classifier = Classifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    index, steps = batches(len(images), batch, seed=2), epochs * (len(images) // batch)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = one_cycle(step, steps, peak)
        rows = next(index)
        loss = F.cross_entropy(classifier(images[rows].float() / 255), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            log("classifier", f"step {step}/{steps} loss {loss.item():.4f}")
    classifier.eval()
    test_images, test_labels = fashion_mnist.load("test")
    with torch.no_grad():
        guesses = torch.cat([classifier(x.float() / 255).argmax(1) for x in test_images.split(500)])
    log("classifier", f"test accuracy {(guesses == test_labels).float().mean().item():.4f}")
    save_file(classifier.state_dict(), work / "classifier.safetensors")


def pack(work: Path, out: Path) -> None:
    """Write the stock pipeline folder, float16 on disk, with the classifier beside it."""
    vae, denoiser = new_vae(), new_denoiser()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    denoiser.load_state_dict(load_file(work / "denoiser.safetensors"), strict=False)
    names = dict(enumerate(fashion_mnist.CLASS_NAMES))
    pipeline = DiTPipeline(transformer=denoiser, vae=vae, scheduler=new_scheduler(), id2label=names)
    save_pipeline(pipeline.to(torch.float16), out)
    half = {name: p.half() for name, p in load_file(work / "classifier.safetensors").items()}
    save_file(half, out / "classifier.safetensors")
    size = sum(f.stat().st_size for f in out.glob("*/*.safetensors"))
    log("pack", f"{out}: {size / 2**20:.2f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=("vae", "classifier", "denoiser", "pack"))
    parser.add_argument("--work", type=Path, default=Path("build/teacher"))
    parser.add_argument("--out", type=Path, default=Path("assets/teachers/fashion-dit"))
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--denoiser-steps", type=int, default=6500)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        if stage != "pack" and (work / f"{stage}.safetensors").exists():
            log(stage, "already there, skipped")
        elif stage == "vae":
            train_vae(work, arguments.vae_steps)
        elif stage == "classifier":
            train_classifier(work)
        elif stage == "denoiser":
            train_denoiser(work, arguments.denoiser_steps)
        else:
            pack(work, arguments.out)


if __name__ == "__main__":
    main()
