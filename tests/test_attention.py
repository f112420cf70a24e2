"""The Triton kernel against masked softmax in float64. Without a GPU Triton's interpreter runs it on the CPU, where bfloat16 is not to be trusted: left out."""
import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import model as flash
from model import flash_attention

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(B, H, KV, T, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(B, heads, T, D, generator=g).to(dtype)
    return make(H), make(KV), make(KV), make(H)                 # q, k, v, do


def starts_of(lengths, T):
    """Conversations of these lengths, again and again until T -> (T,) first position of each position's conversation."""
    starts, at = [], 0
    while at < T:
        n = lengths.pop(0) if len(lengths) > 1 else lengths[0]
        starts += [at] * n
        at += n
    return torch.tensor(starts[:T], dtype=torch.int32)


STARTS = {
    "none": lambda T: None,
    "one": lambda T: torch.zeros(T, dtype=torch.int32),
    "edges": lambda T: starts_of([64], T),                      # of every tile size there is
    "edges 128": lambda T: starts_of([128], T),
    "inside": lambda T: starts_of([3, 37, 1, 90, 11], T),
    "alone": lambda T: torch.arange(T, dtype=torch.int32),
    "sliding": lambda T: (torch.arange(T) - 40).clamp(min=0).int(),     # more than asked for: a window
}


def eager(q, k, v, starts=None):
    """Masked softmax in float64, keys repeated."""
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    t = torch.arange(T)
    starts = torch.zeros(B, T, dtype=torch.int32) if starts is None else starts
    visible = (t[None, None, :] >= starts[:, :, None]) & (t[None, None, :] <= t[None, :, None])      # (B, T, T)
    s = (q @ k.transpose(-1, -2)) / math.sqrt(D)
    return s.masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ v


def gradients(f, q, k, v, do, starts, dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    o = f(q, k, v, starts)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do.to(dtype))]


def check(q, k, v, do, starts, tolerance):
    got, want = gradients(flash_attention, q, k, v, do, starts, q.dtype), gradients(eager, q, k, v, do, starts, torch.float64)
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, want):
        assert x.dtype == q.dtype and x.shape == y.shape and x.isfinite().all(), name
        error = ((x.double() - y).abs().max() / y.abs().max().clamp(min=1)).item()        # dq = dk = 0 where each token is alone
        key = q.dtype, name, "large scores" if tolerance not in TOLERANCE.values() else ""
        ERRORS[key] = max(ERRORS.get(key, 0), error)
        assert error < tolerance, f"{name}: {error:.2e}"


ERRORS = {}
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1.5e-3}


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nlargest error / largest value:", {" ".join(map(str, key)): f"{e:.1e}" for key, e in ERRORS.items()})


CASES = [                                                        # B, T, H, KV, D, starts
    *[(1, T, 1, 1, 16, s) for T in (1, 5, 63, 64, 65, 130, 200) for s in ("none", "inside")],
    *[(1, T, 1, 1, 64, s) for T in (65, 130) for s in STARTS if s not in ("none", "inside")],
    *[(1, 70, 4, KV, 16, "inside") for KV in (4, 2, 1)],
    (1, 130, 2, 1, 64, "inside"), (1, 130, 1, 1, 128, "none"), (1, 70, 2, 2, 128, "inside"), (1, 65, 4, 2, 32, "edges"),
]


@pytest.mark.parametrize("B, T, H, KV, D, kind", CASES)
def test_float32(B, T, H, KV, D, kind):
    q, k, v, do = tensors(B, H, KV, T, D)
    starts = STARTS[kind](T)
    check(q, k, v, do, starts if starts is None else starts.expand(B, T), TOLERANCE[torch.float32])


HALF = [                                                         # the tiles of the tensor cores: 128 and 64
    *[(1, T, 2, 1, 64, s) for T in (1, 63, 65, 130, 200) for s in ("none", "inside")],
    *[(1, 300, 4, 2, 64, s) for s in STARTS], *[(1, 300, 2, 2, 128, s) for s in ("none", "inside", "edges", "alone")], (1, 200, 4, 1, 128, "inside"),
]


@pytest.mark.parametrize("B, T, H, KV, D, kind", HALF)
def test_float16(B, T, H, KV, D, kind):
    q, k, v, do = tensors(B, H, KV, T, D, torch.float16)
    starts = STARTS[kind](T)
    check(q, k, v, do, starts if starts is None else starts.expand(B, T), TOLERANCE[torch.float16])


