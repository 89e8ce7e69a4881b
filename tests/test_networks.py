"""Networks against the published EDM layout, written out here once more and independently."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from networks import MLP, UNETS, Block, Denoiser, Fourier, GroupNorm, UNet, sinusoids
from oracles import generator, shaped
from schedules import EDM, SCHEDULES

PUBLISHED = {"ddpmpp": (32, 0), "ncsnpp": (32, 0), "adm": (64, 1000)}        # size, classes
SMALL = {                                                        # the same three, small
    "ddpmpp": dict(UNETS["ddpmpp"], width=16, mult=(2, 2), blocks=2, attend=(4,)),
    "ncsnpp": dict(UNETS["ncsnpp"], width=16, mult=(1, 2, 2), blocks=1, attend=(4,)),
    "adm": dict(UNETS["adm"], width=64, mult=(1, 2), blocks=1, attend=(4,)),
}
every_kind = pytest.mark.parametrize("kind", SMALL)
every_kind_and_mlp = pytest.mark.parametrize("kind", [*SMALL, "mlp"])
close = torch.testing.assert_close


def near(a, b):
    close(a, b, rtol=1e-4, atol=1e-4)


def published(kind, **options):
    size, classes = PUBLISHED[kind]
    with torch.device("meta"):
        return UNet(size, 3, **{**UNETS[kind], "classes": classes, **options})


def small(kind, size=8, channels=3, classes=5, augment_dim=9, **options):
    """A small network in eval mode whose last layers are not zero, so that everything shows."""
    torch.manual_seed(0)
    if kind == "mlp":
        net = MLP(2, width=16, classes=classes, **options)
    else:
        options = {**SMALL[kind], "classes": classes, "augment_dim": augment_dim, **options}
        net = UNet(size, channels, **options)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p) / max(p[0].numel(), 1) ** (0 if kind == "mlp" else 0.5)
    return net.eval()


def batch(kind=None, B=4, size=8, channels=3):
    """x, c_noise, labels, augment_labels; x (B, 2) for the MLP."""
    g = generator(0)
    x = torch.randn(B, channels, size, size, generator=g)
    augment = torch.randn(B, 9, generator=g)
    x = x[:, :2, 0, 0] if kind == "mlp" else x
    return x, torch.linspace(-2, 1.5, B), torch.arange(B) % 5, augment


# ---- The published networks: names and shapes ----------------------------------------------------

# Blocks: channels in > out of the first, the second, ...; "a" with attention.  A decoder block's
# input is what came from below and one skip, the encoder's outputs from last to first.
SONG = """
    enc.32x32_block 128>256 256>256 256>256 256>256         enc.16x16_down 256>256
    enc.16x16_block 256>256a 256>256a 256>256a 256>256a     enc.8x8_down 256>256
    enc.8x8_block 256>256 256>256 256>256 256>256
    dec.8x8_in 256>256a 256>256
    dec.8x8_block 512>256 512>256 512>256 512>256 512>256       dec.16x16_up 256>256
    dec.16x16_block 512>256 512>256 512>256 512>256 512>256a    dec.32x32_up 256>256
    dec.32x32_block 512>256 512>256 512>256 512>256 384>256"""
ADM = """
    enc.64x64_block 192>192 192>192 192>192         enc.32x32_down 192>192
    enc.32x32_block 192>384a 384>384a 384>384a      enc.16x16_down 384>384
    enc.16x16_block 384>576a 576>576a 576>576a      enc.8x8_down 576>576
    enc.8x8_block 576>768a 768>768a 768>768a
    dec.8x8_in 768>768a 768>768
    dec.8x8_block 1536>768a 1536>768a 1536>768a 1344>768a       dec.16x16_up 768>768
    dec.16x16_block 1344>576a 1152>576a 1152>576a 960>576a      dec.32x32_up 576>576
    dec.32x32_block 960>384a 768>384a 768>384a 576>384a         dec.64x64_up 384>384
    dec.64x64_block 576>192 384>192 384>192 384>192"""


def blocks(table):
    """name, channels in, channels out, attention of each block."""
    for word in table.split():
        if ">" not in word:
            name, count = word, 0
        else:
            cin, cout = word.rstrip("a").split(">")
            number = "" if name.endswith(("up", "down")) else count
            yield f"{name}{number}", int(cin), int(cout), word.endswith("a")
            count += 1


def listing(kind):
    """{name: shape} of the published network's parameters and buffers."""
    adm, ncsn = kind == "adm", kind == "ncsnpp"
    taps = (1, 1, 4, 4) if ncsn else (1, 1, 2, 2)
    emb, out = (768 if adm else 512), {}

    def layer(name, *shape, bias=True):
        out[f"{name}.weight"] = shape
        if bias:
            out[f"{name}.bias"] = shape[:1]

    if adm:
        layer("map_layer0", 768, 192), layer("map_layer1", 768, 768)
        layer("map_label", 768, 1000, bias=False)
        layer("enc.64x64_conv", 192, 3, 3, 3)
        layer("out_norm", 192), layer("out_conv", 3, 192, 3, 3)
    else:
        layer("map_layer0", 512, 256 if ncsn else 128), layer("map_layer1", 512, 512)
        layer("enc.32x32_conv", 128, 3, 3, 3)
        layer("dec.32x32_aux_norm", 256), layer("dec.32x32_aux_conv", 3, 256, 3, 3)
    if ncsn:
        out["map_noise.freqs"] = (128,)
        layer("enc.16x16_aux_residual", 256, 3, 3, 3), layer("enc.8x8_aux_residual", 256, 256, 3, 3)
        out["enc.16x16_aux_residual.resample_filter"] = taps
        out["enc.8x8_aux_residual.resample_filter"] = taps
    for name, cin, cout, attention in blocks(ADM if adm else SONG):
        resampled = name.endswith(("_up", "_down"))
        layer(f"{name}.norm0", cin), layer(f"{name}.conv0", cout, cin, 3, 3)
        layer(f"{name}.affine", 2 * cout if adm else cout, emb)
        layer(f"{name}.norm1", cout), layer(f"{name}.conv1", cout, cout, 3, 3)
        if cin != cout or resampled and not adm:
            layer(f"{name}.skip", cout, cin, 1, 1)
        if resampled:
            out[f"{name}.conv0.resample_filter"] = out[f"{name}.skip.resample_filter"] = taps
        if attention:
            layer(f"{name}.norm2", cout), layer(f"{name}.qkv", 3 * cout, cout, 1, 1)
            layer(f"{name}.proj", cout, cout, 1, 1)
    return out


