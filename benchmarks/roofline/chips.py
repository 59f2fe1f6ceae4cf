"""What chips can do at most, and who says so.

"read": the document itself was read for this table. "quoted": read on a page that quotes it.
"unverified": known, but no page with it was at hand when this was written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GUIDE = (
    "CUDA C++ Programming Guide, Throughput of Native Arithmetic Instructions: 16 exponentials a "
    "clock and multiprocessor"
)


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: what `--chips` takes.
        arch: as `attn_kernels.triton.tuning` names it.
        processors: multiprocessors or compute units.
        memory: bytes/s of its memory.
        tensor: dense bfloat16 operations/s of its matrix units, an FMA counted as two.
        scalar: float32 instructions/s, an FMA counted as one.
        special: exponentials/s.
        cache: bytes of the last cache ahead of the memory.
        cache_rate: bytes/s from there; None if no vendor's figure is known.
        sources: of each of these, and how well they are known.
    """

    name: str
    arch: str
    processors: int
    memory: float
    tensor: float
    scalar: float
    special: float
    cache: float
    cache_rate: float | None = None
    sources: dict[str, str] = field(default_factory=dict)


A100_SHEET = (
    "NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), quoted by "
    "https://glennklockwood.com/garden/processors/A100"
)
H100_SHEET = (
    "NVIDIA H100 datasheet, quoted by https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html"
    " and https://glennklockwood.com/garden/processors/h100"
)
FA4 = "FlashAttention-4 authors, https://www.together.ai/blog/flashattention-4"

CHIPS = (
    Chip(
        "A100-80GB-SXM",
        "sm_80",
        processors=108,
        memory=2.039e12,
        tensor=312e12,
        scalar=19.5e12 / 2,
        special=108 * 16 * 1.41e9,
        cache=40e6,
        cache_rate=5120 * 1.41e9,
        sources={
            "memory": f"quoted: {A100_SHEET}",
            "tensor": f"quoted: {A100_SHEET}",
            "scalar": f"quoted: {A100_SHEET}",
            "special": f"unverified: {GUIDE}; 108 multiprocessors at 1.41 GHz",
            "cache": "quoted: https://www.thundercompute.com/blog/nvidia-a100-specs-full-guide",
            "cache_rate": "unverified: NVIDIA A100 whitepaper, 5120 bytes a clock; 1.41 GHz",
        },
    ),
    Chip(
        "H100-SXM",
        "sm_90",
        processors=132,
        memory=3.35e12,
        tensor=989.4e12,
        scalar=66.9e12 / 2,
        special=132 * 16 * 1.83e9,
        cache=50e6,
        sources={
            "memory": f"quoted: {H100_SHEET}",
            "tensor": f"quoted: {H100_SHEET}",
            "scalar": f"quoted: {H100_SHEET}",
            "special": f"unverified: {GUIDE}; 132 at 1.83 GHz (the FlashAttention-3 paper, "
            "arXiv 2407.08608, gives the same 3.9e12)",
            "cache": f"quoted: {H100_SHEET}",
        },
    ),
    Chip(
        "H200-SXM",
        "sm_90",
        processors=132,
        memory=4.8e12,
        tensor=989.4e12,
        scalar=66.9e12 / 2,
        special=132 * 16 * 1.83e9,
        cache=50e6,
        sources={
            "memory": "quoted: NVIDIA H200 announcement, https://geektopia.es/es/technology/2023/"
            "11/13/noticias/nvidia-anuncia-la-aceleradora-h200-tiene-141-gb-de-hbm3e.html",
            "tensor": f"quoted: the H100's chip; {H100_SHEET}",
            "scalar": f"quoted: the H100's chip; {H100_SHEET}",
            "special": f"unverified: {GUIDE}; 132 at 1.83 GHz",
            "cache": f"quoted: the H100's chip; {H100_SHEET}",
        },
    ),
    Chip(
        "B200",
        "sm_100",
        processors=148,
        memory=8.0e12,
        tensor=2.25e15,
        scalar=75e12 / 2,
        special=148 * 16 * 1.86e9,
        cache=126e6,
        sources={
            "memory": "quoted: https://docs.vultr.com/inference-cookbook/cuda/getting-started/"
            "hardware-overview (NVIDIA's later HGX table says 7.7 TB/s)",
            "tensor": f"read: {FA4}",
            "scalar": "quoted: NVIDIA's HGX B200 table, https://zdszero.github.io/Computer/"
            "Artificial_Intelligence/Hardware.html",
            "special": f"read: as many a clock and multiprocessor as the H100, {FA4}; 148 "
            "multiprocessors, read: https://chipsandcheese.com/p/"
            "nvidias-b200-keeping-the-cuda-juggernaut; 1.86 GHz, quoted: https://hmc-tech.com/gpus/"
            "nvidia-b200-vs-nvidia-b100",
            "cache": "unverified: the device's own property (one page says 65.5 MB)",
        },
    ),
    Chip(
        "MI300X",
        "gfx942",
        processors=304,
        memory=5.3e12,
        tensor=1307.4e12,
        scalar=163.4e12 / 2,
        special=304 * 16 * 2.1e9,
        cache=256e6,
        cache_rate=17.2e12,
        sources={
            "memory": "quoted: https://www.emergentmind.com/topics/amd-mi300x-gpu",
            "tensor": "unverified: AMD Instinct MI300X data sheet",
            "scalar": "unverified: AMD Instinct MI300X data sheet (vector FP32)",
            "special": "unverified: CDNA3 executes exponentials at a quarter of its 64 lanes' rate;"
            " 304 compute units (read: https://rocm.docs.amd.com/en/docs-6.2.2/conceptual/gpu-arch/"
            "mi300.html) at 2.1 GHz",
            "cache": "read: https://servethehome.com/"
            "amd-instinct-mi300x-gpu-and-mi300a-apus-launched-for-ai-era/3 (AMD's slides)",
            "cache_rate": "read: the same, rounded to 17 TB/s there",
        },
    ),
)

REACHED = (
    "What others reach of such limits, in public:",
    "A100 prefill: FlashAttention-2 up to 73 % of the tensor rate, forward (unverified: arXiv "
    "2307.08691)",
    "H100 prefill: FlashAttention-3 up to 740 TFLOPS in fp16, 75 %; FlashAttention-2 35 % (read: "
    "abstract of arXiv 2407.08608, https://huggingface.co/papers/2407.08608)",
    "B200 prefill: FlashAttention-4 up to 1605 TFLOPS in bf16, 71 %, 2.7 times Triton's "
    f"(read: {FA4})",
    "H800 decode: FlashMLA (MLA, not GQA) up to 3000 GB/s, 90 % of 3350 GB/s (read: "
    "https://github.com/deepseek-ai/FlashMLA, README)",
    "vLLM's Triton kernel, and GQA decode by bandwidth: no figure found that can be cited",
)
