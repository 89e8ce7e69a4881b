"""Networks against the published EDM layout, written out here once more and independently."""

import math

import pytest
import torch
import torch.nn.functional as F

import networks
from networks import MLP, UNETS, Block, Conv, Denoiser, Fourier, UNet, sinusoids
from schedules import EDM, SCHEDULES

PUBLISHED = {"ddpmpp": (32, 0), "ncsnpp": (32, 0), "adm": (64, 1000)}        # size, classes
SMALL = {                                                        # the same three, small
    "ddpmpp": dict(UNETS["ddpmpp"], width=16, mult=(2, 2), blocks=2, attend=(4,)),
    "ncsnpp": dict(UNETS["ncsnpp"], width=16, mult=(1, 2, 2), blocks=1, attend=(4,)),
    "adm": dict(UNETS["adm"], width=64, mult=(1, 2), blocks=1, attend=(4,)),
}


def published(kind, **options):
    size, classes = PUBLISHED[kind]
    with torch.device("meta"):
        return UNet(size, 3, **{**UNETS[kind], "classes": classes, **options})


def small(kind, size=8, channels=3, classes=5, augment_dim=9, **options):
    """A small network in eval mode whose last layers are not zero, so that everything shows."""
    torch.manual_seed(0)
    options = dict(SMALL[kind], classes=classes, augment_dim=augment_dim, **options)
    net = UNet(size, channels, **options)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p) / max(p[0].numel(), 1) ** 0.5
    return net.eval()


def batch(B=4, size=8, channels=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, channels, size, size, generator=g, dtype=dtype)
    return x, torch.linspace(-2, 1.5, B, dtype=dtype), torch.arange(B) % 5, \
        torch.randn(B, 9, generator=g, dtype=dtype)


# ---- The published networks: names, shapes, counts -----------------------------------------------

@pytest.mark.parametrize("kind, millions", [("ddpmpp", 55.7), ("ncsnpp", 56.4), ("adm", 296)])
def test_parameter_counts_of_the_published_networks(kind, millions):
    count = sum(p.numel() for p in published(kind).parameters())
    assert round(count / 1e6, 1 if millions < 100 else 0) == millions


