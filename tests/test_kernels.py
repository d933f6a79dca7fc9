"""The GPU's kernels against the readable functions: on a GPU; without one, in Triton's interpreter
at small sizes, where a few lines of torch stand in for codes.cu. Then the Triton kernels are
compiled, too, though they cannot run, and so is codes.cu, if there is nvcc."""

import shutil
import subprocess
import sys
from itertools import product
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHAPES

import kernels
from generate import generate
from kernels.graphs import Replayed, compile_layers
from lexico import CODINGS, DenseCache, Dictionaries, FP8Codes, SparseCache, attend_codes
from model import Layer, Llama, best_device
from omp import omp, pursue, relative_error, solve

DEVICE = best_device()
CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32

@pytest.fixture
def chip(monkeypatch):
    """The GPU as the launchers see it; if there is none, one that exists in name only."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels were not run")
    import kernels.attention
    import kernels.omp  # noqa: F401
    if CUDA:
        return torch.cuda.get_device_properties(DEVICE)
    chip = SimpleNamespace(multi_processor_count=12, shared_memory_per_block_optin=100_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(kernels.attention, "compile_codes_cu", StandIn)
    return chip

# ---- OMP -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("m, N, sparsity, B", SHAPES["fused omp"] + [
    row for grid in CUDA * SHAPES["fused omp on a GPU"] for row in product(*grid)])
def test_fused_omp_errs_as_much_as_the_readable_one(chip, m, N, sparsity, B):
    torch.manual_seed(0)
    D = F.normalize(torch.randn(2, N, m, device=DEVICE), dim=-1).to(DTYPE)
    Y = torch.randn(2, B + 2, m, device=DEVICE)
    Y[:, 0], Y[:, 1] = 0, 2 * D[:, 5]
    fused = kernels.omp_fused if CUDA else kernels.omp.launch
    if not CUDA:  # the interpreter runs one program after the other, so that none may wait
        chip.multi_processor_count = 1
    found = pursue(D.float(), Y, sparsity)
    for bits in (0, 5):
        errors = []
        for indices, z, *e in (fused(D, Y, sparsity, bits), solve(*found, bits)):
            z = z * torch.exp2(e[0] / 16 - 8) if e else z
            assert (z[:, 0] == 0).all() and 0 <= indices.min() <= indices.max() < N
            errors.append(relative_error(D.float(), Y, indices, z)[:, 2:].flatten())
            refit = solve(*pursue(D.float(), Y, sparsity, chosen=indices))
            least = relative_error(D.float(), Y, *refit)[:, 2:].flatten()
            assert bits or (errors[-1] - least).max() < 1e-5
        # Greedy paths part at near ties, and either may end better: chance counts with its spread.
        difference = errors[0] - errors[1]
        chance = 4 * difference.std(correction=0) / len(difference) ** 0.5
        assert difference.mean().abs() <= 2e-3 * errors[1].mean() + chance

# ---- Attention -----------------------------------------------------------------------------------

class StandIn:
    """The kernel of codes.cu in torch: the values' table and the statistics of every chunk."""

    def __init__(self, shared, **constants):
        self.__dict__.update(constants)

    def vectors(self, *parts):
        """Codes as vectors of N coefficients, (P, T, N)."""
        coding = CODINGS["word" if self.BITS else "fp8"]
        known = SimpleNamespace(bits=self.BITS, numbers=FP8Codes.numbers)
        indices, z = coding.decode(known, *(part.flatten(0, 1) for part in parts))
        return torch.zeros(*z.shape[:2], self.N).scatter_add_(2, indices.long(), z)

    def __call__(self, grid, block, arguments, shared):
        products, *parts, compressed, capacity, stats, tables = arguments
        parts = [part[:, :, :compressed.item()] for part in parts]
        keys, values = self.vectors(*parts[:2]), self.vectors(*parts[2:])
        assert grid == (self.CHUNKS, len(keys), 1) and shared <= 100_000 - 256
        assert parts[0].shape[3] == self.S_K and parts[2].shape[3] == self.S_V
        scores = keys @ products.view(-1, self.R, self.N).float().mT  # (P, T, R)
        length = max(-(-keys.shape[1] // self.CHUNKS), self.SHORTEST)
        for chunk, some in enumerate(scores.split(length, dim=1) if keys.shape[1] else ()):
            weights = torch.exp2(some - some.amax(1, keepdim=True))
            table = weights.mT @ values.split(length, dim=1)[chunk] / weights.sum(1)[..., None]
            tables[:, chunk] = table.flatten(0, 1)  # (P R, N)
            numbers = torch.stack((some.amax(1), weights.sum(1)), dim=-1)  # (P, R, 2)
            stats.view(-1, self.CHUNKS + 1, 2)[:, chunk + 1] = numbers.flatten(0, 1)

def problem(m, N, s_k, s_v, G, batch, coded, coding, heads=1):
    """Arguments of attend_codes: two codes a token, of as many KV heads each, 20 dense tokens, more
    room for codes than needed."""
    torch.manual_seed(0)
    codes, M, H = [], heads * m, 2 * heads
    for s, scale in ((s_k, 1 / 64), (s_v, 1 / 50)):
        D = F.normalize(torch.randn(N, M, device=DEVICE), dim=-1).to(DTYPE)
        codes.append(CODINGS[coding](D, torch.tensor(scale, device=DEVICE), s, batch, 2))
        codes[-1].reserve(coded + 5)
        if coded:
            Y = 64 * torch.randn(1, batch * 2 * coded, M, device=DEVICE)
            parts = codes[-1].encode(D[None], Y, s, omp)
            codes[-1].write(torch.arange(coded, device=DEVICE), parts)
    q = 3 * torch.randn(batch, H * G, 1, m, device=DEVICE).to(DTYPE)
    keys, values = torch.randn(2, batch, H, 20, m, device=DEVICE).to(DTYPE)
    seen = torch.arange(20, device=DEVICE)[None] % 7 > 0
    return q, *codes, torch.tensor(coded, device=DEVICE), keys, values, seen

@pytest.mark.parametrize("m, N, s_k, s_v, G, batch, coded, coding, heads", SHAPES[
    "fused attention"] + CUDA * SHAPES["fused attention on a GPU"] + CUDA * [
    (m, N, s, 33 - s, G, batch, coded, coding, heads)
    for m, N, batch in ((64, 512, 32), (128, 1024, 3), (128, 4096, 1))
    for s, G, heads in ((1, 1, 1), (8, 4, 1), (32, 8, 1), (12, 4, 2), (25, 1, 2), (11, 2, 3))
    for coded in (1, 255, 257, 1025, 9000 // batch) for coding in CODINGS])
def test_attention_equals_the_readable_one(chip, m, N, s_k, s_v, G, batch, coded, coding, heads):
    arguments = problem(m, N, s_k, s_v, G, batch, coded, coding, heads)
    fused = kernels.attend_fused if CUDA else kernels.attention.launch
    out, readable = fused(*arguments), attend_codes(*arguments)
    worst = ((out - readable).float().norm(dim=-1) / readable.float().norm(dim=-1)).max()
    assert out.shape == readable.shape and out.dtype == readable.dtype and worst < 1e-2
    assert torch.equal(out, fused(*arguments))  # the same bits every time

@pytest.mark.skipif(CUDA, reason="on a GPU the tests above compile codes.cu")
@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc: codes.cu was not compiled")
@pytest.mark.parametrize("s, G, heads, arch", [(1, 1, 1, 80), (33, 8, 1, 90), (12, 3, 3, 80)])
@pytest.mark.parametrize("coding", CODINGS)
def test_codes_cu_compiles(chip, monkeypatch, tmp_path, s, G, heads, arch, coding):
    def compiled(shared, **constants):
        subprocess.run(["nvcc", f"-arch=sm_{arch}", "-cubin", "-o", tmp_path / "kernel",
                        ROOT / "kernels/codes.cu",
                        *(f"-D{name}={value}" for name, value in constants.items())], check=True)
        return lambda *arguments: None

    monkeypatch.setattr(kernels.attention, "compile_codes_cu", compiled)
    kernels.attention.launch(*problem(64, 64, s, s, G, 1, 0, coding, heads))
    assert (tmp_path / "kernel").exists()

@pytest.mark.skipif(CUDA, reason="on a GPU the tests above compile the Triton kernels")
def test_triton_kernels_compile(monkeypatch):
    """The interpreter takes what the compiler does not, such as a variable that changes type."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels were not compiled")
    script = f"""
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kernels import attention, omp
for file, kernel, types, constants in {SHAPES["Triton"]}:
    function, types = getattr(globals()[file], kernel), types.split()
    signature = dict(zip(function.arg_names, types + ["constexpr"] * len(constants)))
    constants = dict(zip(function.arg_names[len(types):], constants))
    assert compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
"""
    monkeypatch.delenv("TRITON_INTERPRET")
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)

# ---- Where no kernel serves ----------------------------------------------------------------------

def test_one_line_says_why_no_kernel_serves(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not any(kernels.kernels_serve(torch.device("cuda", 98)) for _ in range(2))
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("LEXICO_KERNELS", "0")
    assert not kernels.kernels_serve(torch.device("cuda", 99)) and not capsys.readouterr().err

# ---- Recorded steps ------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, end", [
    (True, "may_record run replay replay count"), (False, "may_record run run")])
def test_recorded_counts_what_replays_do_not(answer, end, monkeypatch):
    log = Mock(may_record=Mock(return_value=answer))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: log)  # whose replay is logged, too
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: torch.no_grad())
    step = Replayed(log.run, log.count, log.may_record)
    for _ in range(4):
        step()
    assert [name for name, *_ in log.method_calls] == ["run", "run", *end.split()]

@pytest.mark.skipif(not CUDA, reason="there is no GPU: no step was recorded as a CUDA graph")
@pytest.mark.parametrize("sparse", [False, True])
def test_recorded_steps_give_what_steps_one_by_one_give(sparse):
    model, runs = Llama.from_pretrained("tiny", DEVICE), []
    d = Dictionaries.load(Dictionaries.find("tiny"), DEVICE, torch.bfloat16)
    prompt = torch.randint(4096, (2, 50), device=DEVICE)
    for record in (False, True):
        cache = (SparseCache(model.config, d, d.allocate(0.2, "word"), 32, 4, batch=2, capacity=150)
                 if sparse else DenseCache(model.config, 2, 150, dtype=torch.bfloat16))
        steps = generate(model, cache, prompt, 60, lambda logits: logits.argmax(-1), record)
        runs.append(torch.stack([step["logits"] for step in steps]))
        assert cache.length == 109 and cache.replayable
    torch.testing.assert_close(*runs)

# ---- Compiled layers -----------------------------------------------------------------------------

@pytest.mark.skipif(not (CUDA or shutil.which("g++")), reason="torch.compile finds no compiler")
def test_compiled_layers_serve_single_tokens_and_change_no_logits(monkeypatch):
    model, lengths, real = Llama.from_pretrained("tiny", DEVICE, torch.float32), [], torch.compile

    def run():
        cache, tokens = DenseCache(model.config, device=DEVICE), torch.arange(12, device=DEVICE)
        with torch.inference_mode():
            return [model(part[None], cache) for part in tokens.split([8, 1, 1, 2])]

    def watched(method, **options):
        compiled = real(method, **options)
        return lambda layer, x, *more: lengths.append(x.shape[1]) or compiled(layer, x, *more)

    eager = run()
    monkeypatch.setattr(torch, "compile", watched)
    for name in ("before_attention", "after_attention"):  # for the end of the test to restore them
        monkeypatch.setattr(Layer, name, getattr(Layer, name))
    compile_layers.__wrapped__()
    torch.testing.assert_close(run(), eager, rtol=1e-3, atol=1e-3)
    assert lengths == [1] * 2 * 6 * 2  # tokens, layers, methods
