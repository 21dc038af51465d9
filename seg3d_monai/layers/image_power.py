"""What a network does first with an image: dim objects are lifted. Must not know what a network is."""

from torch import Tensor, nn


class ImagePower(nn.Module):
    """Raises intensities to a power, sign kept.

    Args:
        power: 1 for images as they are; 0.5 lifts dim objects, and makes shot noise about as strong in bright places
            as in dim ones (Anscombe 1948).

    Raises:
        ValueError: a power that is not above 0.
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        if not power > 0:
            raise ValueError(f"image_power is {power}; it must be more than 0")
        self.power = power

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, D, H, W] -> the same. An image is no place for gradients: at 0 their slope is infinite."""
        return images if self.power == 1 else images.sign() * images.abs().pow(self.power)

    def extra_repr(self) -> str:
        """The power, for `repr`: no weight tells it."""
        return f"power={self.power}"
