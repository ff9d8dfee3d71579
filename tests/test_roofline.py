"""docs/roofline.md: every number of the page follows from the config, the figures of the chip in
nanoxla/tpu.py, and the compiler's figures below."""
import re

import pytest
from conftest import ROOT

from model import flops_per_token, num_parameters
from nanoxla import flash_attention
from nanoxla.tpu import KINDS
from train import load_config

PAGE = " ".join((ROOT / "docs/roofline.md").read_text().split())
CORES = 8

# M cycles of a step, by tools/compile_for_tpu.py on 2026-11-26 with libtpu 0.0.21. The optimised
# HLO tells products from passes where a source line has both.
COMPILER = {
    "embedding": 1.462, "RMSNorm": 0.744, "q, k, v": 37.631, "attention": 43.82, "o_proj": 13.294,
    "SwiGLU": 91.062, "head and loss": 40.669, "RMSNorm and residual, backward": 15.462,
    "gradient accumulation": 0.368, "all-reduce": 15.677, "gradient norm": 2.573, "AdamW": 8.595,
    "zeroed gradients": 1.999}
COMPILER_SUM, MICRO_BATCH, WITHOUT_A_LINE, BACKWARD_SUMS = 273.61, 30.59, 17.791, 13.872
LOGITS, LOGITS_BACKWARD = 14.255, 25.421
Q, PLAIN, UP = 44_464, 37_120, 108_464  # cycles of products whose operands are all in VMEM
IN_VMEM, IN_HBM = (113.35, 103.42), (68.31, 60.85)  # products: M cycles, and at the peak
NORM_PASS = 75_393  # cycles of one pass backward
HBM_BYTES = 5.10e9  # read and written in a micro-batch, by the optimised HLO
BUNDLES = 6_220, 12_800
ZEROING = {(32_000, 768): (189, 544_730), (768, 2_048): (1, 14_993), (768, 768): (1, 6_757)}

V5E = KINDS["v5e"]
CLOCK, LINK, MEMORY, PEAK = V5E.clock, V5E.link, V5E.memory, V5E.peak
c = load_config(ROOT / "config/fwedu_124m.py")
D, L, H, M, T, V = c.dim, c.n_layers, c.n_heads, c.hidden_dim, c.context, c.vocab_size
N = c.micro_batch_size * T  # tokens in a micro-batch
RUNS = c.batch_size // (CORES * c.micro_batch_size)
P = num_parameters(c)[0]
STREAM = 2 * N * D  # bytes of the residual stream
NORMS = 2 * L + 1


def ms(cycles_in_millions):
    return 1e9 * cycles_in_millions / CLOCK


def flops(rows, columns, n=N):
    """Of a product, forward and backward."""
    return 6 * n * rows * columns


def product_bytes(rows, columns, n=N):
    """Of a product, forward and backward, with the addition to the sum of the gradients."""
    return 6 * n * (rows + columns) + 16 * rows * columns


def all_reduce_ms(cores):
    return 1e3 * 2 * (cores - 1) / cores * 4 * P / LINK


# (FLOPs, bytes) of a step on one core
PARTS = {
    "embedding": (0, RUNS * 8 * STREAM),
    "RMSNorm": (0, 0),
    "q, k, v": (RUNS * L * 3 * flops(D, D), RUNS * L * 3 * product_bytes(D, D)),
    "attention": (RUNS * L * 12 * T * D * N, RUNS * L * 12 * STREAM),
    "o_proj": (RUNS * L * flops(D, D), RUNS * L * product_bytes(D, D)),
    "SwiGLU": (RUNS * L * 3 * flops(D, M), RUNS * L * 3 * product_bytes(D, M)),
    "head and loss": (RUNS * flops(D, V), RUNS * (product_bytes(D, V) + 3 * STREAM)),
    "RMSNorm and residual, backward": (0, RUNS * NORMS * 4 * STREAM),
    "gradient accumulation": (0, 0),
    "all-reduce": (0, 0),
    "gradient norm": (0, 4 * P),
    "AdamW": (0, 28 * P),
    "zeroed gradients": (0, 4 * P),
}
MATRIX = {part: 1e3 * f / PEAK for part, (f, _) in PARTS.items()}
BY_MEMORY = {part: 1e3 * b / MEMORY for part, (_, b) in PARTS.items()}
LIMIT = {part: max(MATRIX[part], BY_MEMORY[part]) for part in PARTS}
LIMIT["all-reduce"] = all_reduce_ms(CORES)


def percent(share):
    return f"{100 * share:.0f} %"


