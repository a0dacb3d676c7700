"""A model spread over the processes of a run: which part of each parameter is where, and how it is made there.

A model that no host has room for is built without memory, cut, and filled piece by piece; the values are those that one
process would have drawn.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from open_mythos.compile import compile_model
from open_mythos.model import OpenMythos
from open_mythos.nn.init import init_weights
from open_mythos.nn.moe import MoEFFN
from open_mythos.train.config import TrainConfig
from open_mythos.train.distributed import World
from open_mythos.train.tensor_shards import Piece, Stored

DRAWN_AT_ONCE = 2**22
"""Values of a parameter that exist in full, beyond the piece that is kept, while it is drawn."""


class Spread:
    """A model for one process of a run.

    `model` is the module with this process's parameters, `forward` is what a training step calls.
    """

    def __init__(self, cfg: TrainConfig, world: World, device: torch.device) -> None:
        self.world, self.sharded = world, cfg.parallel.kind == "fsdp"
        self.experts: list[nn.Parameter] = []
        """The parameters of which each process of an expert group holds some experts; none if they are not spread."""
        self.n_replicas = world.size // cfg.parallel.experts
        dtype = torch.float64 if cfg.dtype == "float64" else torch.float32
        torch.manual_seed(cfg.seed)
        if self.sharded:
            if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
                raise ValueError(
                    f"parallel.kind='fsdp' needs torch 2.13, not {torch.__version__}: older ones do not look for "
                    "gradients inside of the model's outputs; install it, or use parallel.kind='ddp'"
                )
            with torch.device("meta"):
                self.model = OpenMythos(cfg.model)
            self.model.to(dtype)
            self._cut(cfg, device)
        else:
            self.model = OpenMythos(cfg.model).to(device, dtype)
        if self.model.recurrent is not None:
            self.model.recurrent.checkpoint_loops = cfg.checkpoint_loops
        self._copies = [(p, self.piece(p).copies) for p in self.model.parameters()]
        self.forward: Callable[..., Any] = self.model
        if cfg.compile != "none":
            self.forward = compile_model(self.model, cfg.compile)
        if world.size > 1 and not self.sharded:
            assert isinstance(self.forward, nn.Module)
            self.forward = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)

    def _cut(self, cfg: TrainConfig, device: torch.device) -> None:
        model, n_expert_ranks = self.model, cfg.parallel.experts
        self.mesh = init_device_mesh(
            device.type, (self.n_replicas, n_expert_ranks), mesh_dim_names=("replica", "expert")
        )
        if n_expert_ranks > 1:
            for ffn in self._mixtures():
                ffn.experts.spread_over(self.mesh["expert"].get_group())
        mesh = init_device_mesh(device.type, (self.world.size,))
        experts = {p for ffn in self._mixtures() if n_expert_ranks > 1 for p in ffn.experts.parameters()}
        # One unit for the whole loop: it is gathered once per pass, and ranks may differ in their loops.
        units = [*model.prelude, *([] if model.recurrent is None else [model.recurrent]), *model.coda, model]
        for unit in units:
            fully_shard(unit, mesh=mesh, ignored_params=experts)
        model.to_empty(device=device)
        model.head.weight = model.embed.weight
        # Memory makes other parameters of those that had none.
        self.experts = [p for ffn in self._mixtures() if n_expert_ranks > 1 for p in ffn.experts.parameters()]
        with DrawnInPieces(self):
            init_weights(model, cfg.model)

    def _mixtures(self) -> list[MoEFFN]:
        blocks = [] if self.model.recurrent is None else self.model.recurrent.blocks
        return [block.ffn for block in blocks if isinstance(block.ffn, MoEFFN)]

    def piece(self, p: Tensor) -> Piece:
        """What this process holds of parameter `p`."""
        if isinstance(p, DTensor):
            each = math.ceil(p.shape[0] / self.world.size)
            return Piece(p.to_local(), min(self.world.rank * each, p.shape[0]), p.shape[0])
        if any(p is one for one in self.experts):
            place = self.mesh["expert"].get_local_rank()
            return Piece(p, place * p.shape[0], p.shape[0] * self.mesh["expert"].size(), self.n_replicas)
        return Piece(p, 0, p.shape[0], self.world.size)

    def accumulate(self, last: bool) -> Any:
        """A context for a backward pass, after which gradients are summed over the processes only if it is the last."""
        ddp = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if ddp and not last else nullcontext()

    def reduce_experts(self) -> None:
        """Give the gradients of spread experts, which got what every process sent them, the scale of the others'."""
        for p in self.experts:
            if p.grad is not None:
                if self.n_replicas > 1:
                    dist.all_reduce(p.grad, group=self.mesh["replica"].get_group())
                p.grad /= self.world.size

    def gradients(self) -> list[tuple[Tensor, int]]:
        """This process's part of every gradient, and how many processes hold the same part."""
        found = [(p.grad, copies) for p, copies in self._copies if p.grad is not None]
        return [(g.to_local() if isinstance(g, DTensor) else g, copies) for g, copies in found]

    def pieces(self) -> dict[str, Piece]:
        """What this process holds of the model's state, by name. The head is the embedding."""
        return {name: self.piece(x) for name, x in self._own_state().items() if name != "head.weight"}

    def _own_state(self) -> dict[str, Tensor]:
        """This process's parameters and buffers by name."""
        # state_dict first: it makes fully_shard put back what a forward pass has gathered, whose memory is then gone.
        state = self.model.state_dict()
        return {**state, **dict(self.model.named_parameters(remove_duplicate=False))}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Take this process's pieces of a whole model's tensors, or of what gives their rows like a tensor."""
        for name, piece in self.pieces().items():
            piece.local.copy_(state[name][piece.start : piece.start + len(piece.local)])

    @torch.no_grad()
    def restore(self, stored: Stored) -> None:
        """Take this process's pieces of what any number of processes have stored of a model."""
        for name, piece in self.pieces().items():
            piece.local.copy_(stored.read("model", name, piece.start, len(piece.local)))

    def full_state(self) -> dict[str, Tensor]:
        """The whole model's tensors on the CPU, on the first process; an empty dictionary on the others.

        Pieces travel from the memory of one host to that of the first, which alone has to have room for the whole.
        """
        whole: dict[str, Tensor] = {}
        for name, piece in self.pieces().items():
            local = piece.local.detach().cpu().contiguous()
            n = len(local)
            if self.world.is_first:
                rows = (
                    local if n == piece.rows else torch.cat((local, local.new_empty(piece.rows - n, *local.shape[1:])))
                )
                # All processes but the last with any have as many rows as the first.
                for rank, start in enumerate(range(n, piece.rows, n), 1):
                    dist.recv(rows[start : start + n], rank)
                whole[name] = rows
            elif n and self.world.rank < self.world.size // piece.copies:
                dist.send(local, 0)
        return whole


