"""The model's definition written a second time: one row, one token after the other, plain products, no batch, no cache.

It reads a model's own float64 parameters, so gradients can be compared too. It follows DESIGN.md 2: a token that exits
at loop s is frozen, and its keys and values of loop s stand for every deeper loop.
"""

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6).sqrt()


def rope(x: Tensor, position: int, theta: float) -> Tensor:
    """Complex rotation of the pairs (2i, 2i + 1) of x (..., K)."""
    K = x.shape[-1]
    turn = torch.tensor([complex(0, position * theta ** (-2 * i / K)) for i in range(K // 2)], dtype=torch.complex128)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.exp()).flatten(-2)


def softmax_average(scores: Tensor, values: Tensor) -> Tensor:
    """scores (S, H), values (S, H, W) -> (H, W)."""
    weights = (scores - scores.max(0).values.detach()).exp()
    return (weights[..., None] * values).sum(0) / weights.sum(0)[..., None]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = gate @ x
    return down @ (g / (1 + (-g).exp()) * (up @ x))


def moe(w: dict[str, Tensor], x: Tensor, n_chosen: int) -> tuple[Tensor, Tensor, list[int], float]:
    """One token through the experts: output, router logits, the chosen experts, and by how much the last was chosen."""
    logits = w["router.weight"] @ x
    biased = (logits + w["router_bias"]).tolist()
    ranked = sorted(range(len(biased)), key=lambda i: -biased[i])
    chosen = ranked[:n_chosen]
    total = sum(logits[i].exp() for i in chosen)
    out = torch.zeros_like(x)
    for i in chosen:
        gate, up = w["experts.gate_up"][i].chunk(2)
        out = out + logits[i].exp() / total * swiglu(x, gate, up, w["experts.down"][i])
    if "shared.down.weight" in w:
        out = out + swiglu(x, *w["shared.gate_up.weight"].chunk(2), w["shared.down.weight"])
    gap = biased[chosen[-1]] - biased[ranked[n_chosen]] if n_chosen < len(ranked) else math.inf
    return out, logits, chosen, gap


@dataclass
class Token:
    """What the reference knows of one token."""

    logits: Tensor
    hidden: list[Tensor]
    weights: list[Tensor]
    loops: int


@dataclass
class Oracle:
    """Push a row's tokens in order. `margin` is the nearest that any decision so far came to going the other way."""

    model: OpenMythos
    n_loops: int
    exit: str | None = None
    threshold: float | None = None
    detach_at: int | None = None
    """Loops whose result is cut from the graph, as truncated back-propagation does."""
    noise: Tensor | None = None
    """h_0 of each token, (T, D), for initial_state="normal"."""
    margin: float = math.inf
    loads: list[list[int]] = field(default_factory=list)
    router_z: list[Tensor] = field(default_factory=list)
    n_seen: int = 0

    def __post_init__(self) -> None:
        self.cfg: MythosConfig = self.model.cfg
        self.w = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.past: dict[str, list[list[tuple[Tensor, Tensor]]]] = {}
        self.now: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def run(self, ids: list[int]) -> list[Token]:
        return [self.push(i) for i in ids]

    def push(self, token: int) -> Token:
        self.now = {}
        e = self.w["embed.weight"][token]
        for i in range(self.cfg.prelude_layers):
            e = self.block(e, f"prelude.{i}", 0)
        if self.cfg.prelude_norm:
            e = rms_norm(e, self.w["prelude_norm.weight"])
        hidden, weights = self.loop(e) if self.cfg.recurrent_layers else ([e], [torch.ones(())])
        weighted = self.exit == "act" or (self.exit is None and self.cfg.halting == "act" and self.cfg.recurrent_layers)
        out = sum(p * h for p, h in zip(weights, hidden, strict=True)) if weighted else hidden[-1]
        for i in range(self.cfg.coda_layers):
            out = self.block(out, f"coda.{i}", 0)
        for name, levels in self.now.items():
            self.past.setdefault(name, []).append(levels)
        self.n_seen += 1
        return Token(self.read(out), hidden, weights, len(hidden) if self.cfg.recurrent_layers else 0)

    def read(self, h: Tensor) -> Tensor:
        return self.w["embed.weight"] @ rms_norm(h, self.w["norm.weight"])

    def loop(self, e: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        h = {"e": e, "zero": torch.zeros_like(e)}.get(self.cfg.initial_state)
        states = [self.noise[self.n_seen] if h is None else h]
        weights: list[Tensor] = []
        for t in range(self.n_loops):
            h = states[-1].detach() if t == self.detach_at else states[-1]
            states.append(self.one_loop(h, e, t))
            done, weight = self.halts(states, sum(weights, torch.zeros((), dtype=e.dtype)))
            weights.append(weight)
            if done:
                break
        return states[1:], weights

    def one_loop(self, h: Tensor, e: Tensor, t: int) -> Tensor:
        cfg, w, p = self.cfg, self.w, "recurrent.injection."
        row = min(t, cfg.max_loop_iters - 1)
        u = h
        if cfg.loop_embedding:
            width = cfg.dim // 8
            angles = [row * 10000 ** (-2 * i / width) for i in range((width + 1) // 2)]
            waves = ([math.sin(a) for a in angles] + [math.cos(a) for a in angles])[:width]
            u = u + torch.tensor(waves + [0.0] * (cfg.dim - width), dtype=h.dtype)
        if cfg.injection == "lti":
            u = rms_norm(u + e, w["recurrent.norm.weight"])
        elif cfg.injection == "diagonal":
            dt = (1 + w[p + "dt_bias"].exp()).log()
            u = (-dt * w[p + "A_log"].exp()).exp() * u + dt * (w[p + "B"] @ e)
        elif cfg.injection == "concat":
            u = w[p + "adapter.weight"] @ torch.cat((u, e))
        else:
            u = u + e
        for i in range(cfg.recurrent_layers):
            u = self.block(u, "recurrent.block" + (f".{i}" if cfg.recurrent_layers > 1 else ""), t)
        if cfg.lora_rank:
            low = (w["recurrent.lora.down.weight"] @ u) * w["recurrent.lora.scale.weight"][row]
            u = u + low @ w["recurrent.lora.B"]
        if cfg.injection == "lti":
            return (-(w[p + "log_A"] + w[p + "log_dt"]).exp()).exp() * h + w[p + "B"] * e + u
        return rms_norm(u, w[p + "norm.weight"]) if cfg.injection == "concat" else u

    def halts(self, states: list[Tensor], total: Tensor) -> tuple[bool, Tensor]:
        """Whether the token exits after the loop that made states[-1], and that state's weight."""
        rule = self.exit or {"act": "act", "none": "fixed"}[self.cfg.halting]
        n_done, one = len(states) - 1, torch.ones((), dtype=states[0].dtype)
        may, must = n_done >= self.cfg.min_loops, n_done >= self.n_loops
        if rule == "act":
            w, b = self.w["recurrent.act.halt.weight"][0], self.w["recurrent.act.halt.bias"][0]
            p = 1 / (1 + (-(w @ states[-1] + b)).exp())
            threshold = self.cfg.act_threshold if self.threshold is None else self.threshold
            done = self.decide(total + p, threshold, may, must, above=True)
            return done, one - total if done else torch.minimum(p, one - total)
        if rule == "fixed":
            return must, one
        if rule == "kl":
            done = n_done > 1
            if done:
                now, before = (self.read(h).log_softmax(0) for h in states[:-3:-1])
                done = self.decide((now.exp() * (now - before)).sum(), self.threshold, may, must)
            return done or must, one
        steps = [b - a for a, b in itertools.pairwise(states)]
        if rule == "latent_diff":
            return self.decide(steps[-1].norm() / states[-1].norm(), self.threshold, may, must), one
        done = len(steps) > 2
        for k in (1, 2) if done else ():
            change = (steps[-k] - steps[-k - 1]).norm() / states[-k].norm()
            done = self.decide(change, self.threshold, may, False) and done
        return done or must, one

    def decide(self, value: Tensor, threshold: float | None, may: bool, must: bool, above: bool = False) -> bool:
        if must or not may:
            return must
        self.margin = min(self.margin, abs(value.item() - threshold))
        return value.item() >= threshold if above else value.item() < threshold

    def block(self, x: Tensor, name: str, level: int) -> Tensor:
        """One block at one loop; norms that a configuration leaves out are absent from `w`."""
        w = {key.removeprefix(name + "."): x for key, x in self.w.items() if key.startswith(name + ".")}

        def norm(x: Tensor, which: str) -> Tensor:
            return rms_norm(x, w[which]) if which in w else x

        attend = self.gqa if self.cfg.attn_type == "gqa" else self.mla
        x = norm(x + attend(w, rms_norm(x, w["attn_norm.weight"]), name, level), "attn_out_norm.weight")
        u = rms_norm(x, w["ffn_norm.weight"])
        ffn = {key.removeprefix("ffn."): x for key, x in w.items() if key.startswith("ffn.")}
        if "router.weight" in ffn:
            y, logits, chosen, gap = moe(ffn, u, self.cfg.n_experts_per_tok)
            self.margin = min(self.margin, gap)
            self.loads.append(chosen)
            self.router_z.append(logits.exp().sum().log() ** 2)
        else:
            y = swiglu(u, *ffn["gate_up.weight"].chunk(2), ffn["down.weight"])
        return norm(x + y, "ffn_out_norm.weight")

    def remember(self, name: str, level: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep this token's pair for this loop; stack what every token so far shows to this loop."""
        levels = self.now.setdefault(name, [])
        assert len(levels) == level
        levels.append(new)
        shown = [earlier[min(level, len(earlier) - 1)] for earlier in self.past.get(name, [])] + [new]
        return torch.stack([a for a, _ in shown]), torch.stack([b for _, b in shown])

    def gqa(self, w: dict[str, Tensor], x: Tensor, name: str, level: int) -> Tensor:
        cfg = self.cfg
        heads = (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)
        q, k, v = (w["attn.wqkv.weight"] @ x).view(-1, cfg.head_dim).split(heads)
        if cfg.qk_norm:
            q, k = rms_norm(q, w["attn.q_norm.weight"]), rms_norm(k, w["attn.k_norm.weight"])
        q, k = (rope(part, self.n_seen, cfg.rope_theta) for part in (q, k))
        K, V = self.remember(name, level, (k, v))
        own = [head * cfg.n_kv_heads // cfg.n_heads for head in range(cfg.n_heads)]
        scores = (q * K[:, own]).sum(-1) / math.sqrt(cfg.head_dim)
        return w["attn.wo.weight"] @ softmax_average(scores, V[:, own]).flatten()

    def mla(self, w: dict[str, Tensor], x: Tensor, name: str, level: int) -> Tensor:
        cfg, N = self.cfg, self.cfg.qk_nope_head_dim
        low, kv, shared_key = (w["attn.down.weight"] @ x).split(
            (cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim)
        )
        q = (w["attn.q_up.weight"] @ rms_norm(low, w["attn.q_norm.weight"])).view(cfg.n_heads, -1)
        latent = rms_norm(kv, w["attn.kv_norm.weight"])
        L, P = self.remember(name, level, (latent, rope(shared_key, self.n_seen, cfg.rope_theta)))
        up = (L @ w["attn.kv_up.weight"].T).view(len(L), cfg.n_heads, -1)
        rotated = rope(q[:, N:], self.n_seen, cfg.rope_theta)
        scores = (q[:, :N] * up[..., :N]).sum(-1) + (rotated * P[:, None]).sum(-1)
        scores = scores / math.sqrt(N + cfg.qk_rope_head_dim)
        return w["attn.wo.weight"] @ softmax_average(scores, up[..., N:]).flatten()
