"""Networks over sequences, small, in plain PyTorch: targets of ``deepseed zoo`` that DeepSeed was not made with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS, TOKENS, WORDS = 8, 12, 50
Target = tuple[nn.Module, Any, dict[str, Any]]


def words(tokens: int = TOKENS) -> dict[str, Tensor]:
    """Ids padded at the right with 0, and the next id at each place (-100: none)."""
    ids = torch.randint(1, WORDS, (ROWS, tokens + 1))
    lengths = torch.tensor([tokens - n % 4 for n in range(ROWS)])
    real = torch.arange(tokens)[None] < lengths[:, None]
    return {"ids": torch.where(real, ids[:, :-1], 0), "next": torch.where(real, ids[:, 1:], -100), "lengths": lengths}


def next_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["next"].flatten(), ignore_index=-100)


def language(model: nn.Module) -> Target:
    return model.train(), words(), {"loss_fn": next_error}


class LSTMLM(nn.Module):
    """Two layers, the output's weight is the embedding's."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(WORDS, width), nn.Dropout(0.2)
        self.lstm, self.out = nn.LSTM(width, width, 2, batch_first=True, dropout=0.1), nn.Linear(width, WORDS)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.drop(self.lstm(self.drop(self.embed(ids)))[0]))


def lstm_lm() -> Target:
    torch.manual_seed(0)
    return language(LSTMLM())


class Tagger(nn.Module):
    def __init__(self, packed: bool, width: int = 16) -> None:
        super().__init__()
        self.packed = packed
        self.embed = nn.Embedding(WORDS, width, padding_idx=0)
        self.gru, self.out = nn.GRU(width, width, bidirectional=True, batch_first=True), nn.Linear(2 * width, 5)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(ids)
        if not self.packed:
            return self.out(self.gru(x)[0])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.out(h)


def tag_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["ids"], batch["lengths"]).flatten(0, 1), torch.where(batch["next"] < 0, -100, batch["next"] % 5).flatten())


def bigru_tagger() -> Target:
    torch.manual_seed(0)
    return Tagger(packed=False).train(), words(), {"loss_fn": tag_error}


def packed_gru_tagger() -> Target:
    torch.manual_seed(0)
    return Tagger(packed=True).train(), words(), {"loss_fn": tag_error}


class Seq2Seq(nn.Module):
    """A decoder that looks back at the encoder's states at each step (Bahdanau et al., 2015)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.encoder, self.cell = nn.Embedding(WORDS, width), nn.GRU(width, width, batch_first=True), nn.GRUCell(2 * width, width)
        self.query, self.key, self.score, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1), nn.Linear(2 * width, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        states, last = self.encoder(self.embed(source))
        h, keys, made = last[0], self.key(states), []
        mask = (source == 0).masked_fill((source == 0).all(1, keepdim=True), False)
        for t in range(target.shape[1]):
            scores = self.score(torch.tanh(self.query(h)[:, None] + keys))[..., 0].masked_fill(mask, -1e9)
            seen = (scores.softmax(1)[..., None] * states).sum(1)
            h = self.cell(torch.cat([self.embed(target[:, t]), seen], 1), h)
            made.append(self.out(torch.cat([h, seen], 1)))
        return torch.stack(made, 1)


def seq2seq() -> Target:
    torch.manual_seed(0)
    batch = {"source": words(6)["ids"], "target": torch.randint(1, WORDS, (ROWS, 6))}

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(m(b["source"], b["target"][:, :-1]).flatten(0, 1), b["target"][:, 1:].flatten())

    return Seq2Seq().train(), batch, {"loss_fn": loss}


class SSM(nn.Module):
    """A diagonal state space, step by step."""

    def __init__(self, width: int = 16, state: int = 4) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.decay, self.read, self.skip = nn.Parameter(torch.rand(width, state)), nn.Parameter(torch.randn(width, state) * 0.3), nn.Parameter(torch.ones(width))
        self.gate = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h, made = x.new_zeros(len(x), *self.decay.shape), []
        keep = torch.exp(-F.softplus(self.decay))
        for t in range(x.shape[1]):
            h = keep * h + x[:, t, :, None]
            made.append((h * self.read).sum(-1) + self.skip * x[:, t])
        return self.out(torch.stack(made, 1) * F.silu(self.gate(x)))


def ssm_unrolled() -> Target:
    torch.manual_seed(0)
    return language(SSM())


class LongConv(nn.Module):
    """Hyena's operator: a long implicit convolution by FFT between two gates (Poli et al., 2023)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.three, self.out = nn.Embedding(WORDS, width), nn.Linear(width, 3 * width), nn.Linear(width, WORDS)
        self.filter = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.three(self.embed(ids)).chunk(3, -1)
        n = ids.shape[1]
        t = torch.linspace(0, 1, n, dtype=q.dtype)[:, None]
        kernel = self.filter(torch.cat([t, torch.sin(t * 3), torch.cos(t * 3), torch.sin(t * 9), torch.cos(t * 9)], 1)) * torch.exp(-3 * t)
        y = torch.fft.irfft(torch.fft.rfft(k * v, 2 * n, dim=1) * torch.fft.rfft(kernel, 2 * n, dim=0), 2 * n, dim=1)[:, :n]
        return self.out(q * y)


