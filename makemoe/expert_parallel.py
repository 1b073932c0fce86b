"""Every process holds some of the experts; tokens travel to them and back, and the numbers are those of one process."""
import copy
import os
import re
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial, wraps
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from makemoe import shakespeare
from makemoe.checkpoints import load_training
from makemoe.gating import Routing
from makemoe.sparse_moe import SparseMoE
from makemoe.training import train


def traffic(kept, processes):
    """Rows that process i sends to process j: (W, W) integers for `kept` (B, T, E) and W `processes`.

    The batch and the experts are cut into W equal parts each, in order. A row is a token for one of its experts.
    Row i is the sender, column j the receiver; what stays at home is on the diagonal.
    """
    B, T, E = kept.shape
    parts = kept.view(processes, -1, processes, E // processes)  # (W, tokens, W, experts)
    return parts.sum(dim=(1, 3))


class AllToAll(torch.autograd.Function):
    """Rows (P, ...) change their process: `AllToAll.apply(rows, sends, receives, group)`.

    The first sends[0] rows go to process 0, the next sends[1] to process 1, and so on. Of those that arrive, the
    first receives[0] are from process 0, and so on. In the backward pass the gradients take the way back.
    """

    @staticmethod
    def forward(ctx, rows, sends, receives, group=None):
        ctx.way_back = receives, sends, group
        arrived = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), receives, sends, group=group)
        return arrived

    @staticmethod
    def backward(ctx, gradient):
        return AllToAll.apply(gradient, *ctx.way_back), None, None, None