def row(part):
    f, b = PARTS[part]
    bound = ("link" if part == "all-reduce" else "" if not LIMIT[part] else
             "matrix unit" if MATRIX[part] == LIMIT[part] else "memory")
    cells = [f"{f / 1e12:.2f}" if f else "", f"{MATRIX[part]:.1f}" if f else "",
             f"{b / 1e9:.1f}" if b else "", f"{BY_MEMORY[part]:.1f}" if b else "", bound,
             f"{ms(COMPILER[part]):.1f}",
             percent(LIMIT[part] / ms(COMPILER[part])) if bound else ""]
    return " ".join(f"| {part} | {' | '.join(cells)} |".split())


SEEN = (1 + min(flash_attention.BLOCK, T) / T) / 2  # the share of scores that blocks leave
WIDENED = flash_attention.LANES * H / D  # a head to all lanes; also the heads of a program
ATTENTION = MATRIX["attention"] * SEEN * WIDENED * 7 / 6
PER_PROGRAM = [T * SEEN * T * flash_attention.LANES * products * WIDENED * CLOCK / (PEAK / 2)
               for products in (2, 5)]
Q_FORWARD = 2 * N * D * D, 2 * N * 2 * D + 4 * D * D
Q_LIMIT = Q_FORWARD[0] / PEAK * CLOCK
WEIGHTS = 1e3 * 16 * num_parameters(c)[1] / MEMORY  # read and written with the products, ms
SMALL_BATCH = flops(D, D, T) / product_bytes(D, D, T)
(big_tiles, big), (_, wide), (_, square) = ZEROING.values()
PER_BYTE = (wide - square) / (4 * (D * M - D * D))  # cycles, from the two that are one tile
PER_TILE = wide - PER_BYTE * 4 * D * M

