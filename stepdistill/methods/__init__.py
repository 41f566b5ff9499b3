"""Distillation methods by the names that recipes use, and everything that a method's file needs."""

from stepdistill.data.batch import Batch, PathRows
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.samplers import DDIM, Renoise, Sampler, Step, dpm_solver_step, renoise_up, solver_grid
from stepdistill.diffusion.schedule import Prediction, Schedule, per_sample
from stepdistill.errors import InputError
from stepdistill.methods.base import (
    FAMILY_NAMES,
    CriticConfig,
    DataNeeds,
    DistillMethod,
    MethodConfig,
    PathNeeds,
    RealConfig,
)
from stepdistill.methods.consistency import LCM, TCD
from stepdistill.methods.continuous import SCM, TBCM
from stepdistill.methods.disback import DisBack
from stepdistill.methods.dmd import DMD
from stepdistill.methods.dmd2 import DMD2, DecoupledDMD, FDistill
from stepdistill.methods.dmdr import DMDR
from stepdistill.methods.flash_dmd import FlashDMD
from stepdistill.methods.guidance_distillation import AdapterGuidance, Guide, LoRAGuidance, ScoreMatching, WEmbedding
from stepdistill.methods.guidance_free import GFT, ModelGuidance
from stepdistill.methods.icd import ICD
from stepdistill.methods.parts.gan import LatentDiscriminator, PixelDiscriminator
from stepdistill.methods.parts.losses import (
    denoising_loss,
    discriminator_loss,
    dmd_gradient,
    generator_loss,
    gradient_penalty,
    mean_per_sample,
    prediction_loss,
    pseudo_huber,
    surrogate,
)
from stepdistill.methods.parts.times import T_FLOOR, normal_log_snr_times, time_of_ratio, uniform_times
from stepdistill.methods.parts.trigflow import derivative
from stepdistill.roles import Roles, RoleTraining
from stepdistill.roles.added import Adapted, GuidanceEmbedded, SlowTime, TimeEmbedded

# isort: split
# What stands above is bound before these files are read: they may import it from here, as a user's file does.
from stepdistill.methods.adversarial import ADD, LADD
from stepdistill.methods.class_ratio import DiffRatio
from stepdistill.methods.ect import ECT
from stepdistill.methods.emd import EMD
from stepdistill.methods.flash_diffusion import FlashDiffusion
from stepdistill.methods.imagine_flash import ImagineFlash
from stepdistill.methods.pcm import PCM, TSCD
from stepdistill.methods.phased import TDM, PhasedDMD
from stepdistill.methods.progressive import ProgressiveDistillation
from stepdistill.methods.rcm import RCM
from stepdistill.methods.senseflow import SenseFlow
from stepdistill.methods.sid import SiD, SiDA, SiDLSG
from stepdistill.methods.tdd import TDD
from stepdistill.methods.trajectory import OdeRegression, TrajectoryRegression
from stepdistill.methods.vsd import PGSB, VSD, DiffInstruct

METHODS: dict[str, type[DistillMethod]] = {
    method.name: method
    for method in (
        DMD,
        DMD2,
        DecoupledDMD,
        FDistill,
        PhasedDMD,
        TDM,
        SenseFlow,
        DMDR,
        FlashDMD,
        DisBack,
        VSD,
        PGSB,
        DiffInstruct,
        EMD,
        DiffRatio,
        LCM,
        TCD,
        TDD,
        PCM,
        TSCD,
        ICD,
        SCM,
        RCM,
        TBCM,
        ECT,
        TrajectoryRegression,
        OdeRegression,
        ImagineFlash,
        FlashDiffusion,
        ProgressiveDistillation,
        SiD,
        SiDLSG,
        SiDA,
        AdapterGuidance,
        Guide,
        WEmbedding,
        ScoreMatching,
        LoRAGuidance,
        GFT,
        ModelGuidance,
        LADD,
        ADD,
    )
}
"""The package's own methods. A class in a user's file is named by that file."""

FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(name for name, method in METHODS.items() if method.family == family) for family in FAMILY_NAMES
}
"""The methods' names by family."""

__all__ = [
    "ADD",
    "DDIM",
    "DMD",
    "DMD2",
    "DMDR",
    "ECT",
    "EMD",
    "FAMILIES",
    "GFT",
    "ICD",
    "LADD",
    "LCM",
    "METHODS",
    "PCM",
    "PGSB",
    "RCM",
    "SCM",
    "TBCM",
    "TCD",
    "TDD",
    "TDM",
    "TSCD",
    "T_FLOOR",
    "VSD",
    "Adapted",
    "AdapterGuidance",
    "Batch",
    "CriticConfig",
    "DataNeeds",
    "DecoupledDMD",
    "Denoiser",
    "DiffInstruct",
    "DiffRatio",
    "DisBack",
    "DistillMethod",
    "FDistill",
    "FlashDMD",
    "FlashDiffusion",
    "GuidanceEmbedded",
    "Guide",
    "ImagineFlash",
    "InputError",
    "LatentDiscriminator",
    "LoRAGuidance",
    "MethodConfig",
    "ModelGuidance",
    "OdeRegression",
    "PathNeeds",
    "PathRows",
    "PhasedDMD",
    "PixelDiscriminator",
    "Prediction",
    "ProgressiveDistillation",
    "RealConfig",
    "Renoise",
    "RoleTraining",
    "Roles",
    "Sampler",
    "Schedule",
    "ScoreMatching",
    "SenseFlow",
    "SiD",
    "SiDA",
    "SiDLSG",
    "SlowTime",
    "Step",
    "TimeEmbedded",
    "TrajectoryRegression",
    "WEmbedding",
    "denoising_loss",
    "derivative",
    "discriminator_loss",
    "dmd_gradient",
    "dpm_solver_step",
    "generator_loss",
    "gradient_penalty",
    "guided",
    "mean_per_sample",
    "normal_log_snr_times",
    "per_sample",
    "prediction_loss",
    "pseudo_huber",
    "renoise_up",
    "solver_grid",
    "surrogate",
    "time_of_ratio",
    "uniform_times",
]
