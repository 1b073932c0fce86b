"""Checks of lesson 31, expert_parallel. Several processes are played by threads, which exchange through a list."""

import threading
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

from makemoe.checks import check, close, refuses, same, unchanged
from makemoe.dropless import GroupedExperts
from makemoe.gating import top_k_gating
from makemoe.sparse_moe import Experts


class Threads:
    "W processes as threads: `run(work)` is the list of what `work(rank)` returns; torch.distributed works in them."

    def __init__(self, W):
        self.W, self.own, self.box, self.rows_sent = W, threading.local(), [None] * W, 0
        self.barrier = threading.Barrier(W, timeout=5)

    def get_rank(self, group=None):
        return self.own.rank

    def get_world_size(self, group=None):
        return self.W

    def exchange(self, mine):
        "What all processes hand in, in the order of their ranks."
        self.box[self.own.rank] = mine
        self.barrier.wait()
        found = list(self.box)
        self.barrier.wait()
        return found

    def all_to_all_single(self, output, input, output_split_sizes=None, input_split_sizes=None, group=None):
        even = [len(input) // self.W] * self.W
        sends, receives = list(input_split_sizes or even), list(output_split_sizes or even)
        rank = self.own.rank
        assert len(sends) == self.W and sum(sends) == len(input), f"{len(input)} rows to send, in parts of {sends}"
        assert sum(receives) == len(output), f"room for {len(output)} rows, but parts of {receives} are to arrive"
        assert input.is_contiguous(), "all_to_all_single needs rows that lie side by side in memory"
        if input.is_floating_point():
            self.rows_sent += len(input)
        pieces = [piles[rank] for piles in self.exchange(input.detach().clone().split(sends))]
        got = [len(piece) for piece in pieces]
        assert got == receives, f"process {rank} is sent {got} rows, but waits for {receives}"
        assert pieces[0].dtype == output.dtype, f"{pieces[0].dtype} is sent, but {output.dtype} is waited for"
        with torch.no_grad():
            output.copy_(torch.cat(pieces))

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        with torch.no_grad():
            tensor.copy_(sum(self.exchange(tensor.detach().clone())))

    def all_gather(self, tensors, tensor, group=None):
        with torch.no_grad():
            for target, found in zip(tensors, self.exchange(tensor.detach().clone())):
                target.copy_(found)

    def run(self, work):
        results, errors = [None] * self.W, []

        def one(rank):
            self.own.rank = rank
            try:
                results[rank] = work(rank)
            except threading.BrokenBarrierError:
                errors.append(
                    AssertionError(f"process {rank} waits for an exchange in which the others do not take part")
                )
            except BaseException as error:  # the first one is told, the others wait for it
                errors.insert(0, error)
                self.barrier.abort()

        names = "get_rank", "get_world_size", "all_to_all_single", "all_reduce", "all_gather"
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(mock.patch.object(dist, name, getattr(self, name)))
            threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self.W)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return results


@check
def check_traffic(traffic):
    yield "two processes, four tokens, four experts, by hand"
    kept = torch.tensor([[[0, 0, 1, 0], [1, 0, 0, 0]], [[0, 0, 0, 1], [0, 0, 1, 0]]], dtype=torch.bool)  # (2, 2, 4)
    same(traffic(kept, 2), torch.tensor([[1, 1], [0, 2]]), "the matrix")
    yield "four processes against a loop; the sender has the row, the receiver the column"
    kept = torch.rand(8, 5, 12) < 0.3
    with unchanged(kept=kept):
        matrix = traffic(kept, 4)
    for i in range(4):
        for j in range(4):
            rows = kept[2 * i : 2 * i + 2, :, 3 * j : 3 * j + 3].sum().item()
            assert matrix[i, j] == rows, f"process {i} sends {rows} rows to process {j}, not {matrix[i, j].item()}"
    yield "one process keeps all; nothing kept is nothing sent"
    same(traffic(kept, 1), kept.sum().view(1, 1), "the matrix of one process")
    same(traffic(torch.zeros_like(kept), 2), torch.zeros(2, 2, dtype=torch.long), "the matrix without choices")


