"""The peers: other ways to make a KV cache small, as short simulations for quality.py.

Each function here makes a compress(layer, q, k, v) for train_dict.Simulated, with q (B, H, G, T, m)
and k, v (B, H, 1, T, m): it says how keys and values come back, and which tokens are kept. What the
newest tokens and the sinks are spared is Simulated's business, the same for all. The share of 16-bit
memory beside each (see methods) counts all that is stored for a token: scales, zeros, norms. What a
model has once, however long the text (rotations, centroids, bases), is not counted, nor are
Lexico's dictionaries.

    per token              an even grid for every vector
    KIVI                   Liu et al. 2024, arXiv 2402.02750
    ZipCache               He et al. 2024, arXiv 2405.14256
    QJL                    Zandieh et al. 2024, arXiv 2406.03482
    TurboQuant             Zandieh et al. 2025, arXiv 2504.19874, the form for squared error
    product quantisation   Jegou et al. 2011
    transform              transform coding of each layer: principal components, bits by variance
    KVTC                   transform coding of all layers together, arXiv 2511.01815
    SnapKV                 Li et al. 2024, arXiv 2404.14469
    PyramidKV              Cai et al. 2024, arXiv 2406.02069"""

import functools
from math import pi

import torch
import torch.nn.functional as F

from model import rope_frequencies, rotate
from train_dict import Recorder, Simulated

# ---- Grids and levels ----------------------------------------------------------------------------

def round_to(x, bits, dim, among=None):
    """x on an even grid of 2^bits levels between its extremes along dim (of those in the mask
    `among` alone). The lowest level and the step are kept in 16 bits."""
    low = x if among is None else x.where(among, torch.inf)
    high = x if among is None else x.where(among, -torch.inf)
    low, high = low.amin(dim, keepdim=True).half().float(), high.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low

@functools.cache
def lloyd_max(bits):
    """The 2^bits levels that round standard normal numbers with the least squared error, and that
    error (Lloyd 1982, Max 1960): each level is the mean of the numbers that are nearest to it."""
    x = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
    p = torch.exp(-x.square() / 2) / torch.exp(-x.square() / 2).sum()
    middle = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = 6**0.5 * torch.erfinv(2 * middle - 1)  # about right: wider apart where p is small
    for _ in range(100):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, nearest, p)
        levels = torch.zeros_like(levels).index_add_(0, nearest, p * x) / mass
    return levels.float(), (p * (x - levels[nearest]).square()).sum().item()

def to_levels(x, bits):
    """Every number of x at the nearest of the 2^bits levels for a standard normal."""
    levels = lloyd_max(bits)[0].to(x.device)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]

def attention(q, k):
    """Who attends to whom: causal softmax weights (B, H, G, T, T)."""
    T, m = k.shape[-2:]
    future = torch.ones(T, T, device=q.device).triu(1).bool()
    return (q @ k.mT / m**0.5).masked_fill(future, -torch.inf).softmax(-1)

# ---- Quantisation --------------------------------------------------------------------------------

def per_token(bits):
    return lambda layer, q, k, v: (round_to(k, bits, -1), round_to(v, bits, -1), None)

def kivi(bits, sinks, group=32):
    """Keys: a grid for each channel and 32 tokens. Values: for each token and 32 channels."""
    def compress(layer, q, k, v):
        T = k.shape[-2] // group * group
        among = (torch.arange(T, device=k.device) >= sinks).view(-1, group, 1)
        keys = round_to(k[..., :T, :].unflatten(-2, (-1, group)), bits, -2, among).flatten(-3, -2)
        values = round_to(v.unflatten(-1, (-1, group)), bits, -1).flatten(-2)
        return torch.cat((keys, k[..., T:, :]), dim=-2), values, None
    return compress

