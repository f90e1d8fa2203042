"""Networks over tables, graphs, sets, fields and actions, small, in plain PyTorch: targets of ``deepseed zoo`` that DeepSeed was not made with."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 8
Target = tuple[nn.Module, Any, dict[str, Any]]


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1])


class DeepFM(nn.Module):
    def __init__(self, fields: int = 5, size: int = 20, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("offset", torch.arange(fields) * size)
        self.first, self.table, self.deep = nn.Embedding(fields * size, 1), nn.Embedding(fields * size, width), mlp(fields * width, 32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        v = self.table(x + self.offset)
        pairs = 0.5 * (v.sum(1) ** 2 - (v**2).sum(1)).sum(1)
        return self.first(x + self.offset).sum((1, 2)) + pairs + self.deep(v.flatten(1))[:, 0]


def deepfm() -> Target:
    torch.manual_seed(0)
    batch = {"x": torch.randint(0, 20, (ROWS, 5)), "y": torch.randint(0, 2, (ROWS,)).float()}
    return DeepFM().train(), batch, {"loss_fn": lambda m, b: F.binary_cross_entropy_with_logits(m(b["x"]), b["y"])}


class TwoTowers(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(40, width), nn.EmbeddingBag(60, width, mode="mean")
        self.user, self.item, self.warm = mlp(width, 32, width), mlp(width, 32, width), nn.Parameter(torch.tensor(2.0))

    def forward(self, user: Tensor, bag: Tensor) -> Tensor:
        return F.normalize(self.user(self.users(user)), dim=-1) @ F.normalize(self.item(self.items(bag)), dim=-1).T * self.warm.exp()


def two_towers() -> Target:
    """Each row's item against all rows' items."""
    torch.manual_seed(0)
    batch = {"user": torch.randint(0, 40, (ROWS,)), "bag": torch.randint(0, 60, (ROWS, 4))}
    return TwoTowers().train(), batch, {"loss_fn": lambda m, b: F.cross_entropy(m(b["user"], b["bag"]), torch.arange(len(b["user"])))}


class DIN(nn.Module):
    """What was clicked before, weighted by how near it is to the candidate (Zhou et al., 2018)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.items, self.score, self.top = nn.Embedding(30, width, padding_idx=0), mlp(4 * width, 16, 1, act=nn.Sigmoid), mlp(2 * width, 16, 1, act=nn.PReLU)

    def forward(self, past: Tensor, candidate: Tensor) -> Tensor:
        k, q = self.items(past), self.items(candidate)
        pair = q[:, None].expand_as(k)
        weight = self.score(torch.cat([pair, k, pair - k, pair * k], -1)) * (past != 0)[..., None]
        return self.top(torch.cat([(weight * k).sum(1), q], 1))[:, 0]


def din() -> Target:
    torch.manual_seed(0)
    batch = {"past": torch.randint(0, 30, (ROWS, 6)), "candidate": torch.randint(1, 30, (ROWS,)), "y": torch.randint(0, 2, (ROWS,)).float()}
    return DIN().train(), batch, {"loss_fn": lambda m, b: F.binary_cross_entropy_with_logits(m(b["past"], b["candidate"]), b["y"])}


class FTTransformer(nn.Module):
    def __init__(self, numbers: int = 6, width: int = 32) -> None:
        super().__init__()
        self.weight, self.bias, self.cls = nn.Parameter(torch.randn(numbers, width) * 0.1), nn.Parameter(torch.zeros(numbers, width)), nn.Parameter(torch.randn(1, 1, width))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 64, batch_first=True), 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., None] * self.weight + self.bias
        return self.head(self.encoder(torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1))[:, 0])[:, 0]


def ft_transformer() -> Target:
    torch.manual_seed(0)
    return FTTransformer().train(), {"x": torch.randn(ROWS, 6), "y": torch.randn(ROWS)}, {"loss_fn": lambda m, b: F.huber_loss(m(b["x"]), b["y"])}


