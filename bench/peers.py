"""The peers: other ways to make a KV cache small, as short simulations for quality.py.

    per token              an even grid for every vector
    KIVI                   Liu et al. 2024, arXiv 2402.02750
    ZipCache               He et al. 2024, arXiv 2405.14256
    QJL                    Zandieh et al. 2024, arXiv 2406.03482, without its outlier channels
    TurboQuant             Zandieh et al. 2025, arXiv 2504.19874, the form for squared error
    product quantisation   Jegou et al. 2011
    transform              principal components of a layer, bits where variance is largest
    KVTC                   the same over all layers, arXiv 2511.01815, without its entropy coding
    SnapKV                 Li et al. 2024, arXiv 2404.14469
    PyramidKV              Cai et al. 2024, arXiv 2406.02069

Each is a function of its settings and of layer, q (B, H, G, T, m), k and v (B, H, 1, T, m), that
says how keys and values come back, and which tokens are kept (see train_dict.Simulated). `spared`
are the tokens that stay as they are, buffer and sinks, the same for all. What is measured begins at
`start`. The memory beside each counts all that a token takes: numbers, scales, zeros, norms. What a
model has once, whatever the context (rotations, centroids, components), is not counted, nor are
Lexico's dictionaries."""

from functools import cache, partial
from math import pi

import torch
import torch.nn.functional as F

from model import InputError, rope_frequencies, rotate
from train_dict import Recorder, Simulated

# ---- Grids and levels ----------------------------------------------------------------------------

def round_to(x, bits, dim, among=None):
    """x on an even grid of 2^bits levels between its extremes along dim (of those in the mask
    `among` alone). The lowest level and the step are kept in 16 bits."""
    low, high = (x if among is None else x.where(among, end) for end in (torch.inf, -torch.inf))
    low, high = low.amin(dim, keepdim=True).half().float(), high.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low

@cache
def lloyd_max(bits):
    """The 2^bits levels that round standard normal numbers with the least squared error, and that
    error (Lloyd 1982, Max 1960): each level is the mean of the numbers that are nearest to it."""
    x = torch.linspace(-6, 6, 12_001, dtype=torch.float64)
    p = (-x.square() / 2).softmax(0)
    levels = 6**0.5 * torch.erfinv(torch.linspace(-1, 1, 2**bits + 2, dtype=x.dtype)[1:-1])
    for _ in range(100):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        levels = nearest.bincount(p * x) / nearest.bincount(p)
    return levels.float(), (p * (x - levels[nearest]).square()).sum().item()

def to_levels(x, bits):
    """Every number of x at the nearest of the 2^bits levels for a standard normal."""
    levels = lloyd_max(bits)[0].to(x.device)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]

def attention(q, k):
    """Who attends to whom: causal softmax weights (B, H, G, T, T)."""
    future = torch.ones(k.shape[-2], k.shape[-2], device=q.device).triu(1).bool()
    return (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)

# ---- Quantisation --------------------------------------------------------------------------------

def per_token(bits, layer, q, k, v):
    return round_to(k, bits, -1), round_to(v, bits, -1), None

def kivi(bits, sinks, layer, q, k, v, group=32):
    """Keys: a grid for each channel and 32 tokens. Values: for each token and 32 channels."""
    T = k.shape[-2] // group * group
    among = (torch.arange(T, device=k.device) >= sinks).view(-1, group, 1)
    keys = round_to(k[..., :T, :].unflatten(-2, (-1, group)), bits, -2, among).flatten(-3, -2)
    values = round_to(v.unflatten(-1, (-1, group)), bits, -1).flatten(-2)
    return torch.cat((keys, k[..., T:, :]), dim=-2), values, None

def zipcache(share, buffer, sinks, layer, q, k, v, start):
    """This share of the tokens, the salient ones, in 4 bits, the others in 2. Keys: a grid for each
    channel over all salient tokens, and one over all others. Values: channels divided by the root
    of their largest number, then a grid for each token over all heads. Salient is what those attend
    to most, on average, that can see it before it is compressed. Tokens from `start` on are ranked
    among themselves."""
    t = torch.arange(k.shape[-2], device=k.device)
    asked = (t[:, None] >= t) & (t[:, None] < (t + buffer).clamp(min=start))  # (queries, tokens)
    attended = (attention(q, k) * asked).sum((1, 2, 3)) / asked.sum(0)  # (B, T)
    parts = attended.tensor_split((sinks, start), dim=1)
    above = [x >= x.quantile(1 - share, dim=-1, keepdim=True) for x in parts[1:]]
    salient = torch.cat((parts[0] < 0, *above), dim=1)[:, None, None, :, None]  # (B, 1, 1, T, 1)
    others = ~salient & (t >= sinks)[:, None]
    keys = torch.where(salient, round_to(k, 4, -2, salient), round_to(k, 2, -2, others))
    scale = v[..., sinks:, :].abs().amax(-2, keepdim=True).sqrt().clamp(min=1e-8)
    fine, coarse = (round_to(v / scale, bits, (1, -1)) * scale for bits in (4, 2))
    return keys, torch.where(salient, fine, coarse), None

