"""Settings of published runs, to compare a recipe with: data only, read from their scripts and code.

A recipe names its run by the key ``published``. What is not stated there is None: unknown, never guessed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedPlayer:
    """How one network was trained.

    Args:
        lr: its learning rate.
        rank: of its LoRA; None: all weights.
        alpha: of its LoRA.
    """

    lr: float
    rank: int | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class PublishedRun:
    """One run.

    Args:
        title: what was distilled, in words.
        source: repository and file.
        players: by the names of this library's.
        batch: samples per student update, over all devices.
        updates: of the student.
        timesteps: the student's grid in timesteps of its table.
        note: how it differs from a run of this library.
    """

    title: str
    source: str
    players: dict[str, PublishedPlayer]
    batch: int | None = None
    updates: int | None = None
    timesteps: tuple[float, ...] | None = None
    note: str = ""

    @property
    def samples(self) -> int | None:
        """Samples that the student was updated on."""
        return None if self.batch is None or self.updates is None else self.batch * self.updates


WHOLE_SD15 = PublishedPlayer(1e-5)

RUNS: dict[str, PublishedRun] = {
    "dmd2-sdxl-lora": PublishedRun(
        title="DMD2, SDXL to 4 steps, LoRA",
        source="tianweiy/DMD2, experiments/sdxl (..._backsim_scratch_lora.sh, README)",
        players={"student": PublishedPlayer(5e-5, rank=64, alpha=8), "critic": PublishedPlayer(5e-5)},
        batch=2 * 64,
        updates=16_000 // 5,
        timesteps=(999, 749, 499, 249),
        note="with a GAN on real images, weight 5e-3",
    ),
    "dmd2-sdxl": PublishedRun(
        title="DMD2, SDXL to 4 steps, all weights",
        source="tianweiy/DMD2, experiments/sdxl (..._backsim_scratch.sh, README)",
        players={"student": PublishedPlayer(5e-7), "critic": PublishedPlayer(5e-7)},
        batch=2 * 64,
        updates=19_000 // 5,
        timesteps=(999, 749, 499, 249),
        note="with a GAN on real images, weight 5e-3",
    ),
    "dmd2-sd15": PublishedRun(
        title="DMD2, SD 1.5 to 1 step, first stage",
        source="tianweiy/DMD2, experiments/sdv1.5 (..._lr1e-5_seed10_dfake10_from_scratch.sh, README)",
        players={"student": WHOLE_SD15, "critic": WHOLE_SD15},
        batch=32 * 64,
        updates=39_000 // 10,
        timesteps=(999,),
        note="its README: good FID, low image quality; a larger guidance for pictures",
    ),
    "dmd2-imagenet": PublishedRun(
        title="DMD2, ImageNet 64 px to 1 step",
        source="tianweiy/DMD2, experiments/imagenet (imagenet_lr2e-6_scratch.sh, README)",
        players={"student": PublishedPlayer(2e-6), "critic": PublishedPlayer(2e-6)},
        batch=40 * 7,
        updates=410_000 // 5,
        note="an EDM teacher in pixels",
    ),
    "swd-sd35-medium": PublishedRun(
        title="SwD, SD 3.5 medium to 4 steps, LoRA",
        source="yandex-research/swd, train_sd35_medium.sh and main.py",
        players={"student": PublishedPlayer(5e-6, 64, 64), "critic": PublishedPlayer(5e-6, 64, 64)},
        batch=8 * 8,
        updates=3000,
        note="growing resolutions; GAN and MMD terms",
    ),
    "sid-lsg-sd15": PublishedRun(
        title="SiD-LSG, SD 1.5 to 1 step",
        source="mingyuanzhou/SiD-LSG, run_sid.sh",
        players={"student": PublishedPlayer(1e-6), "critic": PublishedPlayer(1e-6)},
        batch=512,
        updates=10_000_000 // 512,
        timesteps=(625,),
        note="float32; guidance 1.5 to 4.5 of both scores, a run for each",
    ),
    "pixart-dmd": PublishedRun(
        title="PixArt-DMD, 512 px to 1 step",
        source="PixArt-alpha/PixArt-sigma, train_scripts/train_dmd.sh",
        players={"student": PublishedPlayer(1e-6), "critic": PublishedPlayer(1e-6)},
        batch=8 * 2,
        timesteps=(400,),
        note="float32, with a regression term of weight .25",
    ),
    "swiftbrush": PublishedRun(
        title="SwiftBrush, SD 2.1 base to 1 step",
        source="VinAIResearch/SwiftBrush, README and train_swiftbrush.py",
        players={"student": PublishedPlayer(1e-6), "critic": PublishedPlayer(1e-3, 64, 108)},
        timesteps=(999,),
        note="batch 16 a GPU, their number is not stated; the critic's LoRA is on to_q and to_v",
    ),
    "lcm-lora-sd15": PublishedRun(
        title="LCM-LoRA, SD 1.5",
        source="huggingface/diffusers, examples/consistency_distillation (README, train_lcm_distill_lora_sd_wds.py)",
        players={"student": PublishedPlayer(1e-4, 64, 64)},
        batch=12,
        updates=1000,
        note="guidance drawn from 5 to 15 in its own terms",
    ),
    "tcd-lora-sd15": PublishedRun(
        title="TCD-LoRA, SD 1.5 (a reproduction; the authors' training code is not public)",
        source="rootonchair/consistency_models_distill, tcd/README.md",
        players={"student": PublishedPlayer(4.5e-6, 64, 64)},
        batch=12,
        updates=10_000,
    ),
    "tbcm-sana": PublishedRun(
        title="TBCM, Sana-Sprint 0.6B",
        source="hustvl/TBCM, configs/600M_1024px_tbcm.yaml and train_scripts/train_tbcm.sh",
        players={},
        batch=4 * 8,
        note="rate 1e-5 of CAME, whose updates are not AdamW's; batch in prompts, of 15 rows each",
    ),
    "nitro-sd21": PublishedRun(
        title="Nitro, SD 2.1 base to 1 step (LADD by others than its authors)",
        source="AMD-AIG-AIMA/AMD-Diffusion-Distillation, scripts/run_train.sh",
        players={"student": PublishedPlayer(1e-6), "discriminator": PublishedPlayer(1e-6)},
        batch=8 * 8 * 6,
        updates=50_000,
        timesteps=(999,),
        note="students and heads take turns in 100 k updates; teacher-made latents",
    ),
}
