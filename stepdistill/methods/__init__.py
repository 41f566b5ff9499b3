"""Distillation methods, by the name a recipe uses."""

from stepdistill.methods.adversarial import ADD, LADD
from stepdistill.methods.base import DataNeeds, DistillMethod, MethodConfig, Roles
from stepdistill.methods.consistency import LCM, TCD
from stepdistill.methods.continuous import SCM, TBCM
from stepdistill.methods.dmd import DMD
from stepdistill.methods.dmd2 import DMD2, DecoupledDMD, FDistill
from stepdistill.methods.guidance_distillation import AdapterGuidance, Guide, LoRAGuidance, WEmbedding
from stepdistill.methods.guidance_free import GFT, ModelGuidance
from stepdistill.methods.icd import ICD
from stepdistill.methods.progressive import ProgressiveDistillation
from stepdistill.methods.segments import PCM, TSCD
from stepdistill.methods.sid import SiD, SiDA, SiDLSG
from stepdistill.methods.tdd import TDD
from stepdistill.methods.trajectory import OdeRegression, TrajectoryRegression
from stepdistill.methods.vsd import PGSB, VSD, DiffInstruct

METHODS: dict[str, type[DistillMethod]] = {
    "dmd": DMD,
    "dmd2": DMD2,
    "decoupled-dmd": DecoupledDMD,
    "f-distill": FDistill,
    "vsd": VSD,
    "pg-sb": PGSB,
    "diff-instruct": DiffInstruct,
    "lcm": LCM,
    "tcd": TCD,
    "tdd": TDD,
    "pcm": PCM,
    "tscd": TSCD,
    "icd": ICD,
    "scm": SCM,
    "tbcm": TBCM,
    "sfd": TrajectoryRegression,
    "ode-regression": OdeRegression,
    "pd": ProgressiveDistillation,
    "sid": SiD,
    "sid-lsg": SiDLSG,
    "sida": SiDA,
    "agd": AdapterGuidance,
    "guide": Guide,
    "w-embed": WEmbedding,
    "lora-guidance": LoRAGuidance,
    "gft": GFT,
    "model-guidance": ModelGuidance,
    "ladd": LADD,
    "add": ADD,
}

__all__ = ["METHODS", "DataNeeds", "DistillMethod", "MethodConfig", "Roles"]