def moved(AllToAll, rows, matrix, weights=None):
    "Send `rows` (a list, one tensor per process) by the `matrix` of counts: (arrived, gradients), lists."
    W = len(rows)

    def work(rank):
        mine = rows[rank].clone().requires_grad_(rows[rank].is_floating_point())
        sends, receives = matrix[rank], [matrix[i][rank] for i in range(W)]
        arrived = AllToAll.apply(mine, sends, receives, None)
        if weights is None:
            return arrived.detach(), None
        (arrived * weights[rank]).sum().backward()
        return arrived.detach(), mine.grad

    return tuple(zip(*Threads(W).run(work)))


def route_back(pieces, matrix):
    "The transposition by hand: `pieces`, a tensor per receiver, as each sender sees them."
    W = len(matrix)
    split = [piece.split([matrix[i][j] for i in range(W)]) for j, piece in enumerate(pieces)]
    return [torch.cat([split[j][i] for j in range(W)]) for i in range(W)]


def draw_rows(matrix, *shape, dtype=torch.float32):
    return [torch.randn(sum(sends), *shape).to(dtype) for sends in matrix]


@check
def check_all_to_all(AllToAll):
    yield "uneven parts arrive, in the order of the senders"
    matrix = [[1, 3], [2, 4]]
    rows = draw_rows(matrix, 5)
    wanted = [torch.cat([rows[0][:1], rows[1][:2]]), torch.cat([rows[0][1:], rows[1][2:]])]
    weights = [torch.randn_like(part) for part in wanted]
    arrived, gradients = moved(AllToAll, rows, matrix, weights)
    for rank in range(2):
        same(arrived[rank], wanted[rank], f"what arrives at process {rank}")
    yield "gradients take the way back"
    for rank, gradient in enumerate(route_back(weights, matrix)):
        assert gradients[rank] is not None, f"no gradient reaches the rows of process {rank}"
        same(gradients[rank], gradient, f"the gradient of the rows of process {rank}")
    yield "three processes, one that sends nothing and one that receives nothing; float64, three dimensions"
    matrix = [[0, 2, 0], [0, 0, 0], [3, 1, 0]]
    rows = draw_rows(matrix, 2, 3, dtype=torch.float64)
    weights = [torch.randn(n, 2, 3, dtype=torch.float64) for n in (3, 3, 0)]
    arrived, gradients = moved(AllToAll, rows, matrix, weights)
    for rank, gradient in enumerate(route_back(weights, matrix)):
        same(gradients[rank], gradient, f"the gradient of the rows of process {rank}")
    same(arrived[1], torch.cat([rows[0], rows[2][3:]]), "what arrives at process 1")
    yield "whole numbers, and rows that do not lie side by side"
    arrived, _ = moved(AllToAll, [torch.arange(4), torch.arange(4, 8)], [[3, 1], [2, 2]])
    same(arrived[0], torch.tensor([0, 1, 2, 4, 5]), "whole numbers at process 0")
    tall = torch.randn(3, 4).mT
    Threads(1).run(lambda rank: same(AllToAll.apply(tall, [4], [4], None), tall.contiguous(), "a transposed tensor"))


def shares(ExpertParallelExperts, make, x, routing, parts, dtype=torch.float32):
    """Compare W processes, whose parts of the tokens are `parts` long, with one: y, and the gradients of x, gates and
    weights. `make()` makes the experts; x (N, C). Returns how many rows travelled, there and back."""
    W, direction = len(parts), torch.randn_like(x)
    torch.manual_seed(7)
    alone = make().to(dtype)
    copies = [make().to(dtype) for _ in parts]
    for experts in copies:
        experts.load_state_dict(alone.state_dict())
    x, gates = x.clone().requires_grad_(), routing.gates.clone().requires_grad_()
    y = alone(x, replace(routing, gates=gates))
    (y * direction).sum().backward()
    group = Threads(W)
    cut = {name: field.split(parts) for name, field in vars(routing).items()}
    xs, directions = x.detach().split(parts), direction.split(parts)

    def work(rank):
        layer = ExpertParallelExperts(copies[rank])
        mine, gates = xs[rank].clone().requires_grad_(), cut["gates"][rank].clone().requires_grad_()
        fields = {name: field[rank] for name, field in cut.items()}
        with unchanged(x=mine, gates=gates, kept=fields["kept"]):
            y = layer(mine, type(routing)(**fields | dict(gates=gates)))
        (y * directions[rank]).sum().backward()
        return y.detach(), mine.grad, gates.grad, [weight.grad for weight in layer.local.parameters()]

    ys, x_grads, gate_grads, weight_grads = zip(*group.run(work))
    close(torch.cat(ys), y.detach(), "y", rtol=1e-4, atol=1e-5)
    for what, ours, theirs in ("x", x_grads, x.grad), ("the gates", gate_grads, gates.grad):
        assert all(grad is not None for grad in ours), f"no gradient reaches {what}"
        close(torch.cat(ours), theirs, f"the gradient of {what}", rtol=1e-4, atol=1e-5)
    assert all(grad is not None for grads in weight_grads for grad in grads), (
        "an expert without tokens has no gradient: it should be 0, or the processes would differ"
    )
    theirs = [weight.grad for weight in alone.parameters()]
    if isinstance(alone, Experts):
        ours = [grad for grads in weight_grads for grad in grads]
    else:
        ours = [torch.cat(pieces) for pieces in zip(*weight_grads)]
    for number, (grad, wanted) in enumerate(zip(ours, theirs)):
        close(grad, wanted, f"the gradient of weight {number}", rtol=1e-4, atol=1e-5)
    return group.rows_sent