@pytest.mark.parametrize("kind, label, augment", [
    ("ddpmpp", {"weight": (128, 10), "bias": (128,)}, (128, 9)),
    ("ncsnpp", {"weight": (256, 10), "bias": (256,)}, (256, 9)),
    ("adm", {"weight": (768, 10)}, (192, 9))])
def test_names_and_shapes_are_those_of_the_published_networks(kind, label, augment):
    def shapes(module):
        return {name: tuple(value.shape) for name, value in module.state_dict().items()}

    net = Denoiser(published(kind), EDM().precondition)
    assert shapes(net) == {f"model.{name}": shape for name, shape in listing(kind).items()}
    net = published(kind, classes=10, augment_dim=9)
    assert shapes(net.map_label) == label and shapes(net.map_augment) == {"weight": augment}
    heads = {(m.cout, m.heads) for m in net.modules() if isinstance(m, Block) and m.heads}
    assert heads == ({(64 * n, n) for n in (6, 9, 12)} if kind == "adm" else {(256, 1)})


def test_64x64_song_network_keeps_attention_at_16_only():
    """FFHQ and AFHQ: multipliers 1-2-2-2, so 16 is neither the first nor the lowest level."""
    with torch.device("meta"):
        net = UNet(64, 3, **{**UNETS["ddpmpp"], "mult": (1, 2, 2, 2)})
    got = {name.rsplit(".", 1)[0] for name, _ in net.named_modules() if name.endswith("qkv")}
    assert got == {f"enc.16x16_block{i}" for i in range(4)} | {"dec.8x8_in0", "dec.16x16_block4"}


# ---- The published networks: the forward pass ----------------------------------------------------