class GCN(nn.Module):
    """Dense adjacency, one small graph a row."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        near = near + torch.eye(near.shape[-1], dtype=near.dtype)
        scale = near.sum(-1).rsqrt()
        near = scale[:, :, None] * near * scale[:, None]
        x = F.relu(near @ self.one(x))
        return self.head(F.relu(near @ self.two(F.dropout(x, 0.2, self.training))).mean(1))


def gcn() -> Target:
    torch.manual_seed(0)
    near = (torch.rand(ROWS, 7, 7) < 0.4).float()
    batch = {"x": torch.randn(ROWS, 7, 5), "near": (near + near.mT).clamp(max=1), "y": torch.randint(0, 3, (ROWS,))}
    return GCN().train(), batch, {"loss_fn": lambda m, b: F.cross_entropy(m(b["x"], b["near"]), b["y"])}


class GAT(nn.Module):
    """One graph as a list of edges: scores by edge, a softmax over each node's incoming edges, sums by index."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.proj, self.head = heads, nn.Linear(6, heads * width, bias=False), nn.Linear(heads * width, 4)
        self.a, self.b = nn.Parameter(torch.randn(heads, width) * 0.1), nn.Parameter(torch.randn(heads, width) * 0.1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[:, 0], edges[:, 1]
        h = self.proj(x).view(len(x), self.heads, -1)
        score = F.leaky_relu((h * self.a).sum(-1)[source] + (h * self.b).sum(-1)[target], 0.2)
        top = torch.full((len(x), self.heads), -1e9, dtype=score.dtype).scatter_reduce(0, target[:, None].expand(-1, self.heads), score, "amax")
        weight = (score - top.detach()[target]).exp()
        total = torch.zeros(len(x), self.heads, dtype=weight.dtype).index_add(0, target, weight)
        out = torch.zeros_like(h).index_add(0, target, h[source] * (weight / total[target])[..., None])
        return self.head(F.elu(out.flatten(1)))


def gat() -> Target:
    torch.manual_seed(0)
    loops = torch.arange(ROWS)[:, None].expand(-1, 2)
    batch = {"x": torch.randn(ROWS, 6), "edges": torch.cat([torch.randint(0, ROWS, (16, 2)), loops]), "y": torch.randint(0, 4, (ROWS,))}
    return GAT().train(), batch, {"loss_fn": lambda m, b: F.cross_entropy(m(b["x"], b["edges"]), b["y"])}


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = mlp(3, 32, 16, act=nn.Tanh), mlp(32, 16, 1, act=nn.ELU)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        h = self.phi(x)
        most = h.masked_fill(~real[..., None], -torch.inf).amax(1)
        return self.rho(torch.cat([(h * real[..., None]).sum(1) / real.sum(1, keepdim=True), most], 1))[:, 0]


def deep_sets() -> Target:
    torch.manual_seed(0)
    batch = {"x": torch.randn(ROWS, 9, 3), "real": torch.arange(9)[None] < torch.arange(2, 2 + ROWS)[:, None], "y": torch.randn(ROWS)}
    return DeepSets().train(), batch, {"loss_fn": lambda m, b: F.mse_loss(m(b["x"], b["real"]), b["y"])}


class NeuralODE(nn.Module):
    """Four steps of Runge-Kutta 4."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = mlp(4, 32, 4, act=nn.Tanh), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = 0.25
        for _ in range(4):
            a = self.f(x)
            b = self.f(x + h / 2 * a)
            c = self.f(x + h / 2 * b)
            d = self.f(x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return self.head(x)


def neural_ode() -> Target:
    torch.manual_seed(0)
    return NeuralODE().train(), {"x": torch.randn(ROWS, 4), "y": torch.randint(0, 2, (ROWS,))}, {"loss_fn": lambda m, b: F.cross_entropy(m(b["x"]), b["y"])}


class RealNVP(nn.Module):
    """Affine couplings; returns the negative log likelihood."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(size // 2, 24, size, act=nn.SiLU) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=x.dtype)
        for net in self.nets:
            a, b = x.chunk(2, 1)
            scale, shift = net(a).chunk(2, 1)
            scale = torch.tanh(scale)
            x = torch.cat([b * scale.exp() + shift, a], 1)
            total = total + scale.sum(1)
        return (0.5 * (x**2).sum(1) + x.shape[1] / 2 * math.log(2 * math.pi) - total).mean()


def realnvp() -> Target:
    torch.manual_seed(0)
    return RealNVP().train(), torch.randn(ROWS, 6), {"loss_fn": lambda m, b: m(b)}


def mixture_density() -> Target:
    torch.manual_seed(0)

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        logit, mean, spread = m(b["x"]).chunk(3, -1)
        mix = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logit), torch.distributions.Normal(mean, F.softplus(spread) + 1e-3))
        return -mix.log_prob(b["y"]).mean()

    return mlp(4, 32, 15, act=nn.Tanh).train(), {"x": torch.randn(ROWS, 4), "y": torch.randn(ROWS)}, {"loss_fn": loss}