# name: channels in, out, and "a" with attention.  A decoder block's input is what came from below
# and one skip, the encoder's outputs from last to first.
SONG = {
    "enc.32x32_block0": (128, 256, ""), "enc.32x32_block1": (256, 256, ""),
    "enc.32x32_block2": (256, 256, ""), "enc.32x32_block3": (256, 256, ""),
    "enc.16x16_down": (256, 256, ""),
    "enc.16x16_block0": (256, 256, "a"), "enc.16x16_block1": (256, 256, "a"),
    "enc.16x16_block2": (256, 256, "a"), "enc.16x16_block3": (256, 256, "a"),
    "enc.8x8_down": (256, 256, ""),
    "enc.8x8_block0": (256, 256, ""), "enc.8x8_block1": (256, 256, ""),
    "enc.8x8_block2": (256, 256, ""), "enc.8x8_block3": (256, 256, ""),
    "dec.8x8_in0": (256, 256, "a"), "dec.8x8_in1": (256, 256, ""),
    "dec.8x8_block0": (512, 256, ""), "dec.8x8_block1": (512, 256, ""),
    "dec.8x8_block2": (512, 256, ""), "dec.8x8_block3": (512, 256, ""),
    "dec.8x8_block4": (512, 256, ""),
    "dec.16x16_up": (256, 256, ""),
    "dec.16x16_block0": (512, 256, ""), "dec.16x16_block1": (512, 256, ""),
    "dec.16x16_block2": (512, 256, ""), "dec.16x16_block3": (512, 256, ""),
    "dec.16x16_block4": (512, 256, "a"),
    "dec.32x32_up": (256, 256, ""),
    "dec.32x32_block0": (512, 256, ""), "dec.32x32_block1": (512, 256, ""),
    "dec.32x32_block2": (512, 256, ""), "dec.32x32_block3": (512, 256, ""),
    "dec.32x32_block4": (384, 256, ""),
}
ADM = {
    "enc.64x64_block0": (192, 192, ""), "enc.64x64_block1": (192, 192, ""),
    "enc.64x64_block2": (192, 192, ""),
    "enc.32x32_down": (192, 192, ""), "enc.32x32_block0": (192, 384, "a"),
    "enc.32x32_block1": (384, 384, "a"), "enc.32x32_block2": (384, 384, "a"),
    "enc.16x16_down": (384, 384, ""), "enc.16x16_block0": (384, 576, "a"),
    "enc.16x16_block1": (576, 576, "a"), "enc.16x16_block2": (576, 576, "a"),
    "enc.8x8_down": (576, 576, ""), "enc.8x8_block0": (576, 768, "a"),
    "enc.8x8_block1": (768, 768, "a"), "enc.8x8_block2": (768, 768, "a"),
    "dec.8x8_in0": (768, 768, "a"), "dec.8x8_in1": (768, 768, ""),
    "dec.8x8_block0": (1536, 768, "a"), "dec.8x8_block1": (1536, 768, "a"),
    "dec.8x8_block2": (1536, 768, "a"), "dec.8x8_block3": (1344, 768, "a"),
    "dec.16x16_up": (768, 768, ""),
    "dec.16x16_block0": (1344, 576, "a"), "dec.16x16_block1": (1152, 576, "a"),
    "dec.16x16_block2": (1152, 576, "a"), "dec.16x16_block3": (960, 576, "a"),
    "dec.32x32_up": (576, 576, ""),
    "dec.32x32_block0": (960, 384, "a"), "dec.32x32_block1": (768, 384, "a"),
    "dec.32x32_block2": (768, 384, "a"), "dec.32x32_block3": (576, 384, "a"),
    "dec.64x64_up": (384, 384, ""),
    "dec.64x64_block0": (576, 192, ""), "dec.64x64_block1": (384, 192, ""),
    "dec.64x64_block2": (384, 192, ""), "dec.64x64_block3": (384, 192, ""),
}


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
        out["enc.16x16_aux_residual.resample_filter"] = (1, 1, 4, 4)
        out["enc.8x8_aux_residual.resample_filter"] = (1, 1, 4, 4)
    for name, (cin, cout, attention) in (ADM if adm else SONG).items():
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