def halve(x, fir, pad=1):
    """Filter and keep every second sample, along both axes; zeros (if pad) beyond the border."""
    for _ in range(2):
        if fir == (1, 1):
            x = (x[..., 0::2] + x[..., 1::2]) / 2
        else:
            x = F.pad(x, (pad, pad))
            x = (x[..., 0:-2:2] + 3 * x[..., 1:-2:2] + 3 * x[..., 2::2] + x[..., 3::2]) / 8
        x = x.transpose(2, 3)
    return x


def double(x, fir):
    """Insert zeros and filter: for [1,3,3,1], 3/4 of the nearest and 1/4 of the next sample."""
    for _ in range(2):
        left, right = F.pad(x, (1, 0))[..., :-1], F.pad(x, (0, 1))[..., 1:]
        even, odd = (x, x) if fir == (1, 1) else ((3 * x + left) / 4, (3 * x + right) / 4)
        x = torch.stack([even, odd], -1).flatten(-2).transpose(2, 3)
    return x


def attention(qkv, heads):
    """Channel (h C/heads + c) 3 + {0, 1, 2} of qkv is channel c of head h of q, k, v."""
    q, k, v = (qkv[:, i::3].unflatten(1, (heads, -1)).flatten(3) for i in range(3))
    w = (torch.einsum("bhcq,bhck->bhqk", q, k) / q.shape[2] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bhck->bhcq", w, v).reshape(len(qkv), -1, *qkv.shape[2:])


def published_forward(kind, options, p, x, c_noise, labels, augment):
    """SongUNet and DhariwalUNet from a state dict p, without a module of networks.py."""
    adm, fir = kind == "adm", options.get("fir", (1, 1))

    def conv(name, x, pad):
        return F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding=pad)

    def linear(name, x):
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    def norm(name, x):
        w, b = p[name + ".weight"], p[name + ".bias"]
        return F.group_norm(x, min(32, len(w) // 4), w, b, 1e-5 if adm else 1e-6)

    def resample(name, x):
        if name.endswith("_down"):
            return halve(x, fir)
        return double(x, fir) if name.endswith("_up") else x

    def block(name, x, emb):
        h = conv(f"{name}.conv0", resample(name, F.silu(norm(f"{name}.norm0", x))), 1)
        e = linear(f"{name}.affine", emb)[:, :, None, None]
        if adm:
            scale, shift = e[:, :h.shape[1]], e[:, h.shape[1]:]
            h = F.silu(norm(f"{name}.norm1", h) * (scale + 1) + shift)
        else:
            h = F.silu(norm(f"{name}.norm1", h + e))
        h = conv(f"{name}.conv1", h, 1)
        x = resample(name, x)
        if f"{name}.skip.weight" in p:
            x = conv(f"{name}.skip", x, 0)
        x = (x + h) * (1 if adm else 0.5 ** 0.5)
        if f"{name}.qkv.weight" in p:
            qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", x), 0)
            a = attention(qkv, x.shape[1] // 64 if adm else 1)
            x = (x + conv(f"{name}.proj", a, 0)) * (1 if adm else 0.5 ** 0.5)
        return x

    C = p["map_layer0.weight"].shape[1]
    if "map_noise.freqs" in p:
        angle = c_noise[:, None] * 2 * math.pi * p["map_noise.freqs"]
    else:
        k = torch.arange(C // 2, dtype=x.dtype)
        angle = c_noise[:, None] * (1 / 10000) ** (k / (C // 2 - (0 if adm else 1)))
    e = torch.cat([angle.cos(), angle.sin()] if adm else [angle.sin(), angle.cos()], 1)
    one_hot = F.one_hot(labels, 5).to(x.dtype)
    if not adm:
        e = e + linear("map_label", one_hot * 5 ** 0.5)
    e = F.silu(linear("map_layer0", e + linear("map_augment", augment)))
    e = linear("map_layer1", e)
    e = F.silu(e + linear("map_label", one_hot) if adm else e)

    names = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in p))
    skips, aux = [], x
    for name in (name for name in names if name.startswith("enc.")):
        if name.endswith("_conv"):
            x = conv(name, x, 1)
        elif name.endswith("_aux_residual"):
            aux = halve(F.conv2d(aux, p[name + ".weight"], padding=2), fir, pad=0)
            aux = x = (skips.pop() + aux + p[name + ".bias"][:, None, None]) / 2 ** 0.5
        else:
            x = block(name, x, e)
        skips.append(x)
    for name in (name for name in names if name.startswith("dec.") and "aux" not in name):
        x = torch.cat([x, skips.pop()], 1) if "_block" in name else x
        x = block(name, x, e)
    out = ("out_norm", "out_conv") if adm else (names[-2], names[-1])
    return conv(out[1], F.silu(norm(out[0], x)), 1)


@every_kind
def test_forward_is_that_of_the_published_network(kind):
    net = small(kind).double()
    x, c_noise, labels, augment = batch()
    args = x.double(), c_noise.double(), labels, augment.double()
    got = net(*args)
    assert got.shape == x.shape and got.std() > 0.01
    close(got, published_forward(kind, SMALL[kind], net.state_dict(), *args), rtol=1e-5, atol=1e-6)


# ---- Layers --------------------------------------------------------------------------------------

def test_the_resampling_above_is_pooling_and_nearest_neighbour_and_the_fir_keeps_constants():
    x, ones = torch.randn(2, 3, 6, 8), torch.ones(1, 3, 8, 8)
    close(halve(x, (1, 1)), F.avg_pool2d(x, 2))
    close(double(x, (1, 1)), F.interpolate(x, scale_factor=2))
    close(halve(ones, (1, 3, 3, 1))[..., 1:-1, 1:-1], torch.ones(1, 3, 2, 2))   # zeros beyond
    close(double(ones, (1, 3, 3, 1))[..., 1:-1, 1:-1], torch.ones(1, 3, 14, 14))


def test_fourier_features_have_scale_16_and_no_gradient():
    torch.manual_seed(0)
    layer = Fourier(20000)
    assert layer.freqs.std().item() == pytest.approx(16, rel=0.03) and not list(layer.parameters())


def test_group_norm_group_counts():
    for channels, groups in ((4, 1), (16, 4), (48, 12), (128, 32), (256, 32), (132, 22), (100, 25)):
        assert GroupNorm(channels, 1e-6).num_groups == groups


# ---- Initialisation ------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, bounds", [
    # Xavier uniform, +-g sqrt(6/(fan_in + fan_out)), g = 1e-5 in last layers, sqrt(.2) in qkv
    ("ddpmpp", {name: gain * (6 / fans) ** 0.5 for name, fans, gain in (
        ("map_layer0", 16 + 64, 1), ("map_label", 50 + 16, 1), ("map_augment", 9 + 16, 1),
        ("enc.8x8_conv", 27 + 144, 1), ("enc.8x8_block0.conv0", 144 + 288, 1),
        ("enc.8x8_block0.conv1", 288 + 288, 1e-5), ("enc.8x8_block0.skip", 16 + 32, 1),
        ("enc.4x4_block0.qkv", 32 + 96, 0.2 ** 0.5), ("enc.4x4_block0.proj", 32 + 32, 1e-5),
        ("dec.8x8_aux_conv", 288 + 27, 1e-5), ("enc.8x8_block1.affine", 64 + 32, 1))}),
    # U(+-1/sqrt(fan_in)), zero last layers, N(0, 1) for labels
    ("adm", {"map_layer0": 64 ** -0.5, "enc.8x8_block0.conv0": 576 ** -0.5, "map_augment": 0,
             "enc.8x8_conv": 27 ** -0.5, "enc.4x4_block0.qkv": 128 ** -0.5, "out_conv": 0,
             "enc.8x8_block0.affine": 1 / 16, "enc.8x8_block0.conv1": 0, "enc.4x4_block0.proj": 0}),
], ids=["song", "adm"])
def test_initial_weights_with_last_layers_that_are_nearly_zero(kind, bounds):
    torch.manual_seed(0)
    p = dict(UNet(8, 3, **{**SMALL[kind], "classes": 50, "augment_dim": 9}).named_parameters())

    def has_bound(name, bound):
        return 0.9 * bound <= p[name].abs().max().item() <= bound * (1 + 1e-6)

    for name, bound in bounds.items():
        assert has_bound(f"{name}.weight", bound), name
        assert f"{name}.bias" not in p or has_bound(f"{name}.bias", bound if kind == "adm" else 0)
    assert p["enc.8x8_block0.norm0.weight"].eq(1).all()
    assert kind != "adm" or p["map_label.weight"].std().item() == pytest.approx(1, abs=0.03)


# ---- Denoiser ------------------------------------------------------------------------------------

class Recorder(torch.nn.Module):
    """F(x, c_noise) = tanh(x) + c_noise, remembering what it was given."""

    def forward(self, x, c_noise, labels=None, augment_labels=None):
        self.seen = x, c_noise
        return x.tanh() + shaped(c_noise, x)


@pytest.mark.parametrize("row", SCHEDULES)
def test_denoiser_is_edm_eq_7_for_every_schedule(row):
    """D = c_skip x + c_out F(c_in x; c_noise), sigma 0-d or one per sample."""
    schedule, model, x = SCHEDULES[row](), Recorder(), 2 * batch()[0]
    net, sigma = Denoiser(model, schedule.precondition), shaped([0.05, 0.5, 2.0, 30.0], x)
    c_skip, c_out, c_in, c_noise = schedule.precondition(sigma)
    got = net(x, sigma)
    assert torch.equal(model.seen[0], c_in * x) and torch.equal(model.seen[1], c_noise.view(4))
    close(got, c_skip * x + c_out * ((c_in * x).tanh() + c_noise))
    for number in (0.7, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)):
        assert torch.equal(net(x, number), net(x, shaped([0.7] * 4, x)))
        assert model.seen[1].shape == (4,)


@pytest.mark.parametrize("kind", ["ddpmpp", "adm", "mlp"])
def test_the_second_head_is_given_as_it_is_and_does_not_train_the_features(kind):
    net, x = small(kind, head=True), batch(kind)[0]
    D, h = Denoiser(net, EDM().precondition)(x, torch.tensor(0.5), head=True)
    assert torch.equal(Denoiser(net, EDM().precondition)(x, torch.tensor(0.5)), D)
    c_in, c_noise = EDM().precondition(torch.tensor(0.5))[2:]
    close(h, net(c_in * x, c_noise.expand(4))[:, x.shape[1]:])             # without c_skip, c_out
    cast = Denoiser(net, EDM().precondition, amp=torch.bfloat16)(x, torch.tensor(0.5), head=True)
    assert cast[0].dtype == cast[1].dtype == torch.float32
    h.sum().backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"head.weight", "head.bias"}