class NeRF(nn.Module):
    """Colours along rays: positions as sines, densities to weights by a running product."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(24, 48, 48, 4)

    def forward(self, origin: Tensor, direction: Tensor) -> Tensor:
        t = torch.linspace(0.5, 2, 10, dtype=origin.dtype)
        at = (origin[:, None] + direction[:, None] * t[:, None])[..., None] * 2.0 ** torch.arange(4)
        out = self.net(torch.cat([at.sin(), at.cos()], -1).flatten(2))
        alpha = 1 - torch.exp(-F.relu(out[..., 3]) * (t[1] - t[0]))
        before = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], 1), 1)[:, :-1]
        return ((alpha * before)[..., None] * out[..., :3].sigmoid()).sum(1)


def nerf() -> Target:
    torch.manual_seed(0)
    batch = {"o": torch.randn(ROWS, 3), "d": F.normalize(torch.randn(ROWS, 3), dim=-1), "rgb": torch.rand(ROWS, 3)}
    return NeRF().train(), batch, {"loss_fn": lambda m, b: F.mse_loss(m(b["o"], b["d"]), b["rgb"])}


class Dueling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.value, self.advantage = mlp(6, 32, 32), nn.Linear(32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.body(x))
        a = self.advantage(h)
        return self.value(h) + a - a.mean(1, keepdim=True)


def dqn() -> Target:
    torch.manual_seed(0)

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            best = m(b["after"]).max(1).values
        return F.smooth_l1_loss(m(b["state"]).gather(1, b["action"][:, None])[:, 0], b["reward"] + 0.99 * best * (1 - b["done"]))

    batch = {"state": torch.randn(ROWS, 6), "after": torch.randn(ROWS, 6), "action": torch.randint(0, 4, (ROWS,)), "reward": torch.randn(ROWS), "done": torch.randint(0, 2, (ROWS,)).float()}
    return Dueling().train(), batch, {"loss_fn": loss}


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.spread, self.value = mlp(5, 32, 32, act=nn.Tanh), nn.Linear(32, 2), nn.Parameter(torch.zeros(2)), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[torch.distributions.Distribution, Tensor]:
        h = self.body(x)
        return torch.distributions.Independent(torch.distributions.Normal(self.mean(h), self.spread.exp().expand(len(x), 2)), 1), self.value(h)[:, 0]


def ppo() -> Target:
    """The clipped objective, advantages normalised over the batch."""
    torch.manual_seed(0)

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        policy, value = m(b["x"])
        ratio = (policy.log_prob(b["action"]) - b["old"]).exp()
        gain = (b["gain"] - b["gain"].mean()) / (b["gain"].std() + 1e-8)
        return -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean() + 0.5 * F.mse_loss(value, b["return"]) - 0.01 * policy.entropy().mean()

    batch = {"x": torch.randn(ROWS, 5), "action": torch.randn(ROWS, 2), "old": torch.randn(ROWS) - 3, "gain": torch.randn(ROWS), "return": torch.randn(ROWS)}
    return ActorCritic().train(), batch, {"loss_fn": loss}


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU()), mlp(32, 32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.encoder(x)), dim=1)


def simclr() -> Target:
    torch.manual_seed(0)

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        z = torch.cat([m(b["one"]), m(b["two"])])
        n = len(b["one"])
        near = (z @ z.T / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(near, torch.arange(2 * n).roll(n))

    return SimCLR().train(), {"one": torch.randn(ROWS, 10), "two": torch.randn(ROWS, 10)}, {"loss_fn": loss}


class BYOL(nn.Module):
    """The target network follows the online one by a moving average that forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target, self.predict = mlp(10, 32, 16), mlp(10, 32, 16), mlp(16, 32, 16)
        self.target.load_state_dict(self.online.state_dict())
        self.target.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
                mine.lerp_(theirs, 0.01)
        far = [2 - 2 * F.cosine_similarity(self.predict(self.online(x)), self.target(y).detach(), dim=-1) for x, y in ((a, b), (b, a))]
        return (far[0] + far[1]).mean()


