"""The GPU's kernels against the readable versions: on a GPU; without one, in Triton's interpreter
at small sizes, where a few lines of torch stand in for what is CUDA C++."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lexico
from generate import generate
from lexico import KEYS, VALUES, DenseCache, Dictionaries, SparseCache
from model import Config, Llama, best_device
from omp import omp_fused, pursue, relative_error, solve

pytest.importorskip("triton")
DEVICE = best_device()
CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32


@pytest.mark.parametrize("m, N, sparsity, B", [(64, 320, 5, 33), (128, 256, 1, 1)] + CUDA * [
    (m, N, s, B) for m in (64, 128) for N in (512, 1024, 4096) for s in (1, 8, 32)
    for B in (1, 7, 1000)])
def test_fused_omp_errs_as_much_as_the_readable_one(m, N, sparsity, B):
    torch.manual_seed(0)
    D = F.normalize(torch.randn(2, N, m, device=DEVICE), dim=-1).to(DTYPE)
    Y = torch.randn(2, B + 2, m, device=DEVICE)
    Y[:, 0], Y[:, 1] = 0, 2 * D[:, 5]
    found = pursue(D.float(), Y, sparsity)
    for bits in (0, 5):
        fused, readable = omp_fused(D, Y, sparsity, bits), solve(D.float(), *found, bits)
        errors = []
        for indices, z, *e in (fused, readable):
            z = z * torch.exp2(e[0] / 16 - 8) if e else z
            assert (z[:, 0] == 0).all() and 0 <= indices.min() <= indices.max() < N
            errors.append(relative_error(D.float(), Y, indices, z)[:, 2:].flatten())
        # Greedy paths part at near ties, and either may end better: chance counts with its spread.
        difference = errors[0] - errors[1]
        chance = 4 * difference.std(correction=0) / len(difference) ** 0.5
        assert difference.mean().abs() <= 2e-3 * errors[1].mean() + chance


class Codes:
    """The kernel `codes` in torch: scores and the values' table of every chunk."""

    def __init__(self, shared, **constants):
        self.__dict__.update(constants)

    def decode(self, first, second):
        word, coefficient = first.int() & 0xFFFF, second.float()
        if self.BITS:
            level = (word % (2 * self.LARGEST) ^ self.LARGEST) - self.LARGEST
            coefficient = level * torch.exp2(coefficient / 16 - 8)
        dense = torch.zeros(*first.shape[:3], self.N)
        return dense.scatter_add_(3, (word >> self.BITS).long(), coefficient)  # (B, H, T, N)

    def __call__(self, grid, block, arguments, shared):
        products, *codes, n_coded, _, stats, tables = arguments
        keys, values = self.decode(*codes[:2]), self.decode(*codes[2:])
        units = torch.exp2(codes[3].float() / 16 - 8)[..., 0] if self.BITS else torch.ones(1, 1, 1)
        n = n_coded.item()
        length = max(-(-n // self.CHUNKS), self.SHORTEST)
        for chunk, start in enumerate(range(0, n, length)):
            part = slice(start, min(start + length, n))
            scores = keys[:, :, part] @ products.view(*keys.shape[:2], self.G, -1).float().mT
            top = scores.amax(2, keepdim=True)  # (B, H, 1, G)
            weight = torch.exp2(scores - top)
            scaled = (weight * units.expand(keys.shape[:3])[:, :, part, None]).sum(2)
            table = weight.mT @ values[:, :, part] / scaled[..., None] * (2**15 / self.LARGEST)
            tables[:, chunk] = table.flatten(0, 2)
            stats[:, chunk, :3] = torch.stack((top[:, :, 0], weight.sum(2), scaled),
                                              -1).flatten(0, 2)


CASES = [(64, 192, 3, 5, 3, 2, 300, "word"), (128, 512, 8, 6, 4, 1, 0, "fp8")] + CUDA * [
    (m, N, s, 33 - s, G, batch, coded, coding)
    for m, N, batch in ((64, 512, 32), (128, 1024, 3), (128, 4096, 1))
    for s, G in ((1, 1), (8, 4), (32, 8))
    for coded in (1, 255, 257, 1025, 9000 // batch) for coding in ("fp8", "word")]


@pytest.mark.parametrize("m, N, s_k, s_v, G, batch, coded, coding", CASES)
def test_attention_over_codes_equals_the_readable_one(m, N, s_k, s_v, G, batch, coded, coding,
                                                      monkeypatch):
    if not CUDA:
        chip = SimpleNamespace(multi_processor_count=12, shared_memory_per_block_optin=100_000)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
        monkeypatch.setattr(lexico, "compile_codes", Codes)
    torch.manual_seed(0)
    config = Config(vocab_size=9, dim=9, n_layers=1, n_heads=2 * G, kv_heads=2, head_dim=m,
                    ffn_dim=9, context=9)
    d = Dictionaries.random(config, N, DEVICE)
    d.atoms = d.atoms.to(DTYPE)
    cache = SparseCache(config, d, [[s_k], [s_v]], buffer=20, batch=batch, coding=coding)
    for T in (20 + coded, 1):
        q, k, v = (torch.randn(batch, heads, T, m, device=DEVICE).to(DTYPE)
                   for heads in (2 * G, 2, 2))
        out = cache.attend(0, 3 * q, k, v)
    arguments = (3 * q[:, :, 0], cache.codes_of(KEYS, 0), cache.codes_of(VALUES, 0), cache.n_coded,
                 cache.ring[:, 0], cache.seen, cache.place[KEYS, 0][0].bits)
    fused = lexico.attend_codes(*arguments)
    readable = cache._attend(0, 3 * q, *cache.ring[:, 0], cache.seen[None])[:, :, 0].float()
    worst = ((fused - readable).norm(dim=-1) / readable.norm(dim=-1)).max()
    assert cache.coded == coded and worst < 1e-2
    assert torch.equal(fused, lexico.attend_codes(*arguments))  # the same bits every time
    assert not CUDA or torch.equal(fused, out[:, :, 0])


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("sparse", [False, True])
def test_recorded_steps_give_what_steps_one_by_one_give(sparse):
    model, runs = Llama.from_pretrained("tiny", DEVICE), []
    d = Dictionaries.load(Dictionaries.find("tiny"), DEVICE, torch.bfloat16)
    prompt = torch.randint(4096, (2, 50), device=DEVICE)
    for record in (False, True):
        cache = (SparseCache(model.config, d, d.allocate(0.2, "word"), 32, 4, 2, 150, coding="word")
                 if sparse else DenseCache(model.config, 2, 150, dtype=torch.bfloat16))
        steps = generate(model, cache, prompt, 60, lambda logits: logits.argmax(-1), record)
        runs.append(torch.stack([step["logits"] for step in steps]))
        assert cache.length == 109 and cache.replayable
    torch.testing.assert_close(*runs)