def test_rows_of_a_batch_have_their_own_starts():
    T = 100
    q, k, v, do = tensors(3, 1, 1, T, 16)
    check(q, k, v, do, torch.stack([STARTS[kind](T) for kind in ("inside", "one", "alone")]), TOLERANCE[torch.float32])


def test_batch_without_starts():
    check(*tensors(2, 2, 2, 70, 16), None, TOLERANCE[torch.float32])


def test_transposed_inputs_and_gradient():
    """(B, T, heads, D) projections seen as (B, heads, T, D), and the stride-0 gradient of a sum."""
    q, k, v, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(1, 2, 1, 40, 16))
    assert not q.is_contiguous()
    check(q, k, v, do, None, TOLERANCE[torch.float32])
    check(q, k, v, torch.ones(()).expand(q.shape), None, TOLERANCE[torch.float32])
    wide = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(1))[..., ::4]                # no stride of q, k and v the same
    q, k, _, do = tensors(1, 2, 2, 40, 16)
    check(q.transpose(1, 2).contiguous().transpose(1, 2), k, wide, do, None, TOLERANCE[torch.float32])
    check(wide, k, q, do.transpose(2, 3).contiguous().transpose(2, 3), None, TOLERANCE[torch.float32])


def test_large_scores_do_not_overflow():
    q, k, v, do = tensors(1, 1, 1, 100, 16)
    check(q * 30, k * 30, v, do, STARTS["inside"](100)[None], 2e-3)


