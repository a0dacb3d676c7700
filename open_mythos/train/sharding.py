"""A model distributed over the processes of a run: the shard of each parameter that is where, and its initial values.

A model that no host has room for is built without memory, sharded, and filled shard by shard; the values are those that
one process would have drawn.
"""

import math
from collections.abc import Callable
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
from open_mythos.train.tensor_shards import TensorShard

DRAWN_AT_ONCE = 2**22
"""Values of a parameter that exist beyond this process's shard while it is drawn."""


class ShardedModel:
    """A model for one process of a run.

    `model` is the module with this process's parameters, `forward` is what a training step calls.
    """

    def __init__(self, cfg: TrainConfig, world: World, device: torch.device) -> None:
        self.world, self.sharded = world, cfg.parallel.kind == "fsdp"
        self.experts: list[nn.Parameter] = []
        """Parameters of which each process of an expert group has some experts; none if experts are not distributed."""
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
            self._shard(cfg, device)
        else:
            self.model = OpenMythos(cfg.model).to(device, dtype)
        if self.model.recurrent is not None:
            self.model.recurrent.checkpoint_loops = cfg.checkpoint_loops
        self._copies = [(p, self.shard(p).n_copies) for p in self.model.parameters()]
        self.forward: Callable[..., Any] = self.model
        if cfg.compile != "none":
            self.forward = compile_model(self.model, cfg.compile)
        if world.size > 1 and not self.sharded:
            assert isinstance(self.forward, nn.Module)
            self.forward = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)

    def _shard(self, cfg: TrainConfig, device: torch.device) -> None:
        model, n_expert_ranks = self.model, cfg.parallel.experts
        self.mesh = init_device_mesh(
            device.type, (self.n_replicas, n_expert_ranks), mesh_dim_names=("replica", "expert")
        )
        blocks = [] if model.recurrent is None or n_expert_ranks == 1 else model.recurrent.blocks
        distributed = [block.ffn.experts for block in blocks if isinstance(block.ffn, MoEFFN)]
        for experts in distributed:
            experts.spread_over(self.mesh["expert"].get_group())
        mesh = init_device_mesh(device.type, (self.world.size,))
        ignored = {p for experts in distributed for p in experts.parameters()}
        # One unit for the whole loop: it is gathered once per pass, and ranks may differ in their loops.
        units = [*model.prelude, *([] if model.recurrent is None else [model.recurrent]), *model.coda, model]
        for unit in units:
            fully_shard(unit, mesh=mesh, ignored_params=ignored)
        model.to_empty(device=device)
        model.tie_head()
        # Memory makes other parameters of those that had none.
        self.experts = [p for experts in distributed for p in experts.parameters()]
        with ShardedInit(self):
            init_weights(model, cfg.model)

    def shard(self, p: Tensor) -> TensorShard:
        """Return this process's shard of parameter `p`."""
        if isinstance(p, DTensor):
            each = math.ceil(p.shape[0] / self.world.size)
            return TensorShard(p.to_local(), min(self.world.rank * each, p.shape[0]), p.shape[0])
        if any(p is one for one in self.experts):
            place = self.mesh["expert"].get_local_rank()
            return TensorShard(p, place * p.shape[0], p.shape[0] * self.mesh["expert"].size(), self.n_replicas)
        return TensorShard(p, 0, p.shape[0], self.world.size)

    def accumulate(self, last: bool) -> Any:
        """Return a context for a backward pass; gradients are summed over the processes after the last one only."""
        ddp = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if ddp and not last else nullcontext()

    def reduce_experts(self) -> None:
        """Scale the gradients of distributed experts, which saw the tokens of every process, like the others'."""
        for p in self.experts:
            if p.grad is not None:
                if self.n_replicas > 1:
                    dist.all_reduce(p.grad, group=self.mesh["replica"].get_group())
                p.grad /= self.world.size

    def gradients(self) -> list[tuple[Tensor, int]]:
        """Return this process's shard of every gradient, and the number of processes that have the same."""
        found = [(p.grad, copies) for p, copies in self._copies if p.grad is not None]
        return [(g.to_local() if isinstance(g, DTensor) else g, copies) for g, copies in found]

    def shards(self) -> dict[str, TensorShard]:
        """Return this process's shards of the model's parameters and buffers, by name, a tied head's apart."""
        # state_dict first: it lets fully_shard put back what a forward pass has gathered, whose memory is then gone.
        state = self.model.state_dict()
        state |= dict(self.model.named_parameters(remove_duplicate=False))
        return {
            name: self.shard(x)
            for name, x in state.items()
            if name != "head.weight" or not self.model.cfg.tie_embeddings
        }

    def named_shards(self) -> dict[Tensor, tuple[str, TensorShard]]:
        """Return the name and the shard of each parameter."""
        return {p: (name, self.shard(p)) for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def load(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Fill this process's shards; `read(name, start, n)` returns n rows of a whole model's tensor."""
        for name, shard in self.shards().items():
            shard.local.copy_(read(name, shard.start, len(shard.local)))

    def full_state(self) -> dict[str, Tensor]:
        """Return the whole model's tensors on the CPU, on the first process; an empty dictionary on the others.

        Shards travel from the memory of one host to that of the first, which alone has to have room for the whole.
        """
        whole: dict[str, Tensor] = {}
        for name, shard in self.shards().items():
            local = shard.local.detach().cpu().contiguous()
            n, missing = len(local), shard.n_rows - len(local)
            if self.world.is_first:
                rows = local if not missing else torch.cat((local, local.new_empty(missing, *local.shape[1:])))
                # All processes but the last with any have as many rows as the first.
                for rank, start in enumerate(range(n, shard.n_rows, n), 1):
                    dist.recv(rows[start : start + n], rank)
                whole[name] = rows
            elif n and self.world.rank < self.world.size // shard.n_copies:
                dist.send(local, 0)
        return whole


class ShardedInit(TorchFunctionMode):
    """A mode in which initialisation gives this process its shards of the values that one process would have drawn."""

    def __init__(self, model: ShardedModel) -> None:
        super().__init__()
        self.model = model

    def __torch_function__(
        self, func: Callable, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            p, std = args[0] if args else kwargs["tensor"], kwargs["std"]
            return _draw(p, self.model.shard(p), std)
        if func is nn.init.constant_:
            # Rounded as a float32 model's would be, of which one process makes its float64 model.
            p, value = args if len(args) == 2 else (kwargs["tensor"], kwargs["val"])
            return func(p, torch.tensor(value).item())
        if func is Tensor.fill_diagonal_ and isinstance(args[0], DTensor):
            shard = self.model.shard(args[0])
            shard.local.diagonal(shard.start).fill_(args[1])
            return args[0]
        return func(*args, **kwargs)


@torch.no_grad()
def _draw(p: Tensor, shard: TensorShard, std: float) -> Tensor:
    per_row = math.prod(shard.local.shape[1:])
    total, begin = shard.n_rows * per_row, shard.start * per_row
    local = shard.local.view(-1)
    # On the CPU, as one process does. torch draws in blocks of 16 there, so that draws of whole blocks give the
    # values of one draw of everything.
    stops = [*range(DRAWN_AT_ONCE, total - 15, DRAWN_AT_ONCE), total]
    for start, stop in zip([0, *stops], stops, strict=False):
        values = torch.empty(stop - start).normal_(0, std)
        first, last = max(start, begin), min(stop, begin + len(local))
        if first < last:
            local[first - begin : last - begin].copy_(values[first - start : last - start])
    return p