def long_conv() -> Target:
    torch.manual_seed(0)
    return language(LongConv())


class WaveNet(nn.Module):
    """Dilated causal convolutions under weight norm, gates and skips."""

    def __init__(self, width: int = 16, old: bool = False) -> None:
        super().__init__()
        norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        self.embed, self.out = nn.Embedding(WORDS, width), nn.Conv1d(width, WORDS, 1)
        self.layers = nn.ModuleList(norm(nn.Conv1d(width, 2 * width, 2, dilation=2**n)) for n in range(3))
        self.mix = nn.ModuleList(norm(nn.Conv1d(width, width, 1)) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x, skip = self.embed(ids).transpose(1, 2), 0
        for layer, mix in zip(self.layers, self.mix, strict=True):
            a, b = layer(F.pad(x, (layer.dilation[0], 0))).chunk(2, 1)
            h = mix(torch.tanh(a) * torch.sigmoid(b))
            x, skip = x + h, skip + h
        return self.out(F.relu(skip)).transpose(1, 2)


def wavenet() -> Target:
    torch.manual_seed(0)
    return language(WaveNet())


def wavenet_old_norm() -> Target:
    """The same under the older ``torch.nn.utils.weight_norm``, which is a hook."""
    torch.manual_seed(0)
    return language(WaveNet(old=True))


class Translator(nn.Module):
    """nn.Transformer with masks for padding and for what comes later."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.transformer = nn.Transformer(width, 4, 2, 2, 64, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        later = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.out.weight.dtype)
        pad = source == 0
        scale = math.sqrt(self.embed.embedding_dim)
        return self.out(self.transformer(self.embed(source) * scale, self.embed(target) * scale, tgt_mask=later, src_key_padding_mask=pad, memory_key_padding_mask=pad, tgt_is_causal=True))


def translator() -> Target:
    torch.manual_seed(0)
    batch = {"source": words()["ids"], "target": torch.randint(1, WORDS, (ROWS, 9))}

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(m(b["source"], b["target"][:, :-1]).flatten(0, 1), b["target"][:, 1:].flatten(), label_smoothing=0.1)

    return Translator().train(), batch, {"loss_fn": loss}


class LinearAttention(nn.Module):
    """Causal attention with a positive feature map instead of a softmax (Katharopoulos et al., 2020)."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed, self.qkv = heads, nn.Embedding(WORDS, width), nn.Linear(width, 3 * width)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in self.qkv(self.norm(x)).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bthd,bthe->bthde", k, v).cumsum(1)
        y = torch.einsum("bthd,bthde->bthe", q, kv) / torch.einsum("bthd,bthd->bth", q, k.cumsum(1))[..., None]
        return self.out(x + y.flatten(2))


def linear_attention() -> Target:
    torch.manual_seed(0)
    return language(LinearAttention())


