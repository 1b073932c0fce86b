"Lesson 10. What goes wrong here: who reads and who writes the stream, places, shifted targets, weights not scaled."

ATTEND = "x = x + self.attention(self.norm1(x), cache)  # (B, T, C)"
MIX = "y, routing = self.moe(self.norm2(x))"
RETURN = "return x + self.scale * y, routing"

SCALED = "nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if writes else 0.02)"
PLACES = "self.position_embedding(torch.arange(past, past + T, device=ids.device))"
TOO_LONG = "if past + T > longest:"
ENTROPY = "F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())"
START = "        x = self.token_embedding(ids)  # (B, T, C)"

TOTAL = "total = sum(weight.numel() for weight in model.parameters())"
IN_EXPERTS = "in_experts = sum(weight.numel() for block in model.blocks for weight in block.moe.experts.parameters())"
COUNTED = "return total, total - in_experts * (E - k) // E"

TIED = "model.lm_head.weight = model.token_embedding.weight"

EACH = "tuple(ends + n_layers * (shared + experts * expert) for experts in (num_experts, top_k))"

ANSWERS = {
    "block": {
        "right: router and experts called one by one": [
            (
                MIX,
                """read = self.norm2(x)
        routing = self.moe.router(read)
        y = self.moe.experts(read, routing)""",
            ),
        ],
        "right: what was written is added at the end": [
            (
                f"{ATTEND}\n        {MIX}\n        {RETURN}",
                """first = self.attention(self.norm1(x), cache=cache)
        second, routing = self.moe(self.norm2(first + x))
        return torch.add(x + first, second, alpha=self.scale), routing""",
            ),
        ],
        "norm on the stream, as in 2017": [
            (ATTEND, "x = self.norm1(x + self.attention(x, cache))"),
            (
                f"{MIX}\n        {RETURN}",
                "y, routing = self.moe(x)\n        return self.norm2(x + self.scale * y), routing",
            ),
        ],
        "experts add to what they read, not to the stream": [
            (
                f"{MIX}\n        {RETURN}",
                "x = self.norm2(x)\n        y, routing = self.moe(x)\n        return x + self.scale * y, routing",
            ),
        ],
        "no norm before the experts": [("self.moe(self.norm2(x))", "self.moe(x)")],
        "both read the same, side by side": [(f"{ATTEND}\n        {MIX}", f"{MIX}\n        {ATTEND}")],
        "cache forgotten": [("self.norm1(x), cache)", "self.norm1(x))")],
        "gates instead of the routing": [(RETURN, "return x + self.scale * y, routing.gates")],
        "router asked again: another draw of the noise": [
            (RETURN, "return x + self.scale * y, self.moe.router(self.norm2(x))")
        ],
        "x += writes into the caller's stream": [(ATTEND, "x.data += self.attention(self.norm1(x), cache)")],
        "routing detached: no loss reaches the router": [
            (RETURN, "return x + self.scale * y, type(routing)(*(field.detach() for field in vars(routing).values()))"),
        ],
        "the factor forgotten": [(RETURN, "return x + y, routing")],
        "the factor on the stream, too": [(RETURN, "return self.scale * (x + y), routing")],
        "a dropout of its own on the mixture's answer": [
            (RETURN, "return x + self.scale * F.dropout(y, self.attention.dropout, self.training), routing"),
        ],
        "no gradient in evaluation mode": [
            (RETURN, "return (x if self.training else x.detach()) + self.scale * y, routing")
        ],
    },
    "language_model": {
        "right: modules instead of names, log-probabilities gathered": [
            (
                """        for name, weight in self.named_parameters():
            writes = name.endswith(("proj.weight", "down", "down.weight"))
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 1:  # of a norm
                nn.init.ones_(weight)
            else:
                """
                + SCALED,
                """        writer = 0.02 / (2 * len(self.blocks)) ** 0.5
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.02)
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, GroupedExperts):
                module.down.data.normal_(0, writer)
                for bias in (module.up_bias, module.down_bias):
                    if bias is not None:
                        bias.data.zero_()
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()
        for block in self.blocks:
            block.attention.proj.weight.data.normal_(0, writer)
            if isinstance(block.moe.experts, Experts):
                for expert in block.moe.experts:
                    expert.down.weight.data.normal_(0, writer)""",
            ),
            (PLACES, "self.position_embedding.weight[past:past + T]"),
            (ENTROPY, "-logits.float().log_softmax(dim=-1).gather(-1, targets[..., None]).mean()"),
        ],
        "right: cross-entropy by (B, V, T), caches zipped": [
            (ENTROPY, "F.cross_entropy(logits.float().transpose(1, 2), targets)"),
            (
                "for layer, block in enumerate(self.blocks):",
                "for block, memory in zip(self.blocks, cache or [None] * len(self.blocks)):",
            ),
            ("cache[layer] if cache else None", "memory"),
        ],
        "init: norms drawn like matrices": [
            ("elif weight.dim() == 1:  # of a norm\n                nn.init.ones_(weight)\n            ", "")
        ],
        "init: stacked biases taken for matrices": [('if name.endswith("bias"):', 'if name.endswith(".bias"):')],
        "init: the experts of the loop forgotten": [('"down", "down.weight"', '"down"')],
        "init: divided by 2 L without the root": [("math.sqrt(2 * self.config.n_layer)", "(2 * self.config.n_layer)")],
        "init: a seed of its own": [
            ("        for name, weight in self", "        torch.manual_seed(1337)\n        for name, weight in self")
        ],
        "places start at 0, cache or not": [("torch.arange(past, past + T,", "torch.arange(T,")],
        "places made on the CPU": [(", device=ids.device", "")],
        "too long is noticed after the cache was written": [
            (TOO_LONG + "\n            raise", "if False:\n            raise"),
            (
                "        logits = self",
                f"        {TOO_LONG}\n            raise ValueError(f'{{past + T}} tokens, but {{longest}} fit')\n"
                "        logits = self",
            ),
        ],
        "the first cache for all blocks": [("cache[layer] if cache", "cache[0] if cache")],
        "targets shifted again": [
            (ENTROPY, "F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())")
        ],
        "labels smoothed while it trains": [
            (
                ENTROPY,
                ENTROPY.replace(
                    "targets.flatten()", "targets.flatten(), label_smoothing=0.1 if self.training else 0.0"
                ),
            )
        ],
        "dropout on the embeddings, as in nanoGPT": [
            (START, START.replace("(ids)", "(ids)\n        x = F.dropout(x, self.config.dropout, self.training)"))
        ],
        "the balance loss computed and never added": [("lm_loss + aux_loss, lm_loss", "lm_loss, lm_loss")],
        "no gradient in evaluation mode": [
            (
                "logits = self.lm_head(self.norm(x))",
                "logits = self.lm_head(self.norm(x if self.training else x.detach()))",
            )
        ],
    },
    "count_parameters": {
        "right: by names": """
def count_parameters(model):
    total = active = 0
    for name, weight in model.named_parameters():
        total += weight.numel()
        share = model.config.top_k if ".experts." in name else model.config.num_experts
        active += weight.numel() * share // model.config.num_experts
    return total, active
""",
        "right: block by block, what is idle": """
def count_parameters(model):
    def size(module):
        return sum(map(torch.numel, module.parameters()))

    idle = 0
    for block in model.blocks:
        one_expert = size(block.moe.experts) // model.config.num_experts
        idle += (model.config.num_experts - model.config.top_k) * one_expert
    return size(model), size(model) - idle
""",
        "all divided by the experts": [(COUNTED, "return total, total * k // E")],
        "k experts are idle": [(COUNTED, "return total, total - in_experts * k // E")],
        "only the first block": [("for block in model.blocks for", "for block in model.blocks[:1] for")],
        "the router among the experts": [("block.moe.experts.parameters()", "block.moe.parameters()")],
        "a float": [("(E - k) // E", "(E - k) / E")],
        "shared ones twice": [(TOTAL, "total = sum(weight.numel() for weight in model.state_dict().values())")],
        "what is trained": [(TOTAL, TOTAL[:-1] + " if weight.requires_grad)")],
        "stacked weights only": [
            (IN_EXPERTS, "in_experts = sum(weight.numel() for weight in model.parameters() if weight.dim() == 3)"),
        ],
    },
    "tie_weights": {
        "right: the parameter registered under its second name": [
            (TIED, 'model.lm_head.register_parameter("weight", model.token_embedding.weight)'),
        ],
        "right: a new head around the parameter": [
            (
                TIED,
                """matrix, bias = model.token_embedding.weight, model.lm_head.bias
    model.lm_head = nn.Linear(*reversed(matrix.shape))
    setattr(model.lm_head, "weight", matrix)
    setattr(model.lm_head, "bias", bias)""",
            )
        ],
        "the embedding takes the head's matrix": [(TIED, "model.token_embedding.weight = model.lm_head.weight")],
        "numbers copied once": [(TIED, "model.lm_head.weight.data.copy_(model.token_embedding.weight.data)")],
        "memory shared, parameters apart": [(TIED, "model.lm_head.weight.data = model.token_embedding.weight.data")],
        "no bias any more": [(TIED, TIED + "\n    model.lm_head.bias = None")],
        "the bias set to zero": [(TIED, TIED + "\n    torch.nn.init.zeros_(model.lm_head.bias)")],
        "frozen": [(TIED, TIED + "\n    model.token_embedding.weight.requires_grad_(False)")],
        "nothing returned": [("\n    return model", "")],
        "a copy of the model": [(TIED, f"import copy\n    model = copy.deepcopy(model)\n    {TIED}")],
    },
    "mixtral_parameters": {
        "right: matrix by matrix": """
def mixtral_parameters(dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8,
                       vocab_size=32000, num_experts=8, top_k=2):
    def count(experts):
        total = 0
        for _ in range(n_layers):
            total += dim * (n_heads * head_dim)  # queries
            total += dim * (n_kv_heads * head_dim)  # keys
            total += dim * (n_kv_heads * head_dim)  # values
            total += (n_heads * head_dim) * dim  # output
            total += num_experts * dim  # router
            total += experts * 3 * hidden_dim * dim
            total += dim + dim  # norms
        return total + dim + vocab_size * dim + dim * vocab_size

    return count(num_experts), count(top_k)
""",
        "right: total less what is idle": [
            (
                f"return {EACH}",
                """total = ends + n_layers * (shared + num_experts * expert)
    return total, total - n_layers * (num_experts - top_k) * expert""",
            ),
        ],
        "two matrices in an expert": [("3 * dim * hidden_dim", "2 * dim * hidden_dim")],
        "as many heads for keys and values": [("2 * dim * n_kv_heads * head_dim", "2 * dim * n_heads * head_dim")],
        "heads as wide as dim / n_heads": [("2 * dim * n_heads * head_dim", "2 * dim * dim")],
        "router with biases": [("dim * num_experts +", "dim * num_experts + num_experts +")],
        "router counted for active experts only": [
            ("(shared + experts * expert)", "(shared - dim * (num_experts - experts) + experts * expert)")
        ],
        "embedding and head tied": [("ends = 2 * vocab_size * dim", "ends = vocab_size * dim")],
        "8 x 7 = 56: everything eight times": [
            ("ends + n_layers * (shared + experts * expert)", "experts * (ends + n_layers * (shared + expert))")
        ],
        "Mixtral by heart": [(f"return {EACH}", "return 46_702_792_704, 12_879_925_248")],
    },
}