@pytest.mark.parametrize("kind", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_networks(kind):
    state = {name: tuple(value.shape) for name, value in published(kind).state_dict().items()}
    assert state == listing(kind)


@pytest.mark.parametrize("kind, size, label, augment", [
    ("ddpmpp", 32, {"weight": (128, 10), "bias": (128,)}, (128, 9)),
    ("ncsnpp", 32, {"weight": (256, 10), "bias": (256,)}, (256, 9)),
    ("adm", 64, {"weight": (768, 10)}, (192, 9)),
])
def test_names_and_shapes_of_label_and_augmentation_layers(kind, size, label, augment):
    net = published(kind, classes=10, augment_dim=9)
    assert {k: tuple(v.shape) for k, v in net.map_label.state_dict().items()} == label
    got = {k: tuple(v.shape) for k, v in net.map_augment.state_dict().items()}
    assert got == {"weight": augment}


def test_64x64_song_network_keeps_attention_at_16_only():
    """FFHQ and AFHQ: multipliers 1-2-2-2, so 16 is neither the first nor the lowest level."""
    with torch.device("meta"):
        net = UNet(64, 3, **{**UNETS["ddpmpp"], "mult": (1, 2, 2, 2)})
    got = {name.rsplit(".", 1)[0] for name, _ in net.named_modules() if name.endswith("qkv")}
    assert got == {f"enc.16x16_block{i}" for i in range(4)} | {"dec.8x8_in0", "dec.16x16_block4"}


def test_denoiser_names_start_with_model_as_published():
    net = Denoiser(published("ncsnpp"), EDM().precondition)
    assert set(net.state_dict()) == {f"model.{name}" for name in listing("ncsnpp")}


@pytest.mark.parametrize("kind, heads", [("ddpmpp", {1}), ("adm", {6, 9, 12})])
def test_heads_one_in_song_and_of_64_channels_in_adm(kind, heads):
    blocks = [m for m in published(kind).modules() if isinstance(m, Block) and m.heads]
    assert {m.heads for m in blocks} == heads
    assert kind != "adm" or all(m.cout == 64 * m.heads for m in blocks)


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


def published_forward(kind, options, p, x, c_noise, labels, augment):
    """SongUNet and DhariwalUNet from a state dict p, without a module of networks.py."""
    adm, fir = kind == "adm", options["fir"] if "fir" in options else (1, 1)

    def conv(name, x, pad):
        return F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding=pad)

    def linear(name, x):
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    def norm(name, x):
        w, b = p[name + ".weight"], p[name + ".bias"]
        return F.group_norm(x, min(32, len(w) // 4), w, b, 1e-5 if adm else 1e-6)

    def resample(name, x):
        return halve(x, fir) if name.endswith("_down") else double(x, fir) \
            if name.endswith("_up") else x

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
            heads = x.shape[1] // 64 if adm else 1
            qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", x), 0)
            q, k, v = qkv.reshape(len(x) * heads, -1, 3, x.shape[2] * x.shape[3]).unbind(2)
            w = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5).softmax(2)
            a = torch.einsum("nqk,nck->ncq", w, v)
            x = (x + conv(f"{name}.proj", a.reshape(x.shape), 0)) * (1 if adm else 0.5 ** 0.5)
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


@pytest.mark.parametrize("kind", SMALL)
def test_forward_is_that_of_the_published_network(kind):
    net = small(kind).double()
    x, c_noise, labels, augment = batch(dtype=torch.float64)
    want = published_forward(kind, SMALL[kind], net.state_dict(), x, c_noise, labels, augment)
    got = net(x, c_noise, labels, augment)
    assert got.shape == x.shape and got.std() > 0.01
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_of_the_interleaved_qkv_layout(heads):
    """Channel (h C/heads + c) 3 + {0, 1, 2} of qkv is channel c of head h of q, k, v."""
    torch.manual_seed(0)
    B, C, H, W = 2, 64 * heads, 3, 4
    block = Block(C, C, 8, attention=True, adm=True)
    assert block.heads == heads
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(B, C, H, W)
    qkv = block.qkv(block.norm2(x)).reshape(B, heads, C // heads, 3, H * W)
    q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
    w = (torch.einsum("bhcq,bhck->bhqk", q, k) / (C / heads) ** 0.5).softmax(-1)
    want = block.proj(torch.einsum("bhqk,bhck->bhcq", w, v).reshape(B, C, H, W))
    torch.testing.assert_close(block.attend(x), want, rtol=1e-4, atol=1e-4)
    q, k, v = (block.qkv(block.norm2(x))[:, i::3] for i in range(3))     # the same, said otherwise
    plain = F.scaled_dot_product_attention(*(t.reshape(B, heads, C // heads, H * W).mT
                                             for t in (q, k, v))).mT.reshape(B, C, H, W)
    torch.testing.assert_close(block.attend(x), block.proj(plain), rtol=1e-4, atol=1e-4)


# ---- Layers --------------------------------------------------------------------------------------

def test_resampling_1_1_is_average_pooling_and_nearest_neighbour():
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(Conv(3, 3, 0, down=True)(x), F.avg_pool2d(x, 2))
    torch.testing.assert_close(Conv(3, 3, 0, up=True)(x), F.interpolate(x, scale_factor=2))


def test_resampling_1_3_3_1_is_the_fir_by_hand_and_keeps_constants():
    x, fir = torch.randn(2, 3, 6, 8), (1, 3, 3, 1)
    down, up = Conv(3, 3, 0, down=True, fir=fir), Conv(3, 3, 0, up=True, fir=fir)
    torch.testing.assert_close(down(x), halve(x, fir))
    torch.testing.assert_close(up(x), double(x, fir))
    ones = torch.ones(1, 3, 8, 8)
    torch.testing.assert_close(down(ones)[..., 1:-1, 1:-1], torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(up(ones)[..., 1:-1, 1:-1], torch.ones(1, 3, 14, 14))
    assert down(ones)[0, 0, 0, 0] == pytest.approx((7 / 8) ** 2)         # zeros beyond the border


@pytest.mark.parametrize("fir", [(1, 1), (1, 3, 3, 1)])
def test_order_of_convolution_and_resampling(fir):
    """Filter, then convolve; `fused` convolves at full resolution, then filters."""
    torch.manual_seed(0)
    x, plain = torch.randn(2, 3, 8, 8), Conv(3, 4, 3)
    torch.nn.init.normal_(plain.weight), torch.nn.init.normal_(plain.bias)
    for resample, options in ((halve, dict(down=True)), (double, dict(up=True))):
        conv = Conv(3, 4, 3, fir=fir, **options)
        conv.load_state_dict(plain.state_dict(), strict=False)
        torch.testing.assert_close(conv(x), plain(resample(x, fir)), rtol=1e-4, atol=1e-4)
    fused = Conv(3, 4, 3, down=True, fir=fir, fused=True)
    fused.load_state_dict(plain.state_dict(), strict=False)
    beyond = F.conv2d(x, plain.weight, plain.bias, padding=1 if fir == (1, 1) else 2)
    torch.testing.assert_close(fused(x), halve(beyond, fir, pad=0), rtol=1e-4, atol=1e-4)


def test_sinusoids_values_and_endpoint():
    got = sinusoids(torch.tensor([3.0, 0.0]), 4)
    want = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    torch.testing.assert_close(got, torch.tensor([want, [1.0, 1.0, 0.0, 0.0]]))
    want = [math.cos(3), math.cos(3e-4), math.sin(3), math.sin(3e-4)]
    torch.testing.assert_close(sinusoids(torch.tensor([3.0]), 4, endpoint=True)[0],
                               torch.tensor(want))


@pytest.mark.parametrize("kind", SMALL)
def test_embedding_has_sin_first_in_song_and_cos_first_in_adm(kind):
    net, seen = small(kind, classes=0, augment_dim=0), []
    net.map_layer0.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    net(*batch()[:2])
    half, c = seen[0].shape[1] // 2, batch()[1][:, None]
    k = torch.arange(half)
    angle = dict(ddpmpp=c * 1e-4 ** (k / (half - 1)), adm=c * 1e-4 ** (k / half)).get(kind)
    angle = 2 * math.pi * c * net.map_noise.freqs if angle is None else angle
    first, second = (angle.cos(), angle.sin()) if kind == "adm" else (angle.sin(), angle.cos())
    torch.testing.assert_close(seen[0], torch.cat([first, second], 1), rtol=1e-4, atol=1e-5)


def test_fourier_features_have_scale_16_and_no_gradient():
    torch.manual_seed(0)
    layer = Fourier(20000)
    assert layer.freqs.std().item() == pytest.approx(16, rel=0.03) and not list(layer.parameters())


def test_group_norm_group_counts():
    for channels, groups in ((4, 1), (16, 4), (48, 12), (128, 32), (256, 32), (384, 32), (100, 25)):
        assert networks.GroupNorm(channels, 1e-6).num_groups == groups


# ---- Initialisation ------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", SMALL)
def test_at_the_start_the_denoiser_is_c_skip_x(kind):
    torch.manual_seed(0)
    net = Denoiser(UNet(8, 3, **SMALL[kind]), EDM().precondition)
    x, sigma = batch()[0], torch.tensor([0.01, 0.3, 1.0, 20.0]).view(4, 1, 1, 1)
    c_skip, c_out, _, _ = EDM().precondition(sigma)
    F_x = ((net(x, sigma) - c_skip * x) / c_out).abs().max()
    assert F_x == 0 if kind == "adm" else F_x < 1e-3


def test_initial_weights_song():
    """Xavier uniform, +-g sqrt(6/(fan_in + fan_out)), g = 1e-5 in last layers, sqrt(.2) in qkv."""
    torch.manual_seed(0)
    p = dict(UNet(8, 3, **{**SMALL["ddpmpp"], "classes": 5, "augment_dim": 9}).named_parameters())
    for name, fan_in, fan_out, gain in (
            ("map_layer0", 16, 64, 1), ("map_label", 5, 16, 1), ("map_augment", 9, 16, 1),
            ("enc.8x8_conv", 27, 144, 1), ("enc.8x8_block0.conv0", 144, 288, 1),
            ("enc.8x8_block0.conv1", 288, 288, 1e-5), ("enc.8x8_block0.skip", 16, 32, 1),
            ("enc.4x4_block0.qkv", 32, 96, 0.2 ** 0.5), ("enc.4x4_block0.proj", 32, 32, 1e-5),
            ("dec.8x8_aux_conv", 288, 27, 1e-5), ("enc.8x8_block1.affine", 64, 32, 1)):
        bound = gain * (6 / (fan_in + fan_out)) ** 0.5
        assert 0.9 * bound < p[f"{name}.weight"].abs().max().item() <= bound * (1 + 1e-6), name
        assert f"{name}.bias" not in p or p[f"{name}.bias"].eq(0).all()
    assert p["enc.8x8_block0.norm0.weight"].eq(1).all()


def test_initial_weights_adm():
    """U(+-1/sqrt(fan_in)) for weights and biases, zero last layers, N(0, 1) for labels."""
    torch.manual_seed(0)
    p = dict(UNet(8, 3, **{**SMALL["adm"], "classes": 50, "augment_dim": 9}).named_parameters())
    for name, fan_in in (("map_layer0", 64), ("enc.8x8_block0.conv0", 576), ("enc.8x8_conv", 27),
                         ("enc.4x4_block0.qkv", 128), ("enc.8x8_block0.affine", 256)):
        for part in "weight", "bias":
            got = p[f"{name}.{part}"].abs().max().item()
            assert 0.9 * fan_in ** -0.5 < got <= fan_in ** -0.5 * (1 + 1e-6), name
    for name in ("enc.8x8_block0.conv1", "enc.4x4_block0.proj", "out_conv"):
        assert p[f"{name}.weight"].eq(0).all() and p[f"{name}.bias"].eq(0).all(), name
    assert p["map_augment.weight"].eq(0).all()
    assert p["map_label.weight"].std().item() == pytest.approx(1, abs=0.03)


# ---- Denoiser ------------------------------------------------------------------------------------

class Recorder(torch.nn.Module):
    """F(x, c_noise) = tanh(x) + c_noise, remembering what it was given."""

    def forward(self, x, c_noise, labels=None, augment_labels=None):
        self.seen = x, c_noise, labels, augment_labels
        return x.tanh() + c_noise.view(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("row", SCHEDULES)
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_denoiser_is_edm_eq_7_for_every_schedule(row, shape):
    """D = c_skip x + c_out F(c_in x; c_noise)."""
    schedule, model = SCHEDULES[row](), Recorder()
    x = 2 * torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.05, 0.5, 2.0, 30.0]).view(4, *[1] * len(shape))
    c_skip, c_out, c_in, c_noise = schedule.precondition(sigma)
    got = Denoiser(model, schedule.precondition)(x, sigma, "labels", "augmentation")
    assert torch.equal(model.seen[0], c_in * x) and torch.equal(model.seen[1], c_noise.view(4))
    assert model.seen[2:] == ("labels", "augmentation")
    torch.testing.assert_close(got, c_skip * x + c_out * ((c_in * x).tanh() + c_noise))


@pytest.mark.parametrize("row", SCHEDULES)
def test_denoiser_takes_sigma_0_d_or_one_per_sample(row):
    net = Denoiser(Recorder(), SCHEDULES[row]().precondition)
    for shape in ((2,), (3, 4, 4)):
        x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        want = net(x, torch.full((3, *[1] * len(shape)), 0.7))
        for sigma in (0.7, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)):
            assert torch.equal(net(x, sigma), want)
            assert net.model.seen[1].shape == (3,)


def test_denoiser_under_bf16_autocast_preconditions_in_float32():
    x = batch()[0]
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0]).view(4, 1, 1, 1)
    net = Denoiser(Recorder(), EDM().precondition)
    want = net(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x, sigma)
        assert net.model.seen[0].dtype == torch.float32
    assert got.dtype == torch.float32 and torch.equal(got, want)
    rounded = Denoiser(lambda x, *_: x.bfloat16(), EDM().precondition)
    c_skip, c_out, c_in, _ = EDM().precondition(sigma)
    assert torch.equal(rounded(x, sigma), c_skip * x + c_out * (c_in * x).bfloat16().float())