def test_under_autocast_or_with_amp_f_runs_in_bf16_and_the_arithmetic_around_it_in_float32():
    x, sigma = batch()[0], shaped([0.002, 0.3, 1.0, 80.0], batch()[0])
    c_skip, c_out, c_in, _ = EDM().precondition(sigma)
    net = Denoiser(Recorder(), EDM().precondition)
    want = net(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, sigma), want) and net.model.seen[0].dtype == torch.float32
    rounded = Denoiser(lambda x, *_: x.bfloat16(), EDM().precondition)
    assert torch.equal(rounded(x, sigma), c_skip * x + c_out * (c_in * x).bfloat16().float())
    for kind in SMALL:
        model = small(kind)
        want = Denoiser(model, EDM().precondition)(x, sigma)
        got = Denoiser(model, EDM().precondition, amp=torch.bfloat16)(x, sigma)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(Denoiser(model, EDM().precondition)(x, sigma), got)
        assert got.dtype == torch.float32 and not torch.equal(got, want)
        assert ((got - want) / c_out).norm() < 0.05 * ((want - c_skip * x) / c_out).norm()


def test_denoiser_gives_float32_for_bf16_and_float64_for_float64():
    x, sigma = batch()[0], torch.tensor(0.5)
    for kind in SMALL:
        net = Denoiser(small(kind), EDM().precondition)
        want = net(x, sigma, torch.arange(4))
        assert net(x.bfloat16(), sigma).dtype == torch.float32
        close(net(x.bfloat16(), sigma), net(x.bfloat16().float(), sigma))
        got = net.double()(x.double(), sigma.double(), torch.arange(4))
        assert got.dtype == torch.float64
        close(got.float(), want, rtol=1e-3, atol=1e-4)


