"""What the interpreter cannot show and a device would: tiles that warps hold copies of, stale reads, matrix precision,
fused arithmetic. What can be said without a device is said here."""

import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from exactness import assert_same_bits
from problems import OPERATORS, few, slot_problem
from torch import Tensor

import cem
from cem_kernels import triton_utils
from cem_kernels.cross_attention import triton as cross_kernels
from cem_kernels.slot_attention import triton as slot_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def slot_plans():
    """Plans of slot attention for every class of width, slots and precision that kernels take."""
    for width, slots, dtype in itertools.product(
        (16, 17, 32, 48, 64, 100, 128, 200, 256, 512), (1, 4, 8, 17, 32), DTYPES
    ):
        x = torch.empty(64, 4, width, dtype=dtype, device="meta")
        yield slot_kernels.Plan.of(x, 4, slots, torch.empty(2 * width, width, dtype=dtype, device="meta"))


@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
@pytest.mark.parametrize(
    "kernel", ["slot_attention_forward", "slot_attention_backward", "attend", "start_backward", "attend_backward"]
)
@pytest.mark.parametrize("tuned", [{}, {"BLOCK_D": 16, "num_warps": 16}], ids=["as it is", "tuned"])
def test_no_tile_of_slots_that_is_overwritten_is_held_in_copies(kernel, matmul, tuned, monkeypatch):
    """A tile with fewer elements than threads is in several warps, and a slow one could read what a fast one wrote."""
    monkeypatch.setattr(triton_utils, "_tuned", {kernel: tuned})
    monkeypatch.setattr(slot_kernels, "input_precision", lambda dtype: matmul if dtype == torch.float32 else "ieee")
    for plan in slot_plans():
        options = plan.options(kernel)
        threads = 32 * options["num_warps"]
        assert options["SLOTS"] * options["CLASSES"] * options["BLOCK_D"] >= threads, (plan, options)
        assert options.get("BLOCK_N", plan.rows) * options["BLOCK_D"] >= threads, (plan, options)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("backward", [False, True])
def test_no_tile_of_a_read_that_is_overwritten_is_held_in_copies(precision, backward):
    for heads, slots, width, dtype in itertools.product((1, 3, 4, 16), (1, 5, 8, 32), (16, 40, 128, 512), DTYPES):
        padded_heads, padded_slots = cross_kernels.padded_sizes(heads, slots)
        rows = padded_heads * padded_slots
        t = cross_kernels.tiles(width, rows, padded_slots, precision, dtype, backward=backward)
        assert min(t.HEADS * t.SLOTS, t.BLOCK_N) * t.BLOCK_D >= 32 * t.num_warps, (heads, slots, width, dtype, t)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize(("make", "split"), [*((make, False) for make in OPERATORS.values()), (slot_problem, True)])
def test_two_inputs_in_turns_give_the_same_bits_every_time(make, split, monkeypatch):
    """The same call again cannot show a stale read: what it would read is what it wrote. Memory is poisoned between."""
    monkeypatch.setattr(slot_kernels, "tokens_are_split", lambda x, groups: split)
    twice = {"J": 2} if make is slot_problem else {}
    first, second = (few(make, T=5, D=16, seed=seed, **twice) for seed in (0, 1))
    want = first.results("triton")
    second.results("triton")
    assert_same_bits(first.results("triton"), want)


PRECISIONS = {
    'torch.set_float32_matmul_precision("high")': "tf32",
    'torch.set_float32_matmul_precision("highest")': "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    'torch.backends.cuda.matmul.fp32_precision = "tf32"': "tf32",
    'torch.backends.cuda.matmul.fp32_precision = "ieee"': "ieee",
    'torch.backends.fp32_precision = "tf32"': "tf32",
    "pass": "ieee",
}


PROGRAM = """
import os, sys, torch
from cem_kernels.triton_utils import input_precision
for switch in sys.argv[1:]:
    if os.fork() == 0:
        exec(switch)
        print(input_precision(torch.float32), input_precision(torch.bfloat16), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older PyTorch has one switch")
def test_whichever_switch_a_user_sets_kernels_multiply_as_it_says():
    """Each in a process of its own: PyTorch does not take a switch back."""
    command = [sys.executable, "-c", PROGRAM, *PRECISIONS]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    assert dict(zip(PRECISIONS, told, strict=True)) == {switch: f"{p} ieee" for switch, p in PRECISIONS.items()}


def test_every_launch_says_that_arithmetic_is_fused():
    given = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: given.update(options)

    triton_utils.launch(Kernel(), (1,), torch.device("cpu"), num_warps=4)
    assert given == {"enable_fp_fusion": True, "num_warps": 4}


def test_reductions_of_maps_and_of_rows_are_the_same_product(monkeypatch):
    """A convolution would follow cuDNN's TF32 switch, which is on by default, where a product follows the other."""

    def refuse(*args: object) -> Tensor:
        raise AssertionError("a reduction went through a convolution")

    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    reduction = cem.conv_reduction((8, 7, 7), 4).double()
    x, weight = torch.randn(3, 8, 7, 7, dtype=torch.float64), reduction[2].weight[:, :, 0, 0]
    torch.testing.assert_close(reduction(x), torch.einsum("oc,bchw->bohw", weight, x))
