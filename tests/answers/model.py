"Lesson 10. What goes wrong here: who reads and who writes the stream, places and caches, targets shifted twice, weights that nobody scaled."

ATTEND = "x = x + self.attention(self.norm1(x), cache)  # (B, T, C)"
THINK = "y, routing = self.moe(self.norm2(x))"
RETURN = "return x + self.scale * y, routing"

SCALED = "nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if writes else 0.02)"
WRITERS = '("proj.weight", "down", "down.weight")'
NORMS = "elif weight.dim() == 1:  # of a norm"
PLACES = "self.position_embedding(torch.arange(past, past + T, device=ids.device))"
TOO_LONG = "if past + T > self.config.block_size:"
CACHE = "block(x, cache[layer] if cache else None)"
LOGITS = "logits = self.lm_head(self.norm(x))"
ENTROPY = "F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())"
AUX = "aux_loss = self.auxiliary_loss(routings)"
OUTPUT = "return LMOutput(logits, lm_loss + aux_loss, lm_loss, aux_loss, tuple(routings))"

MODEL = '''
class SparseMoELanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.position_embedding = nn.Embedding(c.block_size, c.n_embd) if c.positions == "learned" else None
        self.blocks = nn.ModuleList([Block(c) for _ in range(c.n_layer)])
        self.norm = NORMS[c.norm](c.n_embd)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size)
        self.init_weights()

    def auxiliary_loss(self, routings):
        c = self.config
        terms = [(c.balance_coef, load_balancing_loss), (c.importance_coef, importance_loss), (c.z_coef, router_z_loss)]
        weighted = [coef * loss(routing) for coef, loss in terms if coef for routing in routings]
        return sum(weighted, routings[0].logits.new_zeros(())) / len(routings)

    def new_cache(self):
        return [KVCache() for _ in self.blocks]
'''

TOTAL = "total = sum(weight.numel() for weight in model.parameters())"
IN_EXPERTS = "in_experts = sum(weight.numel() for block in model.blocks for weight in block.moe.experts.parameters())"
COUNTED = "return total, total - in_experts * (E - k) // E"

TIED = "model.lm_head.weight = model.token_embedding.weight"

EACH = "tuple(ends + n_layers * (shared + experts * expert) for experts in (num_experts, top_k))"