class ExpertParallelExperts(nn.Module):
    """`Experts` or `GroupedExperts` of which each of W processes of `group` keeps E / W: same use, same numbers.

    x (..., n_embd) and its `Routing` over all E experts -> y like x. All processes must call it together, and each
    may have other tokens, more, fewer or none. `experts` must be the same everywhere; it is cut in place to
    this process's own ones, and so is their `memory`, the state of an optimizer. Raises ValueError if W does not
    divide E, or if the routing is of another shape.
    """

    def __init__(self, experts, group=None, memory=None):
        super().__init__()
        loop, W, self.group = isinstance(experts, nn.ModuleList), dist.get_world_size(group), group
        self.num_experts = E = len(experts) if loop else len(experts.down)
        if E % W:
            raise ValueError(f"{E} experts cannot be shared out equally among {W} processes")
        self.first = E // W * dist.get_rank(group)
        own = slice(self.first, self.first + E // W)
        if loop:
            del experts[own.stop:], experts[:own.start]
        else:
            experts.top_k = 1  # a row that arrives is for one expert
            for weight in experts.parameters():
                held = (memory or {}).get(weight, {})
                held.update({name: m[own].clone() for name, m in held.items() if m.shape == weight.shape})
                weight.data = weight.data[own].clone()
        self.local = experts

    def forward(self, x, routing):
        E, W = self.num_experts, dist.get_world_size(self.group)
        given, needed = tuple(routing.gates.shape), (*x.shape[:-1], E)
        if given != needed:
            raise ValueError(f"the routing is of shape {given}, these tokens and experts need {needed}")
        tokens, kept, gates = x.reshape(-1, x.shape[-1]), routing.kept.reshape(-1, E), routing.gates.reshape(-1, E)
        e, rows = kept.T.nonzero(as_tuple=True)  # (P,): sorted by expert, and so by process
        counts = kept.sum(dim=0).view(W, E // W)  # my rows for each expert of each process
        theirs = torch.empty_like(counts)  # the rows of each process for each of my experts
        dist.all_to_all_single(theirs, counts, group=self.group)
        sends, receives = counts.sum(dim=1).tolist(), theirs.sum(dim=1).tolist()
        arrived = AllToAll.apply(tokens.index_select(0, rows), sends, receives, self.group)  # (R, C)
        mine = torch.arange(E // W, device=x.device).repeat(W).repeat_interleave(theirs.flatten())  # (R,)
        kept = nn.functional.one_hot(mine, E // W).bool()  # (R, E / W)
        answers = self.local(arrived, Routing(kept.to(gates.dtype), kept.float(), chosen=kept, kept=kept))
        answers = AllToAll.apply(answers, receives, sends, self.group)  # (P, C)
        weighed = gates[rows, e, None] * answers
        return torch.zeros_like(tokens).index_add(0, rows, weighed.to(x.dtype)).view_as(x)


@dataclass(frozen=True)
class SharedRouting(Routing):
    "The `Routing` of the tokens of this process; `load` and `dropped` are of the tokens of all processes."

    counts: torch.Tensor  # (2, E) integers: the tokens of all processes that chose an expert, that it keeps

    @property
    def load(self):
        return self.counts[1]

    @property
    def dropped(self):
        chosen, kept = self.counts.sum(dim=1)
        return (chosen - kept) / chosen.clamp(min=1)


class Processes:
    "What processes that train one model do together: see `parallelize`."

    def __init__(self, model):
        self.rank, self.size, self.batch = dist.get_rank(), dist.get_world_size(), 0
        shared_out = [module for module in model.modules() if isinstance(module, ExpertParallelExperts)]
        self.experts = {weight for module in shared_out for weight in module.parameters()}

    def total(self, part):
        "The sum of `part` over all processes; its gradient is that of the own part."
        whole = part.detach().clone()
        dist.all_reduce(whole)
        return whole + (part - part.detach())

    def take_rows(self, model, arguments):
        "Before a forward pass: of the batch, which all processes have, each takes its own rows."
        self.batch = len(arguments[0])
        return tuple(tensor.tensor_split(self.size)[self.rank] for tensor in arguments)

    def share(self, model, arguments, output):
        "After a forward pass: loads and losses of the whole batch; the logits stay those of the own rows."
        counts = torch.stack([torch.stack([routing.chosen.flatten(0, -2).sum(dim=0), routing.load])
                              for routing in output.routings])  # (L, 2, E)
        dist.all_reduce(counts)
        routings = tuple(SharedRouting(**vars(routing), counts=both) for routing, both in zip(output.routings, counts))
        if output.loss is None:
            return replace(output, routings=routings)
        own, T = output.logits.shape[:2]
        f = [both[None, 0] / (self.batch * T) for both in counts]  # (1, E): a mean over the tokens leaves it as it is
        aux_loss = model.auxiliary_loss([replace(routing, chosen=shares) for routing, shares in zip(output.routings, f)])
        lm_loss, aux_loss = (self.total(loss * own / self.batch if own else output.logits.sum())
                             for loss in (output.lm_loss, aux_loss))  # each process has its part of a mean
        return replace(output, loss=lm_loss + aux_loss, lm_loss=lm_loss, aux_loss=aux_loss, routings=routings)

    def sum_gradient(self, weight):
        "After the backward pass of a weight that all processes hold. An expert's gradient has come to it already."
        dist.all_reduce(weight.grad)

    def clip(self, weights, limit):
        "`clip_grad_norm_` by the length of the gradient of all weights, those of the others' experts included."
        weights = [weight for weight in weights if weight.grad is not None]
        norm, here = (torch.nn.utils.get_total_norm([w.grad for w in weights if (w in self.experts) == own])
                      for own in (False, True))
        square = (here ** 2).to(weights[0].device)
        dist.all_reduce(square)
        torch.nn.utils.clip_grads_with_norm_(weights, limit, (norm ** 2 + square).sqrt())

    def sum_counts(self, modules):
        "Before `after_step`: what these modules have counted (lesson 27) becomes the sum over all processes."
        for module in modules:
            for buffer in module.buffers():
                if not buffer.is_floating_point():
                    dist.all_reduce(buffer)


def parallelize(model, state, experts=True):
    """Share the training of `model` out among all processes, in place. All call it, with the same model and `state`.

    From then on `train` in all of them does what it does in one: every process reads the whole batch and works
    on its rows, and losses, loads, gradients and their clipping are those of the whole batch. Each keeps E / W
    experts of each layer, and all other weights; with `experts=False` all weights (data parallel). Random numbers
    of training, such as noise and dropout, are drawn by each process for its own rows.
    """
    for module in list(model.modules()) if experts else ():
        if isinstance(module, SparseMoE):
            module.experts = ExpertParallelExperts(module.experts, memory=state.optimizer.state)
    left = set(model.parameters())
    for group in state.optimizer.param_groups:
        group["params"] = [weight for weight in group["params"] if weight in left]
    for weight in set(state.optimizer.state) - left:
        del state.optimizer.state[weight]
    processes = Processes(model)
    model.register_forward_pre_hook(processes.take_rows, prepend=True)
    model.register_forward_hook(processes.share)
    for weight in left - processes.experts:
        weight.register_post_accumulate_grad_hook(processes.sum_gradient)
    counting = [module for module in model.modules() if hasattr(module, "after_step")]
    state.optimizer.register_step_pre_hook(lambda *_: processes.sum_counts(counting))
    state.clip = processes.clip
    if processes.rank:  # process 0 draws the numbers that one process would draw
        torch.manual_seed(torch.initial_seed() + processes.rank)


def whole_name(model, name):
    "What the weight `name` of `model` is called in a model of one process."
    before, _, leaf = f".{name}".partition(".local.")
    if leaf and leaf[0].isdigit():  # experts in a loop have their numbers
        number, _, leaf = leaf.partition(".")
        leaf = f"{model.get_submodule(before[1:]).first + int(number)}.{leaf}"
    return ".".join(filter(None, (before[1:], leaf)))


def gather(model, state):
    """(model, state) of one process, for `save_training`: a copy on process 0, (None, None) on the others.

    All processes must call it. The copy shares with `model` what is not an expert's, so do not train it.
    """
    tensors = {(name, ""): tensor for name, tensor in model.state_dict().items()}
    for name, weight in model.named_parameters():
        tensors |= {(name, memory): m for memory, m in state.optimizer.state.get(weight, {}).items()}
    own = {key for key in tensors if ".local." in f".{key[0]}"}
    pieces = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object({(whole_name(model, key[0]), key[1]): tensors[key].cpu() for key in own}, pieces)
    if pieces is None:
        return None, None
    device = next(model.parameters()).device
    tensors = {key: tensor for key, tensor in tensors.items() if key not in own}
    for key in dict.fromkeys(key for piece in pieces for key in piece):
        found = [piece[key] for piece in pieces if key in piece]  # one process has it, or each has some rows
        tensors[key] = (torch.cat(found) if found[0].dim() else found[0]).to(device)
    with torch.device("meta"):
        whole = type(model)(model.config)
    whole.load_state_dict({name: tensor for (name, memory), tensor in tensors.items() if not memory}, assign=True)
    memories = {weight: {} for weight in whole.parameters()}
    for (name, memory), tensor in tensors.items():
        if memory:
            memories[whole.get_parameter(name)][memory] = tensor
    state = copy.copy(state)
    state.optimizer = SimpleNamespace(state=memories)
    return whole.train(model.training), state


MEETING = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"  # what torchrun tells each process
LOST = "(?i)gloo|nccl|connection|peer|timed out"  # in the message of a collective that another process has left


def meet():
    "Join the processes that torchrun has started, and return the store where they met. ValueError, ConnectionError."
    if missing := [name for name in MEETING if not os.environ.get(name)]:
        raise ValueError(f"{' and '.join(missing)} not set: start several processes with "
                         "`torchrun --standalone --nproc-per-node=2 -m makemoe train ...`")
    rank, size, host, port = (os.environ[name] for name in MEETING)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=60)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    except (RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise ConnectionError(f"process {rank} of {size} cannot meet the others at {host}:{port} ({reason})") from None
    return store


def join(run, model, state):
    "`parallelize`, and agree after every step whether to stop: what is returned may be told so in any process."
    parallelize(model, state, run.parallel == "expert")
    asked = SimpleNamespace(stop=0)

    def agree(*_):
        stop = torch.tensor(asked.stop)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        state.stop = stop.item()

    state.optimizer.register_step_post_hook(agree)
    return asked


def begin(run, model, state, path, save):
    "Process 0 begins: it saves what it has, and the others read it."
    save(state.step)
    dist.broadcast_object_list([str(path.resolve())])
    shakespeare.TEAM["whole"] = gather
    return join(run, model, state)


def follow(run):
    "All other processes begin with what process 0 has saved, and train along. They write nothing."
    dist.broadcast_object_list(path := [None])
    _, train_ids, val_ids, _, settings = shakespeare.prepare(run)
    model, state, _, _ = load_training(path[0], settings["device"])
    with shakespeare.stop_by_signal(join(run, model, state)):
        train(model, train_ids, val_ids, run.train, on_eval=lambda record: gather(model, state), state=state)
    gather(model, state)  # for the last checkpoint
    sys.exit(128 + state.stop if state.stop else 0)


@wraps(shakespeare.run_training)
def train_together(run):
    if not {"RANK", "WORLD_SIZE"} & set(os.environ) or os.environ.get("WORLD_SIZE") == "1":
        return shakespeare.run_training(run)
    store = meet()
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        if run.parallel == "expert" and run.model.num_experts % size:
            raise ValueError(f"{run.model.num_experts} experts cannot be shared out equally among {size} processes: "
                             "choose another number, or --parallel data")
        shakespeare.TEAM["begin"] = partial(begin, run)
        (follow if rank else shakespeare.run_training)(run)
    except Exception as error:
        if rank and isinstance(error, FloatingPointError):
            sys.exit(2)  # all processes have the same losses, and process 0 says more
        with suppress(RuntimeError):  # the store may have ended with its process
            if store.add("reports", 1) > 1:
                sys.exit(2)  # another process has said why
        if not (isinstance(error, RuntimeError) and re.search(LOST, str(error))):
            raise
        raise ConnectionError(f"another of the {size} processes has ended, and so does process {rank}: the same "
                              "command with --resume goes on from the last evaluation") from None
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        dist.destroy_process_group()