def zipcache(share, buffer, sinks, start):
    """This share of the tokens, the salient ones, in 4 bits, the others in 2. Keys: a grid for each
    channel, over all salient tokens and over all others. Values: channels divided by the root of
    their largest number, then a grid for each token, over all heads. Salient is what is attended to
    most, by those queries that come before it is compressed, on average: the first tokens could be
    seen by more of them. Tokens from `start` on are ranked among themselves."""
    def compress(layer, q, k, v):
        t = torch.arange(k.shape[-2], device=k.device)
        asked = (t[:, None] >= t) & (t[:, None] < (t + buffer).clamp(min=start))  # (queries, tokens)
        attended = (attention(q, k) * asked).sum((1, 2, 3)) / asked.sum(0)  # (B, T)
        salient = torch.zeros_like(attended, dtype=torch.bool)
        for part in (slice(sinks, start), slice(start, None)):
            least = attended[:, part].quantile(1 - share, dim=-1, keepdim=True)
            salient[:, part] = attended[:, part] >= least
        salient = salient[:, None, None, :, None]  # (B, 1, 1, T, 1)
        others = ~salient & (t >= sinks)[:, None]
        keys = torch.where(salient, round_to(k, 4, -2, salient), round_to(k, 2, -2, others))
        scale = v[..., sinks:, :].abs().amax(-2, keepdim=True).sqrt().clamp(min=1e-8)
        fine, coarse = (round_to(v / scale, bits, (1, -1)) * scale for bits in (4, 2))
        return keys, torch.where(salient, fine, coarse), None
    return compress

def qjl(bits, m):
    """A key is the signs of its products with bits * m random vectors S, and its norm:
    <q, k> is on average sqrt(pi / 2) / r |k| <S q, sign(S k)>. Values: a grid for each token."""
    S = torch.randn(bits * m, m, generator=torch.Generator().manual_seed(0))  # (r, m)
    def compress(layer, q, k, v):
        random, norm = S.to(k.device), k.norm(dim=-1, keepdim=True).half().float()
        keys = (pi / 2) ** 0.5 / len(S) * norm * ((k @ random.T).sign() @ random)
        return keys, round_to(v, bits, -1), None
    return compress

def turboquant(bits, m):
    """A vector is its norm, and its direction turned by a random rotation: then every number is
    about normal, with deviation 1 / sqrt(m), and goes to the nearest level for that."""
    rotation = torch.linalg.qr(torch.randn(m, m, generator=torch.Generator().manual_seed(0)))[0]
    def code(x):
        turn, norm = rotation.to(x.device), x.norm(dim=-1, keepdim=True).half().float()
        return to_levels(m**0.5 * (x / norm.clamp(min=1e-8)) @ turn.T, bits) @ turn * norm / m**0.5
    return lambda layer, q, k, v: (code(k), code(v), None)

# ---- Codes that are calibrated on text -----------------------------------------------------------

@torch.inference_mode()
def record(model, rows):
    """Keys and values of the layers for token rows (B, T), exact: a list of (2, B, H, T, m)."""
    recorder = Recorder()
    model(rows, recorder, last_only=True)
    return recorder.kv