class DrawnInPieces(TorchFunctionMode):
    """Within it initialisation gives this process its pieces of what one process alone would have drawn."""

    def __init__(self, spread: Spread) -> None:
        super().__init__()
        self.spread = spread

    def __torch_function__(
        self, func: Callable, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            p, std = args[0] if args else kwargs["tensor"], kwargs["std"]
            return _draw(p, self.spread.piece(p), std)
        if func is nn.init.constant_:
            # Rounded as a float32 model's would be, of which one process makes its float64 model.
            p, value = args if len(args) == 2 else (kwargs["tensor"], kwargs["val"])
            return func(p, torch.tensor(value).item())
        if func is Tensor.fill_diagonal_ and isinstance(args[0], DTensor):
            piece = self.spread.piece(args[0])
            piece.local.diagonal(piece.start).fill_(args[1])
            return args[0]
        return func(*args, **kwargs)


@torch.no_grad()
def _draw(p: Tensor, piece: Piece, std: float) -> Tensor:
    per_row = math.prod(piece.local.shape[1:])
    total, begin = piece.rows * per_row, piece.start * per_row
    local = piece.local.view(-1)
    # On the CPU, as one process does. torch draws in blocks of 16 there, so that pieces of whole blocks are what one
    # draw of everything would give.
    stops = [*range(DRAWN_AT_ONCE, total - 15, DRAWN_AT_ONCE), total]
    for start, stop in zip([0, *stops], stops, strict=False):
        values = torch.empty(stop - start).normal_(0, std)
        first, last = max(start, begin), min(stop, begin + len(local))
        if first < last:
            local[first - begin : last - begin].copy_(values[first - start : last - start])
    return p
