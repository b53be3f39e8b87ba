"""Slow, plain truth: one example, one class at a time, by ordinary autograd; and networks to try it on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpccl.compat import import_timm
from hpccl.curvature.protocols import Examples

NUM_CLASSES = 7
HEAD = (1, 2, 4, 5)


def examples(pixels: Tensor, *, weight: Tensor | None = None, classes: tuple[int, ...] = HEAD) -> Examples:
    """Examples with labels cycling through the head."""
    head = torch.zeros(NUM_CLASSES, dtype=torch.bool)
    head[list(classes)] = True
    labels = torch.tensor(classes)[torch.arange(len(pixels)) * 5 % len(classes)]
    weights = torch.ones(len(pixels)) if weight is None else weight
    return Examples(pixels, labels, head, torch.arange(100, 100 + len(pixels)), weights)


def jacobian(model: nn.Module, image: Tensor) -> Iterator[dict[str, Tensor]]:
    """Gradient of each logit for one image, by parameter name."""
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for logit in model(image[None])[0]:
        grads = torch.autograd.grad(logit, list(named.values()), retain_graph=True, materialize_grads=True)
        yield dict(zip(named, grads, strict=True))


def true_diagonal(model: nn.Module, data: Examples, fisher: str) -> dict[str, Tensor]:
    """sum_i w_i diag(J' Lambda J), as sum_c p_c J_c^2 - (sum_c p_c J_c)^2; or squares of (p - e_y)' J."""
    model = model.eval()
    classes = data.head.nonzero().flatten()
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters() if value.requires_grad}
    for image, label, weight in zip(data.pixels, data.labels, data.weight, strict=True):
        p = model(image[None])[0, classes].softmax(0).detach()
        rows = [row for number, row in enumerate(jacobian(model, image)) if number in classes]
        target = functional.one_hot(torch.searchsorted(classes, label), len(classes)).to(p)
        for name, value in total.items():
            grads = torch.stack([row[name] for row in rows]).flatten(1)
            exact = p @ grads.square() - (p @ grads).square()
            one = exact if fisher == "ggn" else ((p - target) @ grads).square()
            value.add_(weight * one.view_as(value))
    return total


class Shared(nn.Module):
    """One linear layer called twice, and one weight that is also used without its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.wrapped = nn.Linear(6, 6)
        self.last = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.twice(x.flatten(1)))).tanh()
        out: Tensor = self.last(self.wrapped(hidden).tanh() + functional.linear(hidden, self.wrapped.weight).sin())
        return out


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.first(x.flatten(1)).tanh()).tanh())
        return out


class Wrapped(nn.Module):
    """A convolution whose hooks never fire, a free parameter, and in-place residual additions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.wrapped = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.last = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x), inplace=True)
        y = self.norm(self.inner(x))
        y += x
        y = self.wrapped.forward(y) * self.scale
        out: Tensor = self.last(y.tanh().mean((2, 3)))
        return out


class StandardConv(nn.Conv2d):
    """A convolution that standardises its weight: a subclass that is not what its base class is."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return functional.conv2d(x, weight, self.bias)


class Attention(nn.Module):
    """nn.MultiheadAttention, which uses its own and its part's weights without calling layers."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.mix = nn.Linear(8, 8)
        self.last = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # [n, 3, 4]
        tokens = self.embed(tokens if self.batch_first else tokens.transpose(0, 1))
        tokens = self.mix(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).tanh()
        out: Tensor = self.last(tokens.mean(1 if self.batch_first else 0))
        return out


class Scale(nn.Module):
    """A layer that hpccl has no formula for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.factor)