def product_quantisation(d, kv, sinks):
    """d numbers share one of 256 centroids: k-means for each layer, head and place in the vector."""
    def split(x):  # (B, H, T, m) to (H m / d, B T, d)
        return x.unflatten(-1, (-1, d)).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)

    def nearest(x, book):  # (P, V, d), (P, 256, d) to (P, V)
        return torch.cat([torch.cdist(part, book).argmin(-1) for part in x.split(4096, dim=1)], dim=1)

    def k_means(x, steps=10, most=8192):  # vectors to learn from
        x = x[:, ::-(-x.shape[1] // most)]
        book = x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[:256]]
        for _ in range(steps):
            mine = nearest(x, book)[..., None]  # (P, V, 1)
            count = torch.zeros_like(book[..., :1]).scatter_add_(1, mine, torch.ones_like(x[..., :1]))
            total = torch.zeros_like(book).scatter_add_(1, mine.expand_as(x), x)
            book = torch.where(count > 0, total / count.clamp(min=1), book)
        return book

    books = [[k_means(split(x[:, :, sinks:])) for x in layer] for layer in kv]

    def code(x, book):  # (B, H, 1, T, m)
        B, H, _, T, m = x.shape
        which = nearest(split(x[:, :, 0]), book)[..., None].expand(-1, -1, d)
        return book.gather(1, which).view(H, m // d, B, T, d).permute(2, 0, 3, 1, 4).reshape(x.shape)

    return lambda layer, q, k, v: (code(k, books[layer][0]), code(v, books[layer][1]), None)

def turned(k, config, sign):
    """Keys (B, H, T, m) with the rotation by their position put on (sign 1) or taken off (-1)."""
    angle = torch.outer(torch.arange(k.shape[-2]).float(), rope_frequencies(config)).repeat(1, 2)
    return rotate(k, angle.cos().to(k.device), sign * angle.sin().to(k.device))

def principal_components(X, share):
    """A function that gives vectors back as their principal components, in few bits, make them.
    X (V, n): to learn mean and components from. Bits go one by one to the component whose variance,
    times what one more bit takes off the error of a standard normal, is largest."""
    mean = X.mean(0)
    variance, basis = torch.linalg.eigh((X - mean).T @ (X - mean) / len(X))  # (n,), (n, n)
    deviation = variance.clamp(min=1e-12).sqrt()
    error = torch.tensor([lloyd_max(bits)[1] for bits in range(9)], device=X.device)
    gain = variance[:, None] * (error[:-1] - error[1:])  # (n, 8), falls from bit to bit
    best = gain.flatten().topk(int(16 * share * len(variance))).indices
    bits = (best // 8).bincount(minlength=len(variance))  # (n,)

    def code(x):
        z = (x - mean) @ basis / deviation
        for b in bits.unique().tolist():
            z[..., bits == b] = to_levels(z[..., bits == b], b)
        return z * deviation @ basis.T + mean

    return code

def transform(k, v, share, config, sinks):
    """A function that codes keys and values (B, H, T, m), all heads of a token side by side, keys
    before RoPE: their positions are known. k, v: to calibrate on."""
    def side_by_side(k, v):
        return [x.transpose(1, 2).flatten(2) for x in (turned(k, config, -1), v)]  # (B, T, H m)

    coders = [principal_components(x[:, sinks:].flatten(0, 1), share) for x in side_by_side(k, v)]

    def code(k, v):
        coded = [coder(x) for coder, x in zip(coders, side_by_side(k, v))]
        keys, values = (x.unflatten(2, (k.shape[1], -1)).transpose(1, 2) for x in coded)
        return turned(keys, config, 1), values

    return code

def each_layer(codes):
    """compress for one code, as transform makes them, for each layer."""
    return lambda layer, q, k, v: (
        *(x[:, :, None] for x in codes[layer](k[:, :, 0], v[:, :, 0])), None)

class AllLayers(Simulated):
    """A cache whose code spans all layers of a token. It must rebuild every vector of all layers to
    read one, so it serves to put caches aside, not to attend to. The text passes twice: exactly,
    which the codes are made of, and then through what they give back."""

    def __init__(self, code, **options):
        super().__init__(self.step, **options)
        self.code, self.kv, self.coded = code, [], None

    def step(self, layer, q, k, v):
        if self.coded is not None:
            return *(x[layer][:, :, None] for x in self.coded), None
        self.kv.append((k[:, :, 0], v[:, :, 0]))

    def end(self, T):
        if self.coded is None:
            self.coded = [x.chunk(len(self.kv), dim=1) for x in self.code(*all_heads(self.kv))]

def all_heads(kv):
    """Keys and values of all layers, their heads side by side: (B, L H, T, m) each."""
    return [torch.cat(x, dim=1) for x in zip(*kv)]

# ---- Eviction ------------------------------------------------------------------------------------

def snapkv(share, start, sinks, n_layers=0, window=32, pool=7):
    """Of the tokens before `start`, keep the share that the last `window` queries there attended to
    most (summed over a KV head's queries, smoothed over neighbours), and that window itself.
    n_layers: PyramidKV. What is kept beside the window falls linearly with depth, to a twentieth of
    the mean in the last layer."""
    def compress(layer, q, k, v):
        votes = attention(q, k)[..., start - window:start, sinks:start].sum((2, 3))
        votes = F.max_pool1d(votes, pool, 1, pool // 2)  # (B, H, start - sinks)
        votes[..., -window:] = torch.inf
        depth = 1.95 - 1.9 * layer / max(n_layers - 1, 1) if n_layers else 1
        count = window + round(depth * max(0, round(share * start) - window))
        chosen = sinks + votes.topk(min(count, votes.shape[-1]), dim=-1).indices
        kept = (torch.arange(k.shape[-2], device=k.device) >= start).repeat(*k.shape[:2], 1)
        return k, v, kept.scatter(-1, chosen, True)[:, :, None, None]
    return compress

# ---- The table -----------------------------------------------------------------------------------

def methods(model, calibration, sinks, buffer, length):
    """(name, bytes of a vector over 2 m, start -> cache) of every peer, for rows of `length`
    tokens. calibration(): keys and values to calibrate on, as record gives them."""
    config, kept = model.config, {"buffer": buffer, "sinks": sinks}
    m, width, L = config.head_dim, config.head_dim * config.kv_heads, config.n_layers
    table = []

    def add(name, memory, make, group=1, exact_prompt=False):
        """make(start): compress, made when it is needed, for some take long. exact_prompt: queries
        before `start`, which tell what is worth keeping, see all tokens as they are."""
        table.append((name, memory, lambda start: Simulated(
            make(start), group=group, start=start * exact_prompt, **kept)))

    for b in (2, 3, 4):
        if m % 32 == 0:
            add(f"KIVI {b} bit", b / 16 + 2 / 32, lambda start, b=b: kivi(b, sinks), group=32)
        add(f"per token {b} bit", b / 16 + 2 / m, lambda start, b=b: per_token(b))
        add(f"TurboQuant {b} bit", b / 16 + 1 / m, lambda start, b=b: turboquant(b, m))
        add(f"QJL {b} bit", b / 16 + 1.5 / m, lambda start, b=b: qjl(b, m))
    for r in (0.2, 0.4, 0.6):  # bits: numbers, grids and channels, and which tokens are salient
        bits = 2 + 2 * r + 40 / length + 16.5 / width
        add(f"ZipCache {r:.0%}", bits / 16, lambda start, r=r: zipcache(r, buffer, sinks, start),
            exact_prompt=True)
    for d in (d for d in (8, 4, 2) if m % d == 0):
        codec = functools.cache(lambda d=d: product_quantisation(d, calibration(), sinks))
        add(f"product quantisation d={d}", 8 / d / 16, lambda start, c=codec: c())
    for r in (0.06, 0.09, 0.12, 0.18, 0.25):
        codec = functools.cache(lambda r=r: each_layer(
            [transform(*kv, r, config, sinks) for kv in calibration()]))
        add(f"transform {r:.0%}", int(16 * r * width) / width / 16, lambda start, c=codec: c())
    for r in (0.06, 0.09, 0.12, 0.18, 0.25):
        codec = functools.cache(lambda r=r: transform(*all_heads(calibration()), r, config, sinks))
        table.append((f"KVTC {r:.0%}", int(16 * r * width * L) / (width * L) / 16,
                      lambda start, c=codec: AllLayers(c(), **kept)))
    for name, n_layers in (("SnapKV", 0), ("PyramidKV", L)):
        for r in (0.1, 0.2, 0.3):
            add(f"{name} {r:.0%}", r, lambda start, r=r, n=n_layers: snapkv(r, start, sinks, n),
                exact_prompt=True)
    return table