ANSWERS = {
    "model-block": {
        "right: the two steps in a loop": [
            (f"{ATTEND}\n        {THINK}\n        {RETURN}", '''steps = [(self.norm1, lambda h: (self.attention(h, cache), None)), (self.norm2, self.moe)]
        for (norm, step), loudness in zip(steps, (1, self.scale)):
            written, routing = step(norm(x))
            x = torch.add(x, written, alpha=loudness)
        return x, routing'''),
        ],
        "right: router and experts called one by one": [
            (THINK, '''heard = self.norm2(x)
        routing = self.moe.router(heard)
        y = self.moe.experts(heard, routing)'''),
        ],
        "right: what was written is added at the end": [
            (f"{ATTEND}\n        {THINK}\n        {RETURN}", '''first = self.attention(self.norm1(x), cache=cache)
        second, routing = self.moe(self.norm2(first + x))
        return x + first + second * self.scale, routing'''),
        ],
        "norm on the stream, as in 2017": [
            (ATTEND, "x = self.norm1(x + self.attention(x, cache))"),
            (f"{THINK}\n        {RETURN}", "y, routing = self.moe(x)\n        return self.norm2(x + self.scale * y), routing"),
        ],
        "stream replaced by its norm": [(ATTEND, "x = self.norm1(x)\n        x = x + self.attention(x, cache)")],
        "experts add to what they heard, not to the stream": [
            (f"{THINK}\n        {RETURN}", "x = self.norm2(x)\n        y, routing = self.moe(x)\n        return x + self.scale * y, routing"),
        ],
        "attention without residual": [(ATTEND, "x = self.attention(self.norm1(x), cache)")],
        "experts without residual": [(RETURN, "return self.scale * y, routing")],
        "residual twice": [(RETURN, "return x + x + self.scale * y, routing")],
        "residual from before attention": [(ATTEND, "start = x\n        " + ATTEND), (RETURN, "return start + self.scale * y, routing")],
        "no norm before attention": [("self.attention(self.norm1(x), cache)", "self.attention(x, cache)")],
        "no norm before the experts": [("self.moe(self.norm2(x))", "self.moe(x)")],
        "norm after the readers": [
            ("self.attention(self.norm1(x), cache)", "self.norm1(self.attention(x, cache))"),
            (f"{THINK}\n        {RETURN}", "y, routing = self.moe(x)\n        return x + self.scale * self.norm2(y), routing"),
        ],
        "the first norm twice": [("self.moe(self.norm2(x))", "self.moe(self.norm1(x))")],
        "norms exchanged": [("self.norm1(x), cache", "self.norm2(x), cache"), ("self.moe(self.norm2(x))", "self.moe(self.norm1(x))")],
        "both read the same, side by side": [(f"{ATTEND}\n        {THINK}", f"{THINK}\n        {ATTEND}")],
        "experts before attention": [
            (f"{ATTEND}\n        {THINK}\n        {RETURN}", '''y, routing = self.moe(self.norm2(x))
        x = x + self.scale * y
        return x + self.attention(self.norm1(x), cache), routing'''),
        ],
        "cache forgotten": [("self.norm1(x), cache)", "self.norm1(x))")],
        "a cache of its own": [("self.norm1(x), cache)", "self.norm1(x), KVCache())")],
        "routing forgotten": [(RETURN, "return x + self.scale * y")],
        "gates instead of the routing": [(RETURN, "return x + self.scale * y, routing.gates")],
        "router asked again, about the stream": [(RETURN, "return x + self.scale * y, self.moe.router(x)")],
        "router asked again: another draw of the noise": [(RETURN, "return x + self.scale * y, self.moe.router(self.norm2(x))")],
        "x += writes into the caller's stream": [(ATTEND, "x += self.attention(self.norm1(x), cache)")],
        "routing and stream exchanged": [(RETURN, "return routing, x + self.scale * y")],
        "routing detached: no loss reaches the router": [
            (RETURN, "return x + self.scale * y, type(routing)(*(field.detach() for field in vars(routing).values()))"),
        ],
        "the factor forgotten": [(RETURN, "return x + y, routing")],
        "the factor on the stream, too": [(RETURN, "return self.scale * (x + y), routing")],
        "the factor on attention, too": [("x = x + self.attention(self.norm1(x), cache)", "x = x + self.scale * self.attention(self.norm1(x), cache)")],
        "the factor on what the mixture hears: a norm has forgotten it": [(f"{THINK}\n        {RETURN}", "y, routing = self.moe(self.norm2(self.scale * x))\n        return x + y, routing")],
        "stream detached": [("x = x + self.attention", "x = x.detach() + self.attention")],
    },
    "model-language-model": {
        "right: modules instead of names, log-probabilities gathered": MODEL + '''
    def init_weights(self):
        writer = 0.02 / (2 * len(self.blocks)) ** 0.5
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
                    expert.down.weight.data.normal_(0, writer)

    def forward(self, ids, targets=None, cache=None):
        B, T = ids.shape
        caches = cache or [None] * len(self.blocks)
        past = 0 if cache is None else len(cache[-1])
        if past + T > self.config.block_size:
            raise ValueError(f"the block has {self.config.block_size} places, {past} are taken, {T} more are wanted")
        h = F.embedding(ids, self.token_embedding.weight)
        if self.position_embedding is not None:
            h = h + self.position_embedding.weight[past:past + T]
        routings = ()
        for block, memory in zip(self.blocks, caches):
            h, routing = block(h, memory)
            routings += (routing,)
        logits = self.lm_head(self.norm(h))
        if targets is None:
            return LMOutput(logits=logits, loss=None, lm_loss=None, aux_loss=None, routings=routings)
        log_probs = logits.float().log_softmax(dim=-1)
        lm_loss = -log_probs.gather(-1, targets[..., None]).mean()
        aux_loss = self.auxiliary_loss(routings)
        return LMOutput(logits, lm_loss + aux_loss, lm_loss, aux_loss, routings)
''',
        "right: cross-entropy by (B, V, T), a truncated normal": [
            (ENTROPY, "F.cross_entropy(logits.float().transpose(1, 2), targets)"),
            (SCALED, "nn.init.trunc_normal_(weight, std=0.02 if not writes else 0.02 * (2 * self.config.n_layer) ** -0.5)"),
        ],
        "right: weights drawn by layer, losses by logsumexp": [
            (ENTROPY, "(logits.float().logsumexp(-1) - logits.float().gather(-1, targets[..., None]).squeeze(-1)).mean()"),
            (SCALED, "weight.data = torch.randn_like(weight) * (0.02 / (2 * len(self.blocks)) ** 0.5 if writes else 0.02)"),
        ],
        "init: norms at 0": [("nn.init.ones_(weight)", "nn.init.zeros_(weight)")],
        "init: norms drawn like matrices": [(f"{NORMS}\n                nn.init.ones_(weight)\n            ", "")],
        "init: norms left as they are": [("nn.init.ones_(weight)", "pass")],
        "init: biases left as PyTorch drew them": [("nn.init.zeros_(weight)", "pass")],
        "init: stacked biases taken for matrices": [('if name.endswith("bias"):', 'if name.endswith(".bias"):')],
        "init: all matrices 0.02": [(" / math.sqrt(2 * self.config.n_layer) if writes else 0.02", "")],
        "init: one write in a layer": [("math.sqrt(2 * self.config.n_layer)", "math.sqrt(self.config.n_layer)")],
        "init: divided by 2 L without the root": [("math.sqrt(2 * self.config.n_layer)", "(2 * self.config.n_layer)")],
        "init: eight layers, whatever the config": [("math.sqrt(2 * self.config.n_layer)", "4")],
        "init: only attention scaled": [(WRITERS, '("proj.weight",)')],
        "init: only experts scaled": [(WRITERS, '("down", "down.weight")')],
        "init: the loop's experts forgotten": [(WRITERS, '("proj.weight", "down")')],
        "init: grouped experts forgotten": [(WRITERS, '("proj.weight", "down.weight")')],
        "init: Kaiming": [(SCALED, "nn.init.kaiming_normal_(weight)")],
        "init: variance 0.02": [("std=0.02 / math.sqrt(2 * self.config.n_layer) if writes else 0.02", "std=0.02 ** 0.5")],
        "init: uniform": [(SCALED, "nn.init.uniform_(weight, -1, 1)\n                weight.data *= 0.02 * 3 ** 0.5 / (math.sqrt(2 * self.config.n_layer) if writes else 1)")],
        "init: only linear layers, stacked experts are none": [
            ("for name, weight in self.named_parameters():", "own = {id(w) for m in self.modules() if isinstance(m, (nn.Linear, nn.Embedding)) for w in m.parameters()}\n"
             "        for name, weight in self.named_parameters():\n            if id(weight) not in own and weight.dim() > 1:\n                continue"),
        ],
        "init: embeddings forgotten": [("else:\n                nn.init.normal_", "elif 'embedding' not in name:\n                nn.init.normal_")],
        "init: the head at 0": [("else:\n                nn.init.normal_", "elif name == 'lm_head.weight':\n                nn.init.zeros_(weight)\n            else:\n                nn.init.normal_")],
        "init: a seed of its own": [("for name, weight in self", "torch.manual_seed(1337)\n        for name, weight in self")],
        "init: the same for all experts": [(SCALED, SCALED + "\n                if weight.dim() == 3:\n                    weight.data[:] = weight.data[0].clone()")],
        "init: a new tensor bound to the name": [(SCALED, "weight = torch.randn_like(weight) * 0.02")],
        "no norm in front of the head": [(LOGITS, "logits = self.lm_head(x)")],
        "probabilities instead of logits": [(LOGITS, "logits = self.lm_head(self.norm(x)).softmax(dim=-1)")],
        "logits of the last token only": [(LOGITS, "logits = self.lm_head(self.norm(x[:, -1:]))")],
        "embedding scaled by sqrt(C)": [("x = self.token_embedding(ids)", "x = self.token_embedding(ids) * self.config.n_embd ** 0.5")],
        "no positions": [("if self.position_embedding is not None:", "if False:")],
        "positions start at 0, cache or not": [("torch.arange(past, past + T,", "torch.arange(T,")],
        "positions by row of the batch": [(PLACES, "self.position_embedding(torch.arange(len(ids)))[:, None]")],
        "as long as a block, always": [("T = ids.shape[1]", "T = self.config.block_size")],
        "length read from the batch": [("T = ids.shape[1]", "T = ids.shape[0]")],
        "too long goes unnoticed": [(TOO_LONG, "if False:")],
        "too long without the cache": [(TOO_LONG, "if T > self.config.block_size:")],
        "full is taken for too full": [(TOO_LONG, TOO_LONG.replace(">", ">="))],
        "too long is noticed after the cache was written": [
            (TOO_LONG + "\n            raise", "if False:\n            raise"),
            ("        logits = self", f"        {TOO_LONG}\n            raise ValueError(f\"{{past + T}} tokens are too many\")\n        logits = self"),
        ],
        "cache ignored": [(CACHE, "block(x)")],
        "the first cache for all layers": [("cache[layer] if cache", "cache[0] if cache")],
        "only the last routing": [("tuple(routings))", "(routing,))")],
        "routings as a list": [("tuple(routings))", "routings)")],
        "routings detached: the router learns no fairness": [
            ("routings.append(routing)", "routings.append(type(routing)(*(field.detach() for field in vars(routing).values())))"),
        ],
        "the first block again and again": [("x, routing = block(x,", "x, routing = self.blocks[0](x,")],
        "targets shifted again": [(ENTROPY, "F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())")],
        "the token itself as its target": [(ENTROPY, ENTROPY.replace("targets", "ids"))],
        "token 0 taken for padding": [(ENTROPY, ENTROPY.replace("targets.flatten()", "targets.flatten(), ignore_index=0"))],
        "summed instead of averaged": [(ENTROPY, ENTROPY.replace("targets.flatten()", "targets.flatten(), reduction='sum'"))],
        "tokens and batch exchanged": [(ENTROPY, "F.cross_entropy(logits.transpose(0, 1).flatten(0, 1).float(), targets.flatten())")],
        "logits reshaped instead of turned": [(ENTROPY, "F.cross_entropy(logits.float().reshape(len(ids), -1, T), targets)")],
        "softmax twice": [(ENTROPY, ENTROPY.replace(".float()", ".float().softmax(dim=-1)"))],
        "loss in bfloat16 under autocast": [
            (ENTROPY, "-logits.softmax(dim=-1).to(logits.dtype).log().to(logits.dtype).gather(-1, targets[..., None]).mean()"),
        ],
        "a loss without targets": [("if targets is None:", "targets = ids if targets is None else targets\n        if False:")],
        "fairness left out of the loss": [("lm_loss + aux_loss, lm_loss", "lm_loss, lm_loss")],
        "fairness weighted twice": [(OUTPUT, OUTPUT.replace("lm_loss + aux_loss", "lm_loss + self.config.balance_coef * aux_loss"))],
        "fairness of the last layer": [("self.auxiliary_loss(routings)", "self.auxiliary_loss(routings[-1:])")],
        "fairness in evaluation only": [(AUX, "aux_loss = self.auxiliary_loss(routings) * (not self.training)")],
        "fairness in training only": [(AUX, "aux_loss = self.auxiliary_loss(routings) * self.training")],
        "fairness summed over layers": [("self.auxiliary_loss(routings)", "self.auxiliary_loss(routings) * len(routings)")],
        "fairness of all layers pooled": [
            (AUX, "pooled = type(routing)(*(torch.cat(fields) for fields in zip(*(vars(r).values() for r in routings))))\n        aux_loss = self.auxiliary_loss([pooled])"),
        ],
        "fairness as a plain number: no gradient": [("self.auxiliary_loss(routings)", "self.auxiliary_loss(routings).detach()")],
        "nothing can be learned: no gradients": [("    def forward(self, ids", "    @torch.no_grad()\n    def forward(self, ids")],
        "evaluation mode in forward": [("        T = ids.shape[1]", "        self.eval()\n        T = ids.shape[1]")],
    },
    "model-count": {
        "right: by names": '''
def count_parameters(model):
    total = active = 0
    for name, weight in model.named_parameters():
        total += weight.numel()
        share = model.config.top_k if ".experts." in name else model.config.num_experts
        active += weight.numel() * share // model.config.num_experts
    return total, active
''',
        "right: layer by layer, what is idle": '''
def count_parameters(model):
    def size(module):
        return sum(map(torch.numel, module.parameters()))

    idle = 0
    for block in model.blocks:
        one_expert = size(block.moe.experts) // model.config.num_experts
        idle += (model.config.num_experts - model.config.top_k) * one_expert
    return size(model), size(model) - idle
''',
        "right: the experts taken away and k of them put back": [
            (COUNTED, "outside = total - in_experts\n    return total, outside + k * (in_experts // E)"),
        ],
        "all divided by the experts": [(COUNTED, "return total, total * k // E")],
        "no expert works": [(COUNTED, "return total, total - in_experts")],
        "one expert works": [(COUNTED, "return total, total - in_experts * (E - 1) // E")],
        "k experts are idle": [(COUNTED, "return total, total - in_experts * k // E")],
        "two of eight, as in the lesson": [("E, k = model.config.num_experts, model.config.top_k", "E, k = 8, 2")],
        "only the first layer": [("for block in model.blocks for", "for block in model.blocks[:1] for")],
        "the router among the experts": [("block.moe.experts.parameters()", "block.moe.parameters()")],
        "active and total exchanged": [(COUNTED, "return total - in_experts * (E - k) // E, total")],
        "a float": [("(E - k) // E", "(E - k) / E")],
        "idle parameters instead of active": [(COUNTED, "return total, in_experts * (E - k) // E")],
        "matrices only": [("for weight in model.parameters())", "for weight in model.parameters() if weight.dim() > 1)")],
        "without the embedding": [(TOTAL, TOTAL[:-1] + " if weight is not model.token_embedding.weight)")],
        "tensors instead of numbers": [(TOTAL, "total = len(list(model.parameters()))")],
        "the state dict: shared ones twice": [(TOTAL, "total = sum(weight.numel() for weight in model.state_dict().values())")],
        "what is trained": [(TOTAL, TOTAL[:-1] + " if weight.requires_grad)")],
        "bytes": [(TOTAL, TOTAL.replace("weight.numel()", "weight.nbytes")), (IN_EXPERTS, IN_EXPERTS.replace("weight.numel()", "weight.nbytes"))],
        "stacked weights only": [
            (IN_EXPERTS, "in_experts = sum(weight.numel() for weight in model.parameters() if weight.dim() == 3)"),
        ],
        "by the arrays of the first expert, if there is a list": [
            (IN_EXPERTS, "in_experts = sum(weight.numel() for block in model.blocks for name, weight in block.moe.experts.named_parameters() if not name[:1].isdigit() or name[0] == '0')"),
        ],
    },
    "model-tie-weights": {
        "right: the parameter registered under its second name": [(TIED, 'model.lm_head.register_parameter("weight", model.token_embedding.weight)')],
        "right: a new head around the parameter": [(TIED, '''matrix, bias = model.token_embedding.weight, model.lm_head.bias
    model.lm_head = nn.Linear(*reversed(matrix.shape))
    setattr(model.lm_head, "weight", matrix)
    setattr(model.lm_head, "bias", bias)''')],
        "numbers copied once": [(TIED, "model.lm_head.weight.data.copy_(model.token_embedding.weight.data)")],
        "memory shared, parameters apart": [(TIED, "model.lm_head.weight.data = model.token_embedding.weight.data")],
        "a parameter of its own with the same numbers": [(TIED, "model.lm_head.weight = nn.Parameter(model.token_embedding.weight.detach().clone())")],
        "a parameter of its own around the same memory": [(TIED, "model.lm_head.weight = nn.Parameter(model.token_embedding.weight)")],
        "turned: the head wants (V, C)": [(TIED, "model.lm_head.weight = nn.Parameter(model.token_embedding.weight.T)")],
        "no bias any more": [(TIED, TIED + "\n    model.lm_head.bias = None")],
        "frozen": [(TIED, TIED + "\n    model.token_embedding.weight.requires_grad_(False)")],
        "a new head without bias": [(TIED, '''model.lm_head = nn.Linear(*reversed(model.token_embedding.weight.shape), bias=False)
    model.lm_head.weight = model.token_embedding.weight''')],
        "modules exchanged instead of weights": [(TIED, "model.lm_head = model.token_embedding")],
        "nothing returned": [("\n    return model", "")],
        "a buffer: the head cannot learn": [(TIED, '''shared = model.token_embedding.weight.detach()
    del model.lm_head.weight
    model.lm_head.register_buffer("weight", shared)''')],
        "a copy of the model": [(TIED, "import copy\n    model = copy.deepcopy(model)\n    model.lm_head.weight.data = model.token_embedding.weight.data")],
    },
    "model-mixtral": {
        "right: matrix by matrix": '''
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
''',
        "right: total less what is idle": [
            (f"return {EACH}", '''total = ends + n_layers * (shared + num_experts * expert)
    return total, total - n_layers * (num_experts - top_k) * expert'''),
        ],
        "two matrices in an expert": [("3 * dim * hidden_dim", "2 * dim * hidden_dim")],
        "as many heads for keys and values": [("2 * dim * n_kv_heads * head_dim", "2 * dim * n_heads * head_dim")],
        "output of the size of keys": [("queries_and_output = 2 * dim * n_heads * head_dim", "queries_and_output = dim * (n_heads + n_kv_heads) * head_dim")],
        "keys without values": [("keys_and_values = 2 *", "keys_and_values =")],
        "heads as wide as dim / n_heads": [("2 * dim * n_heads * head_dim", "2 * dim * dim")],
        "router with biases": [("dim * num_experts +", "dim * num_experts + num_experts +")],
        "router forgotten": [("dim * num_experts +", "")],
        "router counted for active experts only": [("(shared + experts * expert)", "(shared - dim * (num_experts - experts) + experts * expert)")],
        "one router for all layers": [
            ("dim * num_experts + 2 * norm", "2 * norm"), ("ends = 2 * vocab_size * dim + norm", "ends = 2 * vocab_size * dim + norm + dim * num_experts"),
        ],
        "embedding and head tied": [("ends = 2 * vocab_size * dim", "ends = vocab_size * dim")],
        "no norm at the end": [("2 * vocab_size * dim + norm", "2 * vocab_size * dim")],
        "one norm in a layer": [("+ 2 * norm\n", "+ norm\n")],
        "norms with biases": [("3 * dim * hidden_dim, dim", "3 * dim * hidden_dim, 2 * dim")],
        "experts shared by all layers": [("ends + n_layers * (shared + experts * expert)", "ends + n_layers * shared + experts * expert")],
        "8 x 7 = 56: everything eight times": [("ends + n_layers * (shared + experts * expert)", "experts * (ends + n_layers * (shared + expert))")],
        "attention eight times": [("ends + n_layers * (shared + experts * expert)", "ends + n_layers * experts * (shared + expert)")],
        "total only": [(f"return {EACH}", f"return {EACH}[0]")],
        "Mixtral by heart": [(f"return {EACH}", "return 46_702_792_704, 12_879_925_248")],
    },
}