class RetNet(nn.Module):
    """Retention: attention with powers of a decay for each head instead of a softmax, then group norm and a gate (Sun et al., 2023)."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed, self.qkvg = heads, nn.Embedding(WORDS, width), nn.Linear(width, 4 * width, bias=False)
        self.norm, self.group, self.mix, self.out = nn.LayerNorm(width), nn.GroupNorm(heads, width), nn.Linear(width, width), nn.Linear(width, WORDS)
        self.register_buffer("decay", 1 - 2.0 ** (-5 - torch.arange(heads)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, width = x.shape
        q, k, v, g = self.qkvg(self.norm(x)).chunk(4, -1)
        q, k, v = (each.view(b, t, self.heads, -1).transpose(1, 2) for each in (q, k, v))
        apart = torch.arange(t)[:, None] - torch.arange(t)
        kept = torch.where(apart >= 0, self.decay[:, None, None] ** apart.clamp(min=0), 0.0)
        y = ((q @ k.transpose(-1, -2)) * kept @ v).transpose(1, 2).reshape(b * t, width)
        return self.out(x + self.mix(self.group(y).view(b, t, width) * F.silu(g)))


def retnet() -> Target:
    torch.manual_seed(0)
    return language(RetNet())


class CRF(nn.Module):
    """A linear chain: the sum over all paths in logarithms, minus the true path's score."""

    def __init__(self, tags: int = 5, width: int = 16) -> None:
        super().__init__()
        self.embed, self.emit, self.step = nn.Embedding(WORDS, width), nn.Linear(width, tags), nn.Parameter(torch.randn(tags, tags) * 0.1)

    def forward(self, ids: Tensor, tags: Tensor) -> Tensor:
        emit = self.emit(torch.tanh(self.embed(ids)))
        total = emit[:, 0]
        for t in range(1, ids.shape[1]):
            total = torch.logsumexp(total[:, :, None] + self.step + emit[:, t, None], dim=1)
        true = emit.gather(2, tags[..., None])[..., 0].sum(1) + self.step[tags[:, :-1], tags[:, 1:]].sum(1)
        return (torch.logsumexp(total, 1) - true).mean()


def crf_tagger() -> Target:
    torch.manual_seed(0)
    batch = {"ids": torch.randint(0, WORDS, (ROWS, 6)), "tags": torch.randint(0, 5, (ROWS, 6))}
    return CRF().train(), batch, {"loss_fn": lambda m, b: m(b["ids"], b["tags"])}


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).permute(2, 0, 1).log_softmax(-1)


def ctc_speech() -> Target:
    torch.manual_seed(0)
    batch = {"x": torch.randn(ROWS, 8, 16), "labels": torch.randint(1, 6, (ROWS, 4)), "lengths": torch.tensor([4, 3, 2, 4, 4, 3, 4, 2])}

    def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return F.ctc_loss(m(b["x"]), b["labels"], torch.full((len(b["x"]),), 16), b["lengths"])

    return Speech().train(), batch, {"loss_fn": loss}


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, width: int = 32) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed, self.out = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 64, activation="gelu", batch_first=True, norm_first=True) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


def checkpointed() -> Target:
    torch.manual_seed(0)
    return language(Checkpointed(reentrant=False))


def checkpointed_reentrant() -> Target:
    torch.manual_seed(0)
    return language(Checkpointed(reentrant=True))


class DilatedTCN(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4 if n == 0 else width, width, 3, dilation=2**n, padding=2 * 2**n) for n in range(3))
        self.norms, self.out = nn.ModuleList(nn.InstanceNorm1d(width, affine=True) for _ in range(3)), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = F.dropout(F.leaky_relu(norm(layer(x)[..., :n])), 0.1, self.training)
            x = h if h.shape != x.shape else x + h
        return self.out(x[..., -1])


def tcn_quantiles() -> Target:
    torch.manual_seed(0)

    def pinball(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        off = b["y"][:, None] - m(b["x"])
        q = torch.tensor([0.1, 0.9], dtype=off.dtype)
        return torch.maximum(q * off, (q - 1) * off).mean()

    return DilatedTCN().train(), {"x": torch.randn(ROWS, 4, 20), "y": torch.randn(ROWS)}, {"loss_fn": pinball}