@pytest.mark.parametrize("kind", SMALL)
def test_unet_under_bf16_autocast_is_near_its_float32_self(kind):
    net = Denoiser(small(kind), EDM().precondition)
    x, sigma = batch()[0], torch.tensor([0.002, 0.3, 1.0, 80.0]).view(4, 1, 1, 1)
    want = net(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x, sigma)
    c_out = EDM().precondition(sigma)[1]
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    F_error, F_size = (got - want) / c_out, (want - EDM().precondition(sigma)[0] * x) / c_out
    assert F_error.norm() < 0.05 * F_size.norm()


def test_denoiser_gives_float32_for_bf16_and_float64_for_float64():
    x, sigma = batch()[0], torch.tensor(0.5)
    net = Denoiser(small("ddpmpp"), EDM().precondition)
    assert net(x.bfloat16(), sigma).dtype == torch.float32
    torch.testing.assert_close(net(x.bfloat16(), sigma), net(x.bfloat16().float(), sigma))
    for kind in SMALL:
        net = Denoiser(small(kind), EDM().precondition)
        want = net(x, sigma, torch.arange(4))
        got = net.double()(x.double(), sigma.double(), torch.arange(4))
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SMALL)
def test_a_sample_does_not_depend_on_its_batch_mates(kind):
    net, (x, c_noise, labels, augment) = small(kind), batch()
    torch.testing.assert_close(net(x, c_noise, labels, augment)[1:2],
                               net(x[1:2], c_noise[1:2], labels[1:2], augment[1:2]),
                               rtol=1e-4, atol=1e-5)


