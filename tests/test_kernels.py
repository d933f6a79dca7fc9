"""The GPU's kernels against the readable functions: on a GPU; without one, in Triton's interpreter
at small sizes, where a few lines of torch stand in for codes.cu. Then the Triton kernels are
compiled, too, though they cannot run, and so is codes.cu, if there is nvcc."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from generate import generate
from kernels.graphs import Recorded, compile_layers
from lexico import CODINGS, DenseCache, Dictionaries, SparseCache, attend_codes
from model import Layer, Llama, best_device
from omp import basis, omp, pursue, relative_error, solve

DEVICE = best_device()
CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
ROOT = Path(__file__).parent.parent

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

@pytest.mark.parametrize("m, N, sparsity, B", [
    (64, 320, 5, 33), (128, 256, 1, 1), (192, 128, 5, 3), (256, 64, 9, 1)] + CUDA * [
    (m, N, s, B) for m in (64, 128, 192, 256) for N in (512, 1024, 4096) for s in (1, 8, 33)
    for B in (1, 7, 1000)] + CUDA * [(256, 2048, 100, B) for B in (1, 60, 300)])
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
        for indices, z, *e in (fused(D, Y, sparsity, bits), solve(D.float(), *found, bits)):
            z = z * torch.exp2(e[0] / 16 - 8) if e else z
            assert (z[:, 0] == 0).all() and 0 <= indices.min() <= indices.max() < N
            errors.append(relative_error(D.float(), Y, indices, z)[:, 2:].flatten())
            refit = solve(D.float(), *basis(D.float(), Y, indices))
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
        self.LARGEST = 1 << (self.BITS - 1) if self.BITS else 448

    def decode(self, words, seconds):
        """Coefficients (B, H, T, N) in steps, and the step sizes (B, H, T)."""
        words, coefficients = words.int() & 0xFFFF, seconds.float()
        steps = torch.ones(words.shape[:3])
        if self.BITS:
            coefficients = ((words % (2 * self.LARGEST)) ^ self.LARGEST) - self.LARGEST
            steps = torch.exp2(seconds.float() / 16 - 8)[..., 0]
        dense = torch.zeros(*words.shape[:3], self.N)
        return dense.scatter_add_(3, (words >> self.BITS).long(), coefficients.float()), steps

    def __call__(self, grid, block, arguments, shared):
        products, *parts, compressed, capacity, stats, tables = arguments
        assert shared <= 100_000 - 256
        n = compressed.item()
        keys, key_steps = self.decode(*(part[:, :, :n] for part in parts[:2]))
        values, value_steps = self.decode(*(part[:, :, :n] for part in parts[2:]))
        assert grid == (self.CHUNKS, keys.shape[0] * keys.shape[1], 1)
        products = products.view(*keys.shape[:2], self.R, self.N).float()
        scores = keys @ products.mT * key_steps[..., None]  # (B, H, T, R)
        length = max(-(-n // self.CHUNKS), self.SHORTEST)
        for chunk, start in enumerate(range(0, n, length)):
            part = slice(start, start + length)
            top = scores[:, :, part].amax(2, keepdim=True)  # (B, H, 1, R)
            weights = torch.exp2(scores[:, :, part] - top)  # (B, H, T, R)
            scaled = weights * value_steps[:, :, part, None]
            table = scaled.mT @ values[:, :, part] / weights.sum(2)[..., None]  # (B, H, R, N)
            tables[:, chunk] = table.flatten(0, 2)
            numbers = torch.stack((top[:, :, 0], weights.sum(2)), -1)
            stats.view(-1, self.CHUNKS + 1, 2)[:, chunk + 1] = numbers.flatten(0, 2)

def problem(m, N, s_k, s_v, G, batch, coded, coding, heads=1):
    """Arguments of attend_codes: two codes a token, of as many KV heads each, 20 dense tokens, more
    room for codes than needed."""
    torch.manual_seed(0)
    codes, M, H = [], heads * m, 2 * heads
    for s in (s_k, s_v):
        D = F.normalize(torch.randn(N, M, device=DEVICE), dim=-1).to(DTYPE)
        codes.append(CODINGS[coding](D, torch.tensor(1 / 64, device=DEVICE), s, batch, 2))
        codes[-1].reserve(coded + 5)
        if coded:
            Y = 64 * torch.randn(1, batch * 2 * coded, M, device=DEVICE)
            parts = codes[-1].encode(D[None], Y, s, omp)
            codes[-1].write(torch.arange(coded, device=DEVICE), parts)
    q = 3 * torch.randn(batch, H * G, 1, m, device=DEVICE).to(DTYPE)
    keys, values = torch.randn(2, batch, H, 20, m, device=DEVICE).to(DTYPE)
    seen = torch.arange(20, device=DEVICE)[None] % 7 > 0
    return q, *codes, torch.tensor(coded, device=DEVICE), keys, values, seen

@pytest.mark.parametrize("m, N, s_k, s_v, G, batch, coded, coding, heads", [
    (64, 192, 3, 5, 3, 2, 300, "word", 1), (128, 512, 8, 6, 4, 1, 0, "fp8", 1),
    (128, 128, 2, 4, 1, 1, 700, "fp8", 1), (64, 192, 5, 3, 3, 2, 1500, "word", 2),
    (64, 128, 3, 3, 3, 3, 800, "fp8", 3)] + CUDA * [
    (m, N, s, 33 - s, G, batch, coded, coding, heads)
    for m, N, batch in ((64, 512, 32), (128, 1024, 3), (128, 4096, 1))
    for s, G, heads in ((1, 1, 1), (8, 4, 1), (32, 8, 1), (12, 4, 2), (25, 1, 2), (11, 2, 3))
    for coded in (1, 255, 257, 1025, 9000 // batch) for coding in CODINGS] + CUDA * [
    (64, 2048, 70, 33, 3, 3, 5000, "word", 3), (64, 1024, 12, 16, 3, 1, 40_000, "fp8", 3),
    (128, 4096, 12, 100, 4, 1, 30_000, "word", 2)])
def test_attention_equals_the_readable_one(chip, m, N, s_k, s_v, G, batch, coded, coding, heads):
    arguments = problem(m, N, s_k, s_v, G, batch, coded, coding, heads)
    fused = kernels.attend_fused if CUDA else kernels.attention.launch
    out, readable = fused(*arguments), attend_codes(*arguments)
    worst = ((out - readable).float().norm(dim=-1) / readable.float().norm(dim=-1)).max()
    assert out.shape == readable.shape and out.dtype == readable.dtype and worst < 1e-2
    assert torch.equal(out, fused(*arguments))  # the same bits every time

@pytest.mark.skipif(CUDA, reason="on a GPU the tests above compile codes.cu")
@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc: codes.cu was not compiled")
@pytest.mark.parametrize("s, G, heads", [(1, 1, 1), (8, 4, 1), (33, 8, 1), (12, 3, 3)])
@pytest.mark.parametrize("coding", CODINGS)
def test_codes_cu_compiles(chip, monkeypatch, tmp_path, s, G, heads, coding):
    commands = []

    def compiled(shared, **constants):
        for arch in ("sm_80", "sm_90"):
            commands.append(["nvcc", f"-arch={arch}", "-cubin", "-o", tmp_path / arch,
                             *(f"-D{name}={value}" for name, value in constants.items()),
                             ROOT / "kernels" / "codes.cu"])
            subprocess.run(commands[-1], check=True)
        return lambda *arguments: None

    monkeypatch.setattr(kernels.attention, "compile_codes_cu", compiled)
    kernels.attention.launch(*problem(64, 64, s, s, G, 1, 0, coding, heads))
    assert len(commands) == 2

@pytest.mark.skipif(CUDA, reason="on a GPU the tests above compile the Triton kernels")
def test_triton_kernels_compile():
    """The interpreter takes what the compiler does not, such as a variable that changes type."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels were not compiled")
    script = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kernels.attention import combine, products_and_dense