@every_kind_and_mlp
def test_a_sample_does_not_depend_on_its_batch_mates_and_gradients_reach_every_parameter(kind):
    net, args = small(kind), batch(kind)
    near(net(*args)[1:2], net(*(a[1:2] for a in args)))
    (net(*args) ** 2).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


# ---- Labels, dropout -----------------------------------------------------------------------------

@every_kind_and_mlp
def test_labels_none_and_minus_1_are_no_class_and_classes_matter(kind):
    net, (x, c_noise, _, _) = small(kind), batch(kind)
    none, *classes = (net(x, c_noise, torch.full((4,), i)) for i in range(-1, 5))
    assert torch.equal(net(x, c_noise), none)
    for one, other in itertools.combinations([none, *classes], 2):
        assert (one - other).flatten(1).norm(dim=1).min() > 1e-3
    mixed = net(x, c_noise, torch.tensor([2, -1, 0, 4]))
    near(mixed, torch.stack([classes[2][0], none[1], classes[0][2], classes[4][3]]))


@every_kind
def test_augment_labels_matter_and_none_is_zero(kind):
    net, (x, c_noise, labels, augment) = small(kind), batch()
    none = net(x, c_noise, labels)
    close(net(x, c_noise, labels, torch.zeros(4, 9)), none)
    assert (net(x, c_noise, labels, augment) - none).flatten(1).norm(dim=1).min() > 1e-3
    plain = small(kind, augment_dim=0)                    # a network without the layer ignores them
    assert torch.equal(plain(x, c_noise, labels, augment), plain(x, c_noise, labels))