# ---- Labels, dropout -----------------------------------------------------------------------------

def mlp(dim=2, classes=5, **options):
    torch.manual_seed(0)
    net = MLP(dim, width=16, classes=classes, **options)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.mark.parametrize("kind", [*SMALL, "mlp"])
def test_labels_none_and_minus_1_are_no_class_and_classes_matter(kind):
    net, (x, c_noise, labels, augment) = mlp() if kind == "mlp" else small(kind), batch()
    x = x[:, :2, 0, 0] if kind == "mlp" else x
    none = net(x, c_noise)
    assert torch.equal(net(x, c_noise, torch.full((4,), -1)), none)
    classes = [net(x, c_noise, torch.full((4,), i)) for i in range(5)] + [none]
    for i in range(6):
        for j in range(i):
            assert (classes[i] - classes[j]).flatten(1).norm(dim=1).min() > 1e-3
    mixed = net(x, c_noise, torch.tensor([2, -1, 0, 4]))
    want = torch.stack([classes[2][0], none[1], classes[0][2], classes[4][3]])
    torch.testing.assert_close(mixed, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_augment_labels_matter_and_none_is_zero(kind):
    net, (x, c_noise, labels, augment) = small(kind), batch()
    none = net(x, c_noise, labels)
    torch.testing.assert_close(net(x, c_noise, labels, torch.zeros(4, 9)), none)
    assert (net(x, c_noise, labels, augment) - none).flatten(1).norm(dim=1).min() > 1e-3
    plain = small(kind, augment_dim=0)                    # a network without the layer ignores them
    assert torch.equal(plain(x, c_noise, labels, augment), plain(x, c_noise, labels))


@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_label_dropout_drops_its_share_in_training_only(kind):
    net = small(kind, label_dropout=0.3)
    B = 4000
    c_noise, labels = torch.zeros(B), torch.full((B,), 2)
    with_label = net.embed(c_noise[:1], labels[:1], None)
    without = net.embed(c_noise[:1], None, None)
    assert torch.equal(net.embed(c_noise, labels, None), net.embed(c_noise, labels, None))
    torch.testing.assert_close(net.embed(c_noise, labels, None), with_label.expand(B, -1))
    torch.manual_seed(1)
    got = net.train().embed(c_noise, labels, None)
    dropped = (got - without).abs().amax(1) < 1e-4
    kept = (got - with_label).abs().amax(1) < 1e-4
    assert (dropped ^ kept).all()
    assert abs(dropped.double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / B) ** 0.5


@pytest.mark.parametrize("kind", SMALL)
def test_dropout_acts_in_training_only(kind):
    args = batch()
    net, without = small(kind, dropout=0.5), small(kind)
    assert torch.equal(net(*args), without(*args))
    net.train(), torch.manual_seed(1)
    one, other = net(*args), net(*args)
    assert not torch.allclose(one, other) and not torch.allclose(one, without(*args))
    torch.manual_seed(1)
    assert torch.equal(net(*args), one)
    assert torch.equal(without.train()(*args), without.eval()(*args))


# ---- Sizes, gradients ----------------------------------------------------------------------------

def test_a_size_that_does_not_divide_is_one_sentence():
    with pytest.raises(ValueError, match="^3 levels need a size divisible by 4, not 30$"):
        UNet(30, 3, mult=(1, 2, 2))
    with torch.device("meta"):
        UNet(30, 3, width=16, mult=(1, 2), blocks=1)


def test_gray_28x28_images_and_the_preset_of_the_default_run():
    net = small("ddpmpp", size=28, channels=1)
    x, c_noise, labels, augment = batch(2, 28, 1)
    assert net(x, c_noise, labels, augment).shape == (2, 1, 28, 28)
    net = UNet(16, 3, **UNETS["unet"])
    assert net(*batch(2, 16)[:2]).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("dim", [2, 64])
@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("given", [{}, {"activation": torch.tanh}])
def test_mlp_is_its_formula(dim, classes, given):
    net, activation = mlp(dim, classes, depth=2, **given), given.get("activation", F.silu)
    x, c_noise, labels = torch.randn(6, dim), torch.linspace(-2, 1, 6), torch.arange(6) % 5
    h = torch.cat([x, sinusoids(c_noise, 16), F.one_hot(labels, 5)[:, :classes].float()], 1)
    for i in range(2):
        h = activation(h @ net.hidden[i].weight.T + net.hidden[i].bias)
    want = h @ net.out.weight.T + net.out.bias
    torch.testing.assert_close(net(x, c_noise, labels), want, rtol=1e-4, atol=1e-4)
    assert MLP(dim, classes=classes)(x, c_noise, labels).eq(0).all()                # at the start


@pytest.mark.parametrize("kind", [*SMALL, "mlp"])
def test_gradients_reach_every_parameter(kind):
    net, (x, c_noise, labels, augment) = mlp() if kind == "mlp" else small(kind), batch()
    x = x[:, :2, 0, 0] if kind == "mlp" else x
    (net(x, c_noise, labels, augment) ** 2).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