def qjl(bits, layer, q, k, v):
    """A key is the signs of its products with r = bits m random vectors S, and its norm:
    <q, k> is on average sqrt(pi / 2) / r |k| <S q, sign(S k)>. Values: a grid for each token."""
    S = random_normal(bits * k.shape[-1], k)  # (r, m)
    keys = (pi / 2) ** 0.5 / len(S) * k.norm(dim=-1, keepdim=True).half() * ((k @ S.T).sign() @ S)
    return keys, round_to(v, bits, -1), None

def turboquant(bits, layer, q, k, v):
    """A vector is its norm, and its direction turned by a random rotation: then every number is
    about normal, with deviation 1 / sqrt(m), and goes to the nearest level for that."""
    rotation = torch.linalg.qr(random_normal(k.shape[-1], k))[0] * k.shape[-1] ** 0.5
    def code(x):
        norm = x.norm(dim=-1, keepdim=True).half().float().clamp(min=1e-8)
        return to_levels(x / norm @ rotation.T, bits) @ rotation * norm / x.shape[-1]
    return code(k), code(v), None

def random_normal(n, x):
    """The same n random vectors (n, m) for all x (..., m)."""
    return torch.randn(n, x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x.device)

# ---- Codes that are calibrated on text -----------------------------------------------------------

@torch.inference_mode()
def record(model, rows):
    """Exact keys and values of token rows (B, T), for each layer (2, B, H, 1, T, m)."""
    if not len(rows):
        raise InputError("no text is left to calibrate on; give --calibrate FILE, or --only others")
    recorder = Recorder()
    model(rows, recorder, last_only=True)
    return [kv[:, :, :, None] for kv in recorder.kv]

def product_codes(d, calibration, sinks, layer, q, k, v):
    """d numbers share one of 256 centroids: k-means for each layer, head and place in a vector."""
    def code(x, book):
        (B, H, _, T, m), which = x.shape, torch.cdist(pieces(x, d), book).argmin(-1, keepdim=True)
        back = book.gather(1, which.expand(-1, -1, d)).view(H, m // d, B, T, d)
        return back.permute(2, 0, 3, 1, 4).reshape(x.shape)
    return *map(code, (k, v), centroids(d, calibration, sinks)[layer]), None

@cache
def centroids(d, calibration, sinks):
    """The centroids (H m / d, 256, d) of each layer's keys and values, from every fourth token."""
    def k_means(x):
        book = x[:, torch.linspace(0, x.shape[1] - 1, 256).long()]
        for _ in range(10):  # to the means; a centroid that serves none stays
            nearest = torch.cdist(x, book).argmin(-1, keepdim=True).expand_as(x)
            book = book.scatter_reduce(1, nearest, x, "mean", include_self=False)
        return book
    return [[k_means(pieces(x[..., sinks::4, :], d)) for x in kv] for kv in calibration()]

def pieces(x, d):
    """Vectors (B, H, 1, T, m) in pieces of d numbers, (H m / d, B T, d)."""
    return x[:, :, 0].unflatten(-1, (-1, d)).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)

def transform(share, model, calibration, sinks, layer, q, k, v):
    return *transforms(share, model, calibration, sinks, together=False)[layer](k, v), None

def kvtc(share, model, calibration, spared, start):
    """A cache of one code for all layers of a token. To read one vector it must rebuild those of
    all layers, so it serves to put caches aside, not to attend to. The codes come of an exact pass
    over the text, which it must see first: errors do not add up in them, as in all others."""
    [code], coded = transforms(share, model, calibration, spared["sinks"], together=True), []
    cache = Simulated(lambda layer, q, k, v: (*coded[layer], None), **spared)
    # Keys and values with the heads of all layers side by side, (2, B, L H, 1, T, m), and back.
    cache.see = lambda kv: coded.extend(torch.stack(code(*torch.cat(kv, 2))).chunk(len(kv), 2))
    return cache

@cache
def transforms(share, model, calibration, sinks, together):
    """Functions (k, v) -> k, v as they come back: one for each layer, or one for all together. Keys
    are coded without the rotation of RoPE: their positions are known."""
    def turned(k, sign):
        angle = torch.outer(torch.arange(k.shape[-2]).float(), rope_frequencies(model.config))
        angle = angle.repeat(1, 2).to(k.device)  # (T, m)
        return rotate(k, angle.cos(), sign * angle.sin())
    def learn(k, v):
        code_k, code_v = (components(x[..., sinks:, :], share) for x in (turned(k, -1), v))
        return lambda k, v: (turned(code_k(turned(k, -1)), 1), code_v(v))
    return [learn(*kv) for kv in ([torch.cat(calibration(), 2)] if together else calibration())]