class Windows(nn.Module):
    """Rows of the batch dim are quarters of an image: image by image, or (which is harder) quarter by quarter."""

    def __init__(self, *, by_image: bool) -> None:
        super().__init__()
        self.by_image = by_image
        self.conv = nn.Conv2d(2, 3, 2)
        self.norm = nn.GroupNorm(1, 3)
        self.mix = nn.Linear(3, 4)
        self.scale = Scale(4)
        self.last = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        windows = x.unflatten(2, (2, 3)).unflatten(4, (2, 3)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [n, 4, c, 3, 3]
        rows = windows.flatten(0, 1) if self.by_image else windows.transpose(0, 1).flatten(0, 1)
        features = self.scale(self.mix(self.norm(self.conv(rows)).tanh().mean((2, 3))))
        features = features.unflatten(0, (n, 4) if self.by_image else (4, n))
        out: Tensor = self.last(features.mean(1 if self.by_image else 0))
        return out


def _norms() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 3, 3, bias=False),
        nn.LayerNorm([3, 2, 2]),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 9),
        nn.BatchNorm1d(9),
        nn.Tanh(),
        nn.Linear(9, NUM_CLASSES),
    )
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.get_buffer("running_mean").normal_()
                module.get_buffer("running_var").uniform_(0.5, 2)
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
                module.weight.normal_()
                module.bias.normal_()
                module.weight.flatten()[0] = 0.0
    return net


def _convs() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(4, 8, 3, dilation=2, padding="same", groups=2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 5, 1, stride=2),
        nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 2),
        nn.Flatten(),
        nn.LazyLinear(NUM_CLASSES),
    )


def _prelu() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.PReLU(4), nn.Flatten(), nn.Linear(16, NUM_CLASSES))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 9), nn.ReLU(), nn.Linear(9, NUM_CLASSES))


def _vit() -> nn.Module:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, init_values=0.3, num_classes=NUM_CLASSES
    )


def _convnext() -> nn.Module:
    import_timm()
    from timm.models.convnext import ConvNeXt

    net: nn.Module = ConvNeXt(depths=(1, 1, 1, 1), dims=(3, 4, 4, 5), ls_init_value=0.5, num_classes=NUM_CLASSES)
    return net


def _swin() -> nn.Module:
    import_timm()
    from timm.models.swin_transformer import SwinTransformer

    net: nn.Module = SwinTransformer(
        img_size=8, patch_size=1, window_size=4, embed_dim=4, depths=(2,), num_heads=(2,), num_classes=NUM_CLASSES
    )
    return net


NETS = {
    "mlp": (_mlp, (2, 3, 3)),
    "convs": (_convs, (2, 6, 6)),
    "norms": (_norms, (2, 6, 6)),
    "standard": (lambda: nn.Sequential(StandardConv(2, 3, 3), nn.Flatten(), nn.Linear(3, NUM_CLASSES)), (2, 3, 3)),
    "prelu": (_prelu, (2, 3, 3)),
    "shared": (Shared, (1, 2, 3)),
    "tied": (Tied, (1, 2, 3)),
    "wrapped": (Wrapped, (2, 4, 4)),
    "attention": (lambda: Attention(batch_first=True), (3, 2, 2)),
    "attention-tokens-first": (lambda: Attention(batch_first=False), (3, 2, 2)),
    "windows": (lambda: Windows(by_image=True), (2, 6, 6)),
    "windows-first": (lambda: Windows(by_image=False), (2, 6, 6)),
    "vit": (_vit, (3, 8, 8)),
    "convnext": (_convnext, (3, 32, 32)),
    "swin": (_swin, (3, 8, 8)),
}


def build(name: str, count: int, *, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network and pixels for it, the same every time."""
    torch.manual_seed(3)
    make, shape = NETS[name]
    net = make()
    pixels = torch.randn(count, *shape)
    net.eval()(pixels)
    with torch.no_grad():
        for parameter in net.parameters():  # away from symmetric or zero initial values
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)):
            module.weight.data[0] = 0.0
    return net.to(dtype), pixels.to(dtype)


def cusp() -> tuple[nn.Module, Tensor]:
    """The gradient of the last of six examples is not finite, its logits are."""

    class Cusp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(min=0).sqrt()  # infinite slope at 0, times 0

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), Cusp(), nn.Linear(4, NUM_CLASSES))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.eye(4))
        model.get_parameter("1.bias").zero_()
    pixels = torch.rand(6, 4) + 0.1
    pixels[5, 2] = 0.0
    return model, pixels


def overflowing() -> tuple[nn.Module, Tensor]:
    """Gradients are finite in fp32, their squares are not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, NUM_CLASSES))
    with torch.no_grad():
        model.get_parameter("1.weight").zero_()
    return model, torch.full((3, 4), 1e25)