@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_label_dropout_drops_its_share_in_training_only(kind):
    net, B = small(kind, label_dropout=0.3), 4000
    c_noise, labels = torch.zeros(B), torch.full((B,), 2)
    with_label = net.embed(c_noise[:1], labels[:1], None)
    without = net.embed(c_noise[:1], None, None)
    close(net.embed(c_noise, labels, None), with_label.expand(B, -1))
    torch.manual_seed(1)
    got = net.train().embed(c_noise, labels, None)
    dropped = (got - without).abs().amax(1) < 1e-4
    kept = (got - with_label).abs().amax(1) < 1e-4
    assert (dropped ^ kept).all()
    assert abs(dropped.double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / B) ** 0.5


@every_kind
def test_dropout_acts_in_training_only(kind):
    args, net, without = batch(), small(kind, dropout=0.5), small(kind)
    assert torch.equal(net(*args), without(*args))
    net.train(), torch.manual_seed(1)
    one, other = net(*args), net(*args)
    assert not torch.allclose(one, other) and not torch.allclose(one, without(*args))
    torch.manual_seed(1)
    assert torch.equal(net(*args), one)
    assert torch.equal(without.train()(*args), without.eval()(*args))


# ---- Sizes ---------------------------------------------------------------------------------------

def test_a_size_that_does_not_divide_is_one_sentence_and_one_that_does_works():
    with pytest.raises(ValueError, match="^3 levels need a size divisible by 4, not 30$"):
        UNet(30, 3, mult=(1, 2, 2))
    net = small("ddpmpp", size=30, channels=1)                            # two levels, gray
    assert net(*batch(size=30, channels=1)).shape == (4, 1, 30, 30)
    net = UNet(16, 3, **UNETS["unet"])
    assert net(*batch(size=16)[:2]).shape == (4, 3, 16, 16)


@pytest.mark.parametrize("dim, classes, given", [(2, 0, {}), (64, 5, {}),
                                                 (2, 5, {"activation": torch.tanh})])
def test_mlp_is_its_formula(dim, classes, given):
    torch.manual_seed(0)
    net, activation = MLP(dim, 16, 2, classes, **given), given.get("activation", F.silu)
    x, c_noise, labels = torch.randn(6, dim), torch.linspace(-2, 1, 6), torch.arange(6) % 5
    assert net(x, c_noise, labels).eq(0).all()                            # at the start
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    h = torch.cat([x, sinusoids(c_noise, 16), F.one_hot(labels, 5)[:, :classes].float()], 1)
    for i in range(2):
        h = activation(h @ net.hidden[i].weight.T + net.hidden[i].bias)
    near(net(x, c_noise, labels), h @ net.out.weight.T + net.out.bias)