from kernels.omp import omp_kernel
for kernel, types, constants in (
    (omp_kernel, "*fp32 *bf16 *bf16 *fp32 *i64 *i64 *i64 *i64 i32 i32",
     (20000, 1024, 64, 8, 8, 32, 16, 15, 2, 7.0)),
    (products_and_dense, "*bf16 *bf16 *fp32 *bf16 *bf16 *i1 *fp16 *fp32 *fp32 i32 i32 i32",
     (33, 3, 2, 64, 32, 64)),
    (combine, "*fp16 *fp32 *fp32 *fp32 *i64 *bf16 *bf16 i32", (33, 256, 64, 3, 2, 64, 256))):
    types, names = types.split(), kernel.arg_names
    signature = dict(zip(names, types + ["constexpr"] * len(constants)))
    source = ASTSource(kernel, signature, dict(zip(names[len(types):], constants)))
    print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]))
"""
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, text=True,
                         capture_output=True)
    assert run.returncode == 0 and len(run.stdout.split()) == 3, run.stderr

# ---- Where no kernel serves ----------------------------------------------------------------------

@pytest.mark.skipif(CUDA, reason="here the kernels serve")
def test_without_a_gpu_the_entry_points_leave_the_work_to_torch():
    arguments = problem(64, 64, 2, 2, 1, 1, 3, "fp8")
    assert kernels.attend_fused(*arguments) is None
    assert kernels.omp_fused(torch.randn(1, 64, 64), torch.randn(1, 3, 64), 2) is None

def test_one_line_says_why_no_kernel_serves(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for _ in range(2):
        assert not kernels.kernels_serve(torch.device("cuda", 98))
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("LEXICO_KERNELS", "0")
    assert not kernels.kernels_serve(torch.device("cuda", 99)) and not capsys.readouterr().err

def test_nothing_needs_triton_but_the_kernels():
    script = ("import sys; sys.modules['triton'] = None; import torch; from omp import omp; "
              "omp(torch.eye(64), torch.randn(3, 64), 2)")
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)

# ---- Recorded steps ------------------------------------------------------------------------------

def test_recorded_counts_what_replays_do_not(monkeypatch):
    log = []
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: torch.no_grad())
    for answer, end in ((True, ["record?", "run", "replay", "replay", "count"]),
                        (False, ["record?", "run", "run"])):
        log.clear()
        step = Recorded(lambda: log.append("run"), lambda: log.append("count"),
                        lambda: log.append("record?") or answer)
        for _ in range(4):
            step()
        assert log == ["run", "run", *end]

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
    model, tokens = Llama.from_pretrained("tiny", DEVICE, torch.float32), torch.arange(3, 15)[None]
    compile_calls, real_compile = [], torch.compile

    def run():
        cache = DenseCache(model.config, device=DEVICE)
        with torch.inference_mode():
            return torch.cat([model(part, cache) for part in tokens.to(DEVICE).split(
                [8, 1, 1, 2], dim=1)], dim=1)

    def counting_compile(method, **options):
        compiled = real_compile(method, **options)
        return lambda *arguments: compile_calls.append(method.__name__) or compiled(*arguments)

    eager = run()
    monkeypatch.setattr(torch, "compile", counting_compile)
    for name in ("before_attention", "after_attention"):  # for the end of the test to restore them
        monkeypatch.setattr(Layer, name, getattr(Layer, name))
    compile_layers.__wrapped__()
    torch.testing.assert_close(run(), eager, rtol=1e-3, atol=1e-3)
    assert len(compile_calls) == 2 * 2 * model.config.n_layers