def byol() -> Target:
    torch.manual_seed(0)
    return BYOL().train(), {"one": torch.randn(ROWS, 10), "two": torch.randn(ROWS, 10)}, {"loss_fn": lambda m, b: m(b["one"], b["two"])}


def barlow_twins() -> Target:
    torch.manual_seed(0)

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        one, two = ((z - z.mean(0)) / z.std(0) for z in (m(b["one"]), m(b["two"])))
        c = one.T @ two / len(one)
        return (torch.diagonal(c) - 1).pow(2).sum() + 0.005 * (c - torch.diag(torch.diagonal(c))).pow(2).sum()

    return mlp(10, 32, 12).train(), {"one": torch.randn(ROWS, 10), "two": torch.randn(ROWS, 10)}, {"loss_fn": loss}


class HyperNet(nn.Module):
    """One network makes the weights of another, for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.make = mlp(3, 24, 4 * 8 + 8 + 8)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        w = self.make(task)
        h = torch.tanh(torch.einsum("bni,bio->bno", x, w[:, :32].view(-1, 4, 8)) + w[:, None, 32:40])
        return (h * w[:, None, 40:]).sum(-1)


def hypernet() -> Target:
    torch.manual_seed(0)
    return HyperNet().train(), {"x": torch.randn(ROWS, 5, 4), "task": torch.randn(ROWS, 3), "y": torch.randn(ROWS, 5)}, {"loss_fn": lambda m, b: F.mse_loss(m(b["x"], b["task"]), b["y"])}


class Perceiver(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.latent, self.embed = nn.Parameter(torch.randn(4, width) * 0.1), nn.Linear(6, width)
        self.cross, self.own = nn.MultiheadAttention(width, 4, batch_first=True, dropout=0.1), nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        z = self.latent.expand(len(x), -1, -1)
        return self.head(self.own(z + self.cross(z, x, x, need_weights=False)[0]).mean(1))


def perceiver() -> Target:
    torch.manual_seed(0)
    return Perceiver().train(), {"x": torch.randn(ROWS, 20, 6), "y": torch.randint(0, 5, (ROWS,))}, {"loss_fn": lambda m, b: F.cross_entropy(m(b["x"]), b["y"])}


class Experts(nn.Module):
    """A soft mixture with a loss that balances the router, two tasks (MMoE)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gates, self.heads = nn.ModuleList(mlp(8, 32, 16) for _ in range(3)), nn.ModuleList(nn.Linear(8, 3) for _ in range(2)), nn.ModuleList(mlp(16, 8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, gates = torch.stack([e(x) for e in self.experts], 1), [g(x).softmax(-1) for g in self.gates]
        made = torch.cat([head((g[..., None] * out).sum(1)) for head, g in zip(self.heads, gates, strict=True)], 1)
        return made, sum(g.mean(0).var() for g in gates)


def mmoe() -> Target:
    torch.manual_seed(0)

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        made, uneven = m(b["x"])
        return F.mse_loss(made, b["y"]) + 0.1 * uneven

    return Experts().train(), {"x": torch.randn(ROWS, 8), "y": torch.randn(ROWS, 2)}, {"loss_fn": loss}


class Siren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(10 * layer(x))
        return self.layers[-1](x)[:, 0]


def pinn() -> Target:
    """A physics-informed loss: the field's Laplacian at the points of a batch."""
    torch.manual_seed(0)

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        at = b["x"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(m(at).sum(), at, create_graph=True)
        laplacian = sum(torch.autograd.grad(slope[:, n].sum(), at, create_graph=True)[0][:, n] for n in range(2))
        return (laplacian - b["f"]).pow(2).mean()

    return Siren().train(), {"x": torch.rand(ROWS, 2), "f": torch.randn(ROWS)}, {"loss_fn": loss}


def triplets() -> Target:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 8))

    def hardest(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        z, same = m(b["x"]), b["y"][:, None] == b["y"]
        far = torch.cdist(z, z)
        return F.relu(0.5 + far.masked_fill(~same, -1).amax(1) - far.masked_fill(same, 1e6).amin(1)).mean()

    return model.train(), {"x": torch.randn(ROWS, 12), "y": torch.arange(ROWS) % 3}, {"loss_fn": hardest}
