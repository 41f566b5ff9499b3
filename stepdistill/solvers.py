"""Stock fast solvers that a teacher can run under without training: what a student has to beat."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from stepdistill.schedule import from_scheduler


def stock_solvers(scheduler: Any) -> dict[str, Any]:
    """diffusers' fast solvers for a model that was trained with ``scheduler``, by display name.

    All run on trailing time steps: the first is pure noise, which a few steps cannot do without.
    """
    config = dict(scheduler.config)
    schedule, _ = from_scheduler(scheduler)
    if schedule.name == "flow":
        common = {"num_train_timesteps": schedule.train_timesteps}
        flow = {**common, "use_flow_sigmas": True, "flow_shift": schedule.shift, "prediction_type": "flow_prediction"}
        return {
            "Euler": FlowMatchEulerDiscreteScheduler(**common, shift=schedule.shift),
            "DPM-Solver++": DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++", solver_order=2),
            "UniPC": UniPCMultistepScheduler(**flow, solver_order=2),
        }
    trailing = {"timestep_spacing": "trailing", "thresholding": False}
    solver = {**trailing, "solver_order": 2, "lower_order_final": True}
    return {
        "DDIM": DDIMScheduler.from_config(config, **trailing, clip_sample=False, set_alpha_to_one=True),
        "DPM-Solver++": DPMSolverMultistepScheduler.from_config(config, **solver, algorithm_type="dpmsolver++"),
        "UniPC": UniPCMultistepScheduler.from_config(config, **solver),
    }
