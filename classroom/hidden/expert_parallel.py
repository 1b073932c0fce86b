"Hidden cases for lesson 31: other numbers of processes and experts than students can see."

import torch

from makemoe.checks import check, close, same
from makemoe.checks.expert_parallel import draw_rows, moved, route_back, shares
from makemoe.dropless import GroupedExperts
from makemoe.gating import top_k_gating
from makemoe.sparse_moe import Experts


@check
def check_traffic(traffic):
    yield "six processes"
    kept = torch.rand(6, 7, 18) < 0.2
    wanted = torch.stack([torch.stack([kept[i, :, 3 * j : 3 * j + 3].sum() for j in range(6)]) for i in range(6)])
    same(traffic(kept, 6), wanted, "the matrix")


@check
def check_all_to_all(AllToAll):
    yield "four processes with random counts"
    matrix = torch.randint(0, 4, (4, 4)).tolist()
    rows = draw_rows(matrix, 3)
    weights = [torch.randn(sum(matrix[i][j] for i in range(4)), 3) for j in range(4)]
    arrived, gradients = moved(AllToAll, rows, matrix, weights)
    for rank, (row, gradient) in enumerate(zip(route_back(arrived, matrix), route_back(weights, matrix))):
        same(row, rows[rank], f"the rows of process {rank}, sent back")
        same(gradients[rank], gradient, f"the gradient of process {rank}")


@check
def check_expert_parallel_experts(ExpertParallelExperts):
    yield "three processes, nine experts, k = 4"
    x, routing = torch.randn(23, 8), top_k_gating(torch.randn(23, 9), 4)
    shares(ExpertParallelExperts, lambda: GroupedExperts(9, 8, 3, "squared_relu", bias=False), x, routing, [1, 20, 2])
    shares(ExpertParallelExperts, lambda: Experts(9, 8, 3, "gelu"), x, routing, [0, 0, 23])


@check
def check_time_ratio(time_ratio):
    yield "8 processes, float32"
    close(time_ratio(500, 1e13, 1e10, 8, size=4), 2 * 4 / 1e10 * 7 / 8 / (6 * 500 / 1e13), "the ratio", rtol=1e-6)