def components(x, share):
    """A function that gives vectors like x (B, H, 1, T, m) back as their principal components, in
    few bits, make them: all heads of a token together. Bits go one by one to the component whose
    variance, times what one more takes off the squared error of a standard normal, is largest."""
    tokens = lambda x: x[:, :, 0].transpose(1, 2).flatten(2)  # (B, T, n), n = H m
    X = tokens(x).flatten(0, 1)
    mean, n = X.mean(0), X.shape[1]
    variance, basis = torch.linalg.eigh((X - mean).T @ (X - mean) / len(X))  # (n,), (n, n)
    deviation = variance.clamp(min=1e-12).sqrt()
    error = torch.tensor([lloyd_max(bits)[1] for bits in range(9)], device=X.device)
    gain = variance[:, None] * (error[:-1] - error[1:])  # (n, 8), it falls from bit to bit
    bits = (gain.flatten().topk(int(16 * share * n)).indices // 8).bincount(minlength=n)  # (n,)
    def code(x):
        z = (tokens(x) - mean) @ basis / deviation
        for b in range(9):
            z[..., bits == b] = to_levels(z[..., bits == b], b)
        back = z * deviation @ basis.T + mean
        return back.unflatten(2, (x.shape[1], -1)).transpose(1, 2)[:, :, None]
    return code

# ---- Eviction ------------------------------------------------------------------------------------

def snapkv(share, n_layers, sinks, layer, q, k, v, start, window=32, pool=7):
    """Of the tokens before `start`, keep the share that the last `window` queries there attended to
    most (summed over a KV head's queries, smoothed over neighbours), and that window itself.
    n_layers: of PyramidKV, where what is kept beside the window falls linearly with depth, to a
    twentieth of the mean; 0 for SnapKV."""
    votes = attention(q, k)[..., start - window:start, sinks:start].sum((2, 3))
    votes = F.max_pool1d(votes, pool, 1, pool // 2)  # (B, H, start - sinks)
    votes[..., -window:] = torch.inf
    depth = 1.95 - 1.9 * layer / (n_layers - 1) if n_layers > 1 else 1
    count = window + round(depth * max(0, round(share * start) - window))
    chosen = sinks + votes.topk(min(count, votes.shape[-1]), dim=-1).indices
    kept = (torch.arange(k.shape[-2], device=k.device) >= start).repeat(*k.shape[:2], 1)
    return k, v, kept.scatter(-1, chosen, True)[:, :, None, None]

# ---- The table -----------------------------------------------------------------------------------

def methods(model, calibration, spared, length):
    """name -> (bytes of a vector over 2 m, start -> cache) of every peer, for rows of `length`
    tokens. calibration(): what to calibrate on, as record gives it."""
    m, L, table = model.config.head_dim, model.config.n_layers, {}
    width, buffer, sinks = m * model.config.kv_heads, spared["buffer"], spared["sinks"]
    def add(name, share, compress, **options):
        table[name] = share, lambda start: Simulated(compress, **spared, **options)
    def add_after_prompt(name, share, compress):  # which passes exactly, and tells what matters
        table[name] = share, lambda start: Simulated(partial(compress, start=start), start=start,
                                                     **spared)
    for b in (2, 3, 4):
        if m % 32 == 0:  # the numbers that share a grid
            add(f"KIVI {b} bit", b / 16 + 2 / 32, partial(kivi, b, sinks), group=32)
        add(f"per token {b} bit", b / 16 + 2 / m, partial(per_token, b))
        add(f"TurboQuant {b} bit", b / 16 + 1 / m, partial(turboquant, b))
        add(f"QJL {b} bit", b / 16 + 1.5 / m, partial(qjl, b))
    for r in (0.2, 0.4, 0.6):  # bits: numbers, channels' and tokens' grids, and who is salient
        bits = 2 + 2 * r + (64 + 16) / 2 / length + 32 / 2 / width + 1 / (2 * width)
        add_after_prompt(f"ZipCache {r:.0%}", bits / 16, partial(zipcache, r, buffer, sinks))
    for d in (8, 4, 2):
        if m % d == 0:
            add(f"product quantisation d={d}", 1 / 2 / d,
                partial(product_codes, d, calibration, sinks))
    for r in (0.06, 0.09, 0.12, 0.18, 0.25):
        add(f"transform {r:.0%}", r, partial(transform, r, model, calibration, sinks))
        table[f"KVTC {r:.0%}"] = r, partial(kvtc, r, model, calibration, spared)
    for r in (0.1, 0.2, 0.3):
        least = max(r, 32 / (length // 2))  # the window is kept
        add_after_prompt(f"SnapKV {r:.0%}", least, partial(snapkv, r, 0, sinks))
        add_after_prompt(f"PyramidKV {r:.0%}", least, partial(snapkv, r, L, sinks))
    return table
