"""Choice of the autocast type, the same for training and prediction."""

import torch

AMP = ("auto", "off", "bf16", "fp16")


def autocast_dtype(amp: str, device: torch.device | str) -> torch.dtype | None:
    """The type of autocast on a device, None for none.

    Args:
        amp: "off", "bf16", "fp16" (CUDA only), or "auto": bf16 where the device computes in it, else off. A CPU
            without bf16 instructions emulates them and is slower than in float32.
        device: where the network runs.

    Raises:
        ValueError: unknown `amp`, or fp16 on a CPU.
    """
    kind = torch.device(device).type
    if amp not in AMP or (amp == "fp16" and kind != "cuda"):
        raise ValueError(f"amp={amp!r} on {kind}; choose one of {', '.join(AMP)}, fp16 only on CUDA")
    if amp == "auto":
        return torch.bfloat16 if _computes_in_bf16(kind) else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def _computes_in_bf16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    # Not public in torch yet; where it is missing, float32 is always right.
    asks = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(asks()) if asks is not None else False