def test_half_precision_accumulates_in_float32():
    """Sums of 32000 and of 6.4: float16 has no number between 32000 and 32016."""
    T = 260
    q = torch.zeros(1, 1, T, 64, dtype=torch.float16)
    v = torch.full_like(q, 0.1)
    v[:, :, :64], v[:, :, 128:192] = 500, -500
    o, want = flash_attention(q, q, v)[:, :, 192:], eager(q.double(), q.double(), v.double())[:, :, 192:]
    assert torch.allclose(o.double(), want, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype, T, D, cut", [(torch.float32, 120, 16, 64), (torch.float16, 300, 64, 128), (torch.float16, 300, 128, 128)])
def test_tiles_of_other_conversations_are_not_read(dtype, T, D, cut):
    """NaN in a masked entry of a tile spreads (0 · NaN), so a finite result shows that the tile was never multiplied."""
    starts = torch.where(torch.arange(T) < cut, 0, cut).int()[None]
    q, k, v, do = tensors(1, 1, 1, T, D, dtype)
    clean = gradients(flash_attention, q, k, v, do, starts, dtype)
    before, after = torch.arange(T) < cut, torch.arange(T) >= cut

    poison = lambda x, where: x.masked_fill(where[:, None], torch.nan)
    o, dq, _, _ = gradients(flash_attention, q, poison(k, before), poison(v, before), do, starts, dtype)
    assert torch.equal(o[:, :, after], clean[0][:, :, after]) and torch.equal(dq[:, :, after], clean[1][:, :, after])
    assert o[:, :, before].isnan().all()

    _, _, dk, dv = gradients(flash_attention, poison(q, after), k, v, poison(do, after), starts, dtype)
    assert torch.equal(dk[:, :, before], clean[2][:, :, before]) and torch.equal(dv[:, :, before], clean[3][:, :, before])
    assert dk[:, :, after].isnan().all()


def test_the_future_is_not_read():
    T, cut = 100, 64
    q, k, v, do = tensors(1, 1, 1, T, 16)
    after = (torch.arange(T) >= cut)[:, None]
    clean = gradients(flash_attention, q, k, v, do, None, torch.float32)
    o, dq, _, _ = gradients(flash_attention, q, k.masked_fill(after, torch.nan), v.masked_fill(after, torch.nan), do, None, torch.float32)
    assert torch.equal(o[:, :, :cut], clean[0][:, :, :cut]) and torch.equal(dq[:, :, :cut], clean[1][:, :, :cut])
    _, _, dk, dv = gradients(flash_attention, q.masked_fill(~after, torch.nan), k, v, do.masked_fill(~after, torch.nan), None, torch.float32)
    assert torch.equal(dk[:, :, cut:], clean[2][:, :, cut:]) and torch.equal(dv[:, :, cut:], clean[3][:, :, cut:])


def test_whole_tiles_are_not_masked_and_invisible_ones_not_walked():
    """The phases, counted against the mask itself: outside them nothing is visible, in the middle one everything is."""
    T = 300
    for kind in STARTS:
        starts = torch.zeros(T, dtype=torch.int32) if STARTS[kind](T) is None else STARTS[kind](T)
        t = torch.arange(T)
        visible = (t[None, :] >= starts[:, None]) & (t[None, :] <= t[:, None])
        ends = torch.searchsorted(starts, t.int(), right=True).int() - 1
        for BM, BN in ((32, 32), (128, 64), (64, 128)):
            for phases, rows, A, S in ((flash._key_phases, visible, BM, BN), (flash._query_phases, visible.T, BN, BM)):
                for a in range(0, T, A):
                    lo, whole, edge, hi = phase_values(phases, starts if rows is visible else ends, a, T, BM, BN)
                    tile = rows[a:a + A]
                    assert lo <= whole <= edge <= hi <= T and lo % S == 0
                    assert whole == edge or whole % S == 0 and edge % S == 0
                    assert not tile[:, :lo].any() and not tile[:, hi:].any(), (kind, a)
                    assert tile[:, whole:edge].all(), (kind, a)
                    for x in [*range(lo, whole, S), *range(edge, hi, S)]:
                        assert x + S > T or not tile[:, x:x + S].all(), (kind, a, x)
                    assert tile[:, lo:lo + S].any() and tile[:, (hi - 1) // S * S:hi].any(), (kind, a)


if flash.triton:
    import triton
    import triton.language as tl

    @triton.jit
    def _phases_kernel(FUNCTION: tl.constexpr, edges, out, a, T, BM: tl.constexpr, BN: tl.constexpr):
        w, x, y, z = FUNCTION(edges, a, T, BM, BN)
        tl.store(out, w), tl.store(out + 1, x), tl.store(out + 2, y), tl.store(out + 3, z)

    def phase_values(function, edges, a, T, BM, BN):
        out = torch.empty(4, dtype=torch.int32)
        _phases_kernel[(1,)](function, edges, out, a, T, BM, BN)
        return out.tolist()


def test_bad_shapes_are_errors():
    for q, k in ((torch.zeros(1, 2, 4, 24), torch.zeros(1, 2, 4, 24)), (torch.zeros(1, 3, 4, 16), torch.zeros(1, 2, 4, 16))):
        with pytest.raises(flash.UserError, match="needs a head size"):
            flash_attention(q, k, k)


@pytest.mark.parametrize("path", ["eager", "sdpa", "blocked", "triton"])
@pytest.mark.parametrize("kind", ["none", "inside"])
def test_all_paths_of_a_model_agree(path, kind):
    torch.manual_seed(0)
    model = flash.Transformer(flash.llama(2, 2, 32, 40, n_kv_head=1, vocab_size=50, context=80), attention_path=path).initialize(0)
    reference = flash.Transformer(model.config, attention_path="eager")
    reference.load_state_dict(model.state_dict())
    ids, targets, weights = torch.randint(0, 50, (2, 70)), torch.randint(0, 50, (2, 70)), torch.rand(2, 70)
    starts = STARTS[kind](70)
    starts = starts if starts is None else starts.expand(2, 70)
    grads = []
    for m in (model, reference):
        m(ids, targets, weights, starts).backward()
        grads.append([p.grad for p in m.parameters()])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in zip(*grads))


def test_a_conversation_does_not_see_the_one_before_it():
    model = flash.Transformer(flash.llama(1, 2, 32, 40, vocab_size=50, context=80)).initialize(0)
    ids = torch.randint(0, 50, (1, 30))
    other = torch.cat([(ids[:, :10] + 1) % 50, ids[:, 10:]], 1)
    starts = torch.where(torch.arange(30) < 10, 0, 10).int()[None]
    a, b = model.hidden(ids, starts=starts), model.hidden(other, starts=starts)
    assert torch.equal(a[:, 10:], b[:, 10:]) and not torch.equal(model.hidden(ids)[:, 10:], model.hidden(other)[:, 10:])
