"""Convolution blocks, with the norm that is asked for.

"group" is GroupNorm, whose statistics are of all that is seen: features of a place depend on how much background a crop
or a block shows. "channel" is a LayerNorm over the channels of each place, and "batch" is BatchNorm, whose statistics
are of the training: with either the same features come from blocks of any size. A LayerNorm's convolution has a bias,
without which bright places would look as dim ones.

With "channel" and "batch" maps have their channels last in memory, where oneDNN's convolutions take a fifth less time.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from seg3d_monai.layers.norm import BatchNorm, ChannelNorm, GroupNorm


def group_norm(channels: int, groups: int = 8, relu: bool = False) -> GroupNorm:
    """GroupNorm with `groups` groups, or with one group where `channels` is not a multiple of it.

    Args:
        channels: of the map.
        groups: as many as can be.
        relu: whether a ReLU follows.

    Returns:
        The norm.
    """
    return GroupNorm(groups if channels % groups == 0 else 1, channels, relu=relu)


_NORM_BUILDERS: dict[str, Callable[..., nn.Module]] = {"group": group_norm, "channel": ChannelNorm, "batch": BatchNorm}
NORMS = tuple(_NORM_BUILDERS)


class Conv3d(nn.Conv3d):
    """torch's Conv3d, in float32 where oneDNN's bf16 gradient by the weights is wrong.

    On CPUs with AVX512-BF16 and without AMX, oneDNN 3.12 adds that gradient to memory that it has not cleared, if the
    input has fewer planes than the kernel and more than one. Outputs keep the dtype of the input there.

    Args: as of torch.nn.Conv3d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, D, H, W] -> [N, out_channels, D', H', W']."""
        is_shallow = input.device.type == "cpu" and 1 < input.shape[2] < self.kernel_size[0]
        if not (is_shallow and (torch.is_autocast_enabled("cpu") or input.dtype == torch.bfloat16)):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(input.float(), self.weight.float(), bias).to(input.dtype)


class ConvNormAct(nn.Sequential):
    """3D convolution, norm and, unless `act` is False, ReLU. Keeps the size at stride 1 (odd kernels).

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel_size: odd extent, one for all axes or (z, y, x).
        stride: stride, one for all axes or (z, y, x); the output size is ceil(size / stride).
        act: whether a ReLU follows.
        norm: one of `NORMS`.

    Raises:
        ValueError: an even kernel, a kernel or stride that is not positive, or another norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        act: bool = True,
        norm: str = "group",
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; choose one of {', '.join(NORMS)}")
        kernel = check_axes("kernel_size", (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size)
        step = check_axes("stride", (stride,) * 3 if isinstance(stride, int) else stride)
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel_size is {kernel_size!r}; give odd extents, which keep the size at stride 1")
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        conv = Conv3d(in_channels, out_channels, kernel, step, padding, bias=norm == "channel")
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if norm != "group":
            conv.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        super().__init__(conv, _NORM_BUILDERS[norm](out_channels, relu=act))

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, D, H, W] -> [N, out_channels, ceil(D/sz), ceil(H/sy), ceil(W/sx)]."""
        out: Tensor = super().forward(x)
        return out


def check_axes(name: str, value: Sequence[int]) -> tuple[int, int, int]:
    """Three positive integers (z, y, x) as a tuple.

    Raises:
        ValueError: `value` is not three positive integers.
    """
    if isinstance(value, torch.Size | list | tuple) and len(value) == 3 and all(int(v) == v and v > 0 for v in value):
        return int(value[0]), int(value[1]), int(value[2])
    raise ValueError(f"{name} is {value!r}; give three positive integers (z, y, x)")