PHRASES = [
    f"| peak of the matrix unit | {PEAK / 1e12:.0f} TFLOP/s |",
    f"4 units x 128 x 128 x 2 FLOPs x {CLOCK / 1e9:.3f} GHz",
    f"| memory (HBM) | {MEMORY / 1e9:.0f} GB/s |",
    f"{MEMORY / CLOCK:.0f} bytes per cycle",
    f"| a link between two chips | {LINK / 1e9:.0f} GB/s |",
    f"{PEAK / MEMORY:.1f} FLOPs per byte",
    f"{RUNS} micro-batches of {N:,} tokens, {RUNS * N:,} tokens",
    f"2 x {N:,} x {D} x {D} = {Q_FORWARD[0] / 1e9:.2f} GFLOP",
    f"{1e6 * Q_FORWARD[0] / PEAK:.0f} µs", f"{Q_FORWARD[1] / 1e6:.1f} MB",
    f"{1e6 * Q_FORWARD[1] / MEMORY:.0f} µs",
    f"{Q_FORWARD[0] / Q_FORWARD[1]:.0f} FLOPs per byte",
    f"4 FLOPs per number and moves 4 bytes: {4 / 4:.1f} FLOPs per byte",
    *map(row, PARTS),
    f"| rest | | | | | | {ms(COMPILER_SUM - sum(COMPILER.values())):.1f} | |",
    f"| sum | {sum(f for f, _ in PARTS.values()) / 1e12:.2f} | {sum(MATRIX.values()):.1f} | "
    f"{sum(b for _, b in PARTS.values()) / 1e9:.1f} | {sum(BY_MEMORY.values()):.1f} | "
    f"limits: {sum(LIMIT.values()):.1f} | {ms(COMPILER_SUM):.1f} | "
    f"{percent(sum(LIMIT.values()) / ms(COMPILER_SUM))} |",
    f"{sum(MATRIX.values()):.1f} / {ms(COMPILER_SUM):.1f} = "
    f"{100 * sum(MATRIX.values()) / ms(COMPILER_SUM):.1f} %",
    f"would have {percent(sum(MATRIX.values()) / sum(LIMIT.values()))}, or "
    f"{percent(sum(MATRIX.values()) / (sum(LIMIT.values()) + ATTENTION - LIMIT['attention']))} "
    f"with the {ATTENTION:.1f} ms that attention needs",
    f"reads {N:,} rows and writes them; backward adds {N:,} rows",
    f"{N:,} x {D} numbers = {STREAM / 1e6:.1f} MB", f"{NORMS} norms",
    f"{IN_VMEM[0]:.1f} M cycles where {IN_VMEM[1]:.1f} are the limit: "
    f"{percent(IN_VMEM[1] / IN_VMEM[0])}",
    f"{IN_HBM[0]:.1f} M where {IN_HBM[1]:.1f} are the limit: {percent(IN_HBM[1] / IN_HBM[0])}",
    *(f"| {cycles:,} | {limit:,.0f} |" for cycles, limit in
      ((PLAIN, Q_LIMIT), (Q, Q_LIMIT), (UP, Q_LIMIT * M / D))),
    f"{100 * SEEN} % of the scores",
    f"{MATRIX['attention']:.1f} x {SEEN} x {WIDENED:.0f} x 7/6 = {ATTENTION:.1f} ms",
    f"{percent(ATTENTION / ms(COMPILER['attention']))} of {ms(COMPILER['attention']):.1f} ms",
    f"{NORM_PASS:,} cycles for {N * D / 1024:,.0f} registers of 1,024",
    f"{NORM_PASS / (N * D / 1024):.1f} cycles each",
    *(f"{limit:,.0f} of {bundles:,}" for limit, bundles in zip(PER_PROGRAM, BUNDLES)),
    f"{N * V / 1e6:.0f} million logits", f"{2 * N * V / 1e6:.0f} MB in bfloat16",
    f"{percent(MATRIX['head and loss'] / 3 / ms(LOGITS))} of the peak for that product, and "
    f"{percent(MATRIX['head and loss'] * 2 / 3 / ms(LOGITS_BACKWARD))} for the two",
    f"12 x {P:,} x {RUNS} bytes = {12e-9 * P * RUNS:.1f} GB, or {12e3 * P * RUNS / MEMORY:.1f} ms",
    f"2 x 7/8 x 4 x {P:,} bytes = {2e-6 * 7 / 8 * 4 * P:.0f} MB",
    f"{28 * P / 1e9:.2f} GB", f"{28e-6 * P / ms(COMPILER['AdamW']):.0f} GB/s",
    f"{HBM_BYTES / 1e9:.1f} GB", f"{1e3 * HBM_BYTES / MEMORY:.1f} ms", f"{ms(MICRO_BATCH):.1f} ms",
    f"{WITHOUT_A_LINE:.2f} M cycles",
    f"{COMPILER['all-reduce']:.2f} M for the all-reduce",
    f"{COMPILER['zeroed gradients']:.2f} M for zeroed gradients",
    f"{WITHOUT_A_LINE - COMPILER['all-reduce'] - COMPILER['zeroed gradients']:.2f} M for small",
    f"{BACKWARD_SUMS:.2f} M", f"{MATRIX['attention']:.1f} ms is no true limit",
    *(f"{a:,} x {b:,} | {tiles} | {cycles:,} |" for (a, b), (tiles, cycles) in ZEROING.items()),
    f"{PER_TILE:,.0f} cycles for each tile", f"{1 / PER_BYTE:.0f} bytes per cycle",
    f"{big_tiles} x {PER_TILE:,.0f} + {4 * V * D / 1e6:.1f} MB / {1 / PER_BYTE:.0f}",
    f"{big_tiles * PER_TILE + PER_BYTE * 4 * V * D:,.0f} cycles",
    "1,024 numbers are one vector register", "768 x 2,048 has 821 bundles",
    f"{4096 * CLOCK / MEMORY:.1f} cycles of memory time", f"{P / 1024 / 1e3:.0f} thousand",
    f"{COMPILER['gradient norm'] * 1e6 / (P / 1024):.0f} cycles",
    # the exercises and their answers
    f"vocabulary of {2 * V:,}", "falls from 1.75 to 1",
    f"from {flops(D, D) / product_bytes(D, D):.0f} to {SMALL_BATCH:.0f} FLOPs per byte",
    f"{RUNS * WEIGHTS:.1f} ms become {RUNS * c.micro_batch_size * WEIGHTS:.1f} ms",
    f"{ATTENTION:.1f} ms become {ATTENTION / WIDENED:.1f} ms",
    f"{MATRIX['head and loss']:.1f} ms become {2 * MATRIX['head and loss']:.1f} ms",
    f"{BY_MEMORY['AdamW']:.1f} ms become {28e3 * (P + 2 * V * D) / MEMORY:.1f} ms",
    f"{all_reduce_ms(CORES):.1f} ms become {all_reduce_ms(2):.1f} ms",
    f"{sum(MATRIX.values()):.1f} ms become {CORES / 2 * sum(MATRIX.values()):.0f} ms",
    f"{BY_MEMORY['AdamW']:.1f} ms become {20e3 * P / MEMORY:.1f} ms",
    f"{8e5 * P / MEMORY / ms(COMPILER_SUM):.1f} % of a step",
]


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_number_of_the_page_is_right(phrase):
    assert phrase in PAGE


def test_all_fractions_and_thousands_of_the_page_are_checked():
    rest = PAGE.replace("libtpu 0.0.21", "")
    for phrase in sorted(PHRASES, key=len, reverse=True):
        rest = rest.replace(phrase, "")
    assert not re.findall(r".{0,40}\d[.,]\d.{0,20}", rest)


def test_the_parts_are_the_whole_model():
    assert sum(f for f, _ in PARTS.values()) == pytest.approx(RUNS * N * flops_per_token(c))
