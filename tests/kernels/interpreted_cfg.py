"""Runs the Triton kernel of cfg_affine in Triton's interpreter and prints its worst errors as JSON.

A program of its own because TRITON_INTERPRET is read when triton is first imported, for the whole process.
"""

import itertools
import json

import torch

from stepdistill.kernels import cfg_affine_reference
from stepdistill.kernels.cfg_triton import cfg_affine_triton

SHAPES = [(1, 1), (2, 3, 5), (3, 4, 8, 8), (2, 1023), (2, 1025), (1, 2, 3, 7, 53), (4, 2048), (0, 4)]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for shape, (output, sample) in itertools.product(SHAPES, itertools.product(TYPES, TYPES)):
        doubled = torch.randn(2 * shape[0], *shape[1:]).to(TYPES[output])
        cond, uncond = doubled.chunk(2)
        x_t = torch.randn(shape).to(TYPES[sample])
        w, a, b = 1 + 7 * torch.rand(shape[0]), torch.randn(shape[0]), torch.randn(shape[0])
        for coefficients in ((w, a, b), (3.0, 1.0, -0.7), (w.double(), 0.0, 1.0)):
            expected = cfg_affine_reference(cond, uncond, x_t, *coefficients)
            found = cfg_affine_triton(cond, uncond, x_t, *coefficients, expected.dtype)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            error = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
            worst = error.max().item() if len(x_t) else 0.0
            rows.append({"output": output, "sample": sample, "shape": shape, "error": worst})
    transposed = torch.randn(3, 5, 2).transpose(1, 2)
    expected = cfg_affine_reference(transposed, -transposed, transposed, 2.0, 0.5, 0.5)
    found = cfg_affine_triton(transposed, -transposed, transposed, 2.0, 0.5, 0.5, torch.float32)
    strided = (found - expected).abs().max().item()
    print(json.dumps({"rows": rows, "strided": strided}))


if __name__ == "__main__":
    main()