@check
def check_expert_parallel_experts(ExpertParallelExperts):
    C, E = 6, 4
    x, routing = torch.randn(10, C), top_k_gating(torch.randn(10, E), 2)
    yield "two processes with 7 and 3 tokens: y and all gradients are those of one"
    rows = shares(ExpertParallelExperts, lambda: GroupedExperts(E, C, 5, "gelu"), x, routing, [7, 3])
    yield "a row travels four times: there and back, forward and backward, and nothing else does"
    assert rows == 4 * routing.kept.sum(), f"{rows} rows travelled, but {4 * routing.kept.sum()} need to"
    yield "a loop of experts, four processes, one of them without tokens"
    shares(ExpertParallelExperts, lambda: Experts(E, C, 5), x, routing, [3, 0, 6, 1])
    yield "all tokens at one expert, and dropped choices"
    kept = torch.zeros_like(routing.kept)
    kept[:7, 2] = True
    crowded = replace(routing, gates=kept * torch.rand(10, E), chosen=torch.ones_like(kept), kept=kept)
    shares(ExpertParallelExperts, lambda: GroupedExperts(E, C, 5), x, crowded, [5, 5])
    yield "nobody has a token"
    shares(ExpertParallelExperts, lambda: Experts(E, C, 5), x[:0], top_k_gating(torch.randn(0, E), 1), [0, 0])
    yield "batches of other shapes in each process"

    def shaped(rank):
        torch.manual_seed(3)
        layer, mine = ExpertParallelExperts(Experts(E, C, 5)), torch.randn(*[(2, 3), (1, 4)][rank], C)
        y = layer(mine, top_k_gating(torch.randn(*mine.shape[:-1], E), 2))
        assert y.shape == mine.shape, f"x is {tuple(mine.shape)}, but y {tuple(y.shape)}"

    Threads(2).run(shaped)
    yield "the type of x, and float32 gates"

    def typed(rank):
        layer = ExpertParallelExperts(GroupedExperts(E, C, 5).bfloat16())
        y = layer(x.bfloat16(), routing)
        assert y.dtype == torch.bfloat16, f"x is bfloat16, but y {y.dtype}"

    Threads(2).run(typed)
    yield "a routing of another shape is refused"

    def wrong(rank):
        refuses(ValueError, lambda: ExpertParallelExperts(Experts(E, C, 5))(x[:4], routing), "(10, 4)", "(4, 4)")

    Threads(2).run(wrong)


@check
def check_time_ratio(time_ratio):
    yield "two processes, by hand: 2 bytes there and back for half of the rows, 6 F operations"
    close(time_ratio(100, 6e8, 2.0, 2), 1e6, "the ratio", rtol=1e-9)
    yield "numbers of 1 byte, experts of two matrices"
    close(time_ratio(2048, 989e12, 50e9, 64, size=1, matrices=2), 4.7535, "the ratio", rtol=1e-3)
    yield "one process sends nothing; with many processes almost everything travels"
    close(time_ratio(100, 1e12, 1e9, 1), 0.0, "the ratio of one process")
    close(time_ratio(100, 1e12, 1e9, 10**6), 4e12 / 600e9, "the ratio of a million", rtol=1e-5)
