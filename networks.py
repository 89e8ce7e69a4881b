"""networks.py: what denoises.  Raw networks F(x, c_noise, labels), and the denoiser D around them.

    Denoiser   D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), for any schedule
    MLP        points (B, d)
    UNet       images (B, C, H, W): the small one of train.py's default run, and DDPM++, NCSN++, ADM
               as improved and published with EDM (Karras et al. 2022, its code's "SongUNet" and
               "DhariwalUNet").  Parameter names and shapes are those of the published
               networks: Denoiser(UNet(...)).load_state_dict accepts their exported weights.
    Inception  features of images, for FID, and class logits

labels (B,) int64, -1 for "no class"; augment_labels (B, augment_dim) or None for "not augmented".
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


# ---- Denoiser ------------------------------------------------------------------------------------

class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)   (EDM eq. 7).  Needs: nothing.

    model: the raw network F(x, c_noise (B,), labels, augment_labels) -> like x.
    precondition: a function sigma -> (c_skip, c_out, c_in, c_noise), e.g. a schedule's.
    amp: torch.bfloat16 or torch.float16 to run F under autocast; the arithmetic around F is
    float32, or float64 where x is, whatever autocast does.

    x (B, ...), sigma 0-d or (B, 1, ..., 1) -> (B, ...).  There may be n < B labels: they are
    repeated B/n times, for losses that call D on several copies of their n samples.

    A model with a second head gives twice the channels; head=True returns D and the second half,
    unscaled, for the covariances of SN-DPM and NPR-DPM.
    """

    def __init__(self, model, precondition, amp=None):
        super().__init__()
        self.model, self.precondition, self.amp = model, precondition, amp

    def forward(self, x, sigma, labels=None, augment_labels=None, head=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sigma = torch.as_tensor(sigma).to(x, non_blocking=True)
        sigma = sigma.expand(len(x)).view(-1, *[1] * (x.ndim - 1)) if sigma.ndim == 0 else sigma
        if labels is not None:
            labels = labels.repeat(len(x) // len(labels))
        if augment_labels is not None:
            augment_labels = augment_labels.repeat(len(x) // len(augment_labels), 1)
        c_skip, c_out, c_in, c_noise = self.precondition(sigma)             # each (B, 1, ..., 1)
        given = c_in * x, c_noise.flatten(), labels, augment_labels
        if self.amp is None:
            F_x = self.model(*given)
        else:
            with torch.autocast(x.device.type, self.amp):
                F_x = self.model(*given)
        F_x, *second = F_x.to(x.dtype).split(x.shape[1], dim=1)
        D = c_skip * x + c_out * F_x
        return (D, *second) if head else D


def target_coefficients(target, sigma):
    """c_skip, c_out that make the raw network predict `target` (each line solved for D).

        eps  D = x - sigma eps          v   D = (x - sigma sqrt(1 + sigma^2) v)/(1 + sigma^2)
        x0   D = x0

    v = alpha eps - alpha sigma x0 with alpha = 1/sqrt(1 + sigma^2).  EDM's own target is that of
    its schedule.  sigma of any shape -> two like it.  ValueError: another name.  Needs: nothing.
    """
    if target == "eps":
        return torch.ones_like(sigma), -sigma
    if target == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    if target == "v":
        return 1 / (1 + sigma ** 2), -sigma / (1 + sigma ** 2).sqrt()
    raise ValueError(f"target {target!r} is none of eps, x0, v")


# ---- Layers --------------------------------------------------------------------------------------

def sinusoids(c_noise, channels, endpoint=False):
    """[cos(c f_k), sin(c f_k)], f_k = 10000^(-k/K) for k < K = channels/2.  (B,) -> (B, channels).

    endpoint: divide by K - 1, so that the slowest frequency is 1/10000 itself.  Needs: nothing.
    """
    K = channels // 2
    k = torch.arange(K, dtype=torch.float32, device=c_noise.device)
    angle = c_noise[:, None] * 10000.0 ** (-k / (K - endpoint))             # (B, K)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def one_hot(labels, classes, like):
    """(B,) int -> (B, classes), a row of zeros for labels outside 0..classes-1.  Needs: nothing."""
    labels = torch.full((len(like),), -1, device=like.device) if labels is None else labels
    return (labels[:, None] == torch.arange(classes, device=like.device)).to(like.dtype)


class Fourier(nn.Module):
    """[cos(2 pi c f_k), sin(2 pi c f_k)], f_k ~ N(0, 16^2): (B,) -> (B, C).  Needs: nothing."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, c_noise):
        angle = 2 * math.pi * c_noise[:, None] * self.freqs
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class GroupNorm(nn.GroupNorm):
    """min(32, C/4) groups, or the next smaller number that divides C.  Needs: nothing."""

    def __init__(self, channels, eps):
        groups = next(g for g in range(min(32, max(channels // 4, 1)), 0, -1) if channels % g == 0)
        super().__init__(groups, channels, eps)


class Conv(nn.Module):
    """Convolution with optional 2x resampling by a separable FIR filter ([1,1] or [1,3,3,1]).

    kernel 0 resamples only.  Resampling comes before the convolution.  With `fused` (NCSN++'s input
    residual) the convolution, at full resolution, comes first.  Needs: nothing.
    """

    def __init__(self, cin, cout, kernel, up=False, down=False, fir=(1, 1), fused=False):
        super().__init__()
        self.up, self.down, self.fused = up, down, fused
        self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(cout)) if kernel else None
        if up or down:
            f = torch.tensor(fir, dtype=torch.float32)
            self.register_buffer("resample_filter", f.outer(f)[None, None] / f.sum() ** 2)

    def forward(self, x):
        w_pad = self.weight.shape[-1] // 2 if self.weight is not None else 0
        if self.up or self.down:
            f, f_pad = self.resample_filter.to(x.dtype), (self.resample_filter.shape[-1] - 1) // 2
        if self.fused:
            x = F.conv2d(x, self.weight, self.bias, padding=w_pad + f_pad)
            return F.conv2d(x, f.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])
        if self.up:
            f = (4 * f).expand(x.shape[1], -1, -1, -1)
            x = F.conv_transpose2d(x, f, stride=2, padding=f_pad, groups=x.shape[1])
        if self.down:
            f = f.expand(x.shape[1], -1, -1, -1)
            x = F.conv2d(x, f, stride=2, padding=f_pad, groups=x.shape[1])
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=w_pad)


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, embedding, norm, SiLU, dropout, conv, skip; attention.

    adm False (DDPM++, NCSN++): the embedding is added, sums are scaled by sqrt(1/2), one head.
    adm True: the embedding scales and shifts after norm1, sums are plain, heads of 64 channels.
    Needs: GroupNorm, Conv.
    """

    def __init__(self, cin, cout, emb, up=False, down=False, attention=False, dropout=0.0,
                 fir=(1, 1), adm=False):
        super().__init__()
        eps = 1e-5 if adm else 1e-6
        self.cin, self.cout, self.dropout, self.adm = cin, cout, dropout, adm
        self.scale = 1.0 if adm else math.sqrt(0.5)
        self.heads = 0
        if attention:
            self.heads = max(cout // 64, 1) if adm else 1
        self.norm0 = GroupNorm(cin, eps)
        self.conv0 = Conv(cin, cout, 3, up, down, fir)
        self.affine = nn.Linear(emb, 2 * cout if adm else cout)
        self.norm1 = GroupNorm(cout, eps)
        self.conv1 = Conv(cout, cout, 3)
        self.skip = None
        if cin != cout or up or down:
            self.skip = Conv(cin, cout, 0 if adm and cin == cout else 1, up, down, fir)
        if self.heads:
            self.norm2 = GroupNorm(cout, eps)
            self.qkv = Conv(cout, 3 * cout, 1)
            self.proj = Conv(cout, cout, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = e.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + e))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))).mul_(self.scale)
        return (x + self.attend(x)).mul_(self.scale) if self.heads else x

    def attend(self, x):
        """Softmax attention over the pixels.  The published layout interleaves q, k, v channels."""
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(B, self.heads, C // self.heads, 3, H * W)
        qkv = qkv.permute(3, 0, 1, 4, 2).contiguous()                # (3, B, heads, HW, C/heads)
        a = F.scaled_dot_product_attention(*qkv)                        # (B, heads, HW, C/heads)
        return self.proj(a.transpose(2, 3).reshape(B, C, H, W))


# ---- Networks ------------------------------------------------------------------------------------

class MLP(nn.Module):
    """For points (B, d): `depth` hidden layers on x, an embedding of c_noise, and the label.

    head: d more outputs, see Denoiser.  Needs: sinusoids, one_hot.
    """

    def __init__(self, dim, width=128, depth=3, classes=0, head=False, activation=F.silu):
        super().__init__()
        self.width, self.classes, self.activation = width, classes, activation
        sizes = [dim + width + classes] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))
        self.head = nn.Linear(width, dim) if head else None
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, c_noise, labels=None, augment_labels=None):
        noise, label = sinusoids(c_noise, self.width).to(x), one_hot(labels, self.classes, x)
        h = torch.cat([x, noise, label], dim=1)                         # (B, d + width + classes)
        for layer in self.hidden:
            h = self.activation(layer(h))
        out = self.out(h)
        return out if self.head is None else torch.cat([out, self.head(h.detach())], dim=1)


class UNet(nn.Module):
    """DDPM++, NCSN++ and ADM with EDM's improvements, and anything smaller: see UNETS below.

    size     side of the (square) images, halved at each level; ValueError if it is odd before that
    channels of the images, in and out
    width    channels at the first level, times mult[level] at each
    blocks   per level of the encoder; the decoder has one more
    attend   resolutions with attention (in the encoder in every block but the down-sampling ones;
             in the decoder in each level's last `block`, ADM in every one); the decoder's very
             first block always attends
    dropout  of the activations within blocks
    augment_dim  length of the augmentation labels, 0 for none
    fir      resampling filter
    fourier  Fourier features of the noise level instead of sinusoids (NCSN++)
    residual the input, down-sampled and convolved, joins each lower level (NCSN++)
    adm      the ADM variant of blocks, embedding, output and initialisation
    classes, label_dropout   class labels, and the share of them dropped in training (guidance)
    head     a second output; no gradient goes from it to the features: see Denoiser

    Needs: Block, Conv, GroupNorm, Fourier, sinusoids, one_hot, initialise.
    """

    def __init__(self, size, channels, width=128, mult=(2, 2, 2), blocks=4, attend=(16,),
                 dropout=0.0, classes=0, label_dropout=0.0, augment_dim=0, fourier=False,
                 residual=False, fir=(1, 1), adm=False, head=False):
        super().__init__()
        if size % (1 << (len(mult) - 1)):
            raise ValueError(f"{len(mult)} levels need a size divisible by {1 << (len(mult) - 1)}, "
                             f"not {size}")
        self.classes, self.label_dropout, self.adm = classes, label_dropout, adm
        self.noise_channels, emb = width * (2 if fourier else 1), width * 4
        if fourier:
            self.map_noise = Fourier(self.noise_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, self.noise_channels, bias=False)
        self.map_layer0 = nn.Linear(self.noise_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        if classes:
            self.map_label = nn.Linear(classes, emb if adm else self.noise_channels, bias=not adm)

        self.head = Conv(width * mult[0], channels, 3) if head else None
        options = dict(emb=emb, dropout=dropout, fir=fir, adm=adm)
        self.enc, skips = self.encoder(size, channels, width, mult, blocks, attend, residual,
                                       options)
        self.dec = self.decoder(size, width, mult, blocks, attend, skips, options)
        if adm:
            self.out_norm = GroupNorm(width * mult[0], 1e-5)
            self.out_conv = Conv(width * mult[0], channels, 3)
        else:
            self.dec[f"{size}x{size}_aux_norm"] = GroupNorm(width * mult[0], 1e-6)
            self.dec[f"{size}x{size}_aux_conv"] = Conv(width * mult[0], channels, 3)
        initialise(self, adm)

    @staticmethod
    def encoder(size, channels, width, mult, blocks, attend, residual, options):
        """-> the encoder's layers by resolution, and the channels of each skip they leave."""
        cout, caux = width * mult[0] if options["adm"] else width, channels
        enc, skips = nn.ModuleDict({f"{size}x{size}_conv": Conv(channels, cout, 3)}), [cout]
        for level, m in enumerate(mult):
            res = size >> level
            if level > 0:
                enc[f"{res}x{res}_down"] = Block(cout, cout, down=True, **options)
                skips.append(cout)
                if residual:
                    enc[f"{res}x{res}_aux_residual"] = Conv(caux, cout, 3, down=True, fused=True,
                                                            fir=options["fir"])
                    caux = cout
            for i in range(blocks):
                cin, cout = cout, width * m
                attention = res in attend
                enc[f"{res}x{res}_block{i}"] = Block(cin, cout, attention=attention, **options)
                skips.append(cout)
        return enc, skips

    @staticmethod
    def decoder(size, width, mult, blocks, attend, skips, options):
        """-> the decoder's layers by resolution; it takes the encoder's skips, last one first."""
        dec, cout = nn.ModuleDict(), width * mult[-1]
        for level, m in reversed(list(enumerate(mult))):
            res = size >> level
            if level == len(mult) - 1:
                dec[f"{res}x{res}_in0"] = Block(cout, cout, attention=True, **options)
                dec[f"{res}x{res}_in1"] = Block(cout, cout, **options)
            else:
                dec[f"{res}x{res}_up"] = Block(cout, cout, up=True, **options)
            for i in range(blocks + 1):
                cin, cout = cout + skips.pop(), width * m
                attention = res in attend and (options["adm"] or i == blocks)
                dec[f"{res}x{res}_block{i}"] = Block(cin, cout, attention=attention, **options)
        return dec

    def embed(self, c_noise, labels, augment_labels):
        """c_noise, augmentation and class -> (B, 4 width)."""
        if hasattr(self, "map_noise"):
            e = self.map_noise(c_noise)
        else:
            e = sinusoids(c_noise, self.noise_channels, endpoint=not self.adm)
        if not self.adm:
            e = torch.cat(e.chunk(2, dim=1)[::-1], dim=1)          # published order: sin, then cos
        if hasattr(self, "map_augment") and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        if self.classes:
            label = one_hot(labels, self.classes, e)
            if self.training and self.label_dropout:
                label = label * (torch.rand_like(label[:, :1]) >= self.label_dropout)
            if not self.adm:
                e = e + self.map_label(label * math.sqrt(self.classes))
        e = self.map_layer1(F.silu(self.map_layer0(e)))
        if self.classes and self.adm:
            e = e + self.map_label(label)
        return F.silu(e)

    def forward(self, x, c_noise, labels=None, augment_labels=None):
        emb = self.embed(c_noise, labels, augment_labels)
        skips, aux = [], x
        for name, layer in self.enc.items():
            if "aux_residual" in name:
                x = aux = (x + layer(aux)) * math.sqrt(0.5)
                skips[-1] = x
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        for name, layer in self.dec.items():
            if isinstance(layer, Block):
                if layer.cin != x.shape[1]:
                    x = torch.cat([x, skips.pop()], 1)
                x = layer(x, emb)
            elif "norm" in name:
                features = F.silu(layer(x))
            else:
                x = layer(features)
        if self.adm:
            features = F.silu(self.out_norm(x))
            x = self.out_conv(features)
        return x if self.head is None else torch.cat([x, self.head(features.detach())], dim=1)


def initialise(net, adm):
    """EDM's initialisation: the last layer of every residual branch starts at (nearly) zero.

    DDPM++, NCSN++: Xavier uniform, times 1e-5 in last layers and sqrt(.2) in qkv, biases 0.
    ADM: U(+-1/sqrt(fan_in)) for weights and biases, 0 in last layers, N(0, 1) for labels.
    Needs: GroupNorm.
    """
    last = ("conv1", "proj", "aux_conv", "out_conv", "head") + (("map_augment",) if adm else ())
    for name, layer in net.named_modules():
        w, b = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if w is None or isinstance(layer, GroupNorm):
            continue
        fan_in, fan_out = w[0].numel(), w[:, 0].numel()
        if adm:
            bound = 0 if name.endswith(last) else fan_in ** -0.5
            nn.init.normal_(w) if name == "map_label" else nn.init.uniform_(w, -bound, bound)
        else:
            gain = 1e-5 if name.endswith(last) else math.sqrt(0.2) if name.endswith("qkv") else 1
            bound = gain * math.sqrt(6 / (fan_in + fan_out))
            nn.init.uniform_(w, -bound, bound)
        if b is not None:
            nn.init.uniform_(b, -bound, bound) if adm else nn.init.zeros_(b)


UNETS = dict(
    unet=dict(width=32, mult=(1, 2, 2), blocks=1, attend=(4,)),
    ddpmpp=dict(width=128, mult=(2, 2, 2), blocks=4, attend=(16,)),
    ncsnpp=dict(width=128, mult=(2, 2, 2), blocks=4, attend=(16,), fourier=True, residual=True,
                fir=(1, 3, 3, 1)),
    adm=dict(width=192, mult=(1, 2, 3, 4), blocks=3, attend=(32, 16, 8), adm=True),
)


# ---- Inception -----------------------------------------------------------------------------------

class ConvBN(nn.Module):
    """relu(BatchNorm(conv x)), the convolution without bias, "same" padding.  Needs: nothing."""

    def __init__(self, cin, cout, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)                        # TF's, not torch's 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, each a chain of ConvBN; their outputs' channels are concatenated.

    branches {name: steps}; a step is (channels, kernel), or at a fork (channels, kernel, kernel):
    two ConvBN on one input, concatenated.  Layers: name_1, name_2, ..., name_3a and name_3b at a
    fork, or just the name for a single step.  branch_pool pools 3x3 before its steps.
    stride 2: in pooling and in the last step of each branch, without padding.  Needs: ConvBN.
    """

    def __init__(self, cin, branches, pool="average", stride=1):
        super().__init__()
        self.pool, self.stride, self.paths, self.cout = pool, stride, {}, 0
        for branch, steps in branches.items():
            width, path = cin, self.paths.setdefault(branch, [])
            for i, (channels, *kernels) in enumerate(steps, 1):
                name = f"{branch}_{i}" if len(steps) > 1 else branch
                path.append([name + "a", name + "b"] if len(kernels) > 1 else [name])
                down = (2, 0) if stride == 2 and i == len(steps) else ()
                for layer, kernel in zip(path[-1], kernels):
                    self.add_module(layer, ConvBN(width, channels, kernel, *down))
                width = channels * len(kernels)
            self.cout += width

    def pooled(self, x):
        if self.pool == "max":
            return F.max_pool2d(x, 3, self.stride, padding=self.stride % 2)
        # TF divides by the pixels inside the image, 4 in a corner; torch, unasked, by 9 everywhere.
        return F.avg_pool2d(x, 3, self.stride, padding=1, count_include_pad=False)

    def forward(self, x):
        outputs = []
        for branch, path in self.paths.items():
            h = self.pooled(x) if branch == "branch_pool" else x
            for layers in path:
                h = torch.cat([getattr(self, layer)(h) for layer in layers], dim=1)
            outputs.append(h)
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """Inception-v3 of 2015 (Szegedy et al.) as FID takes it from TF, under the names and shapes of
    the public pt_inception-2015-12-05-6726825d.pth: load_state_dict accepts that file.

    images (B, 3, H, W), uint8 or float in 0..255 -> pool3 (B, 2048), logits (B, 1008).
    The quirks of TF's network are kept; resizing and scaling are pytorch-fid's.  It only measures:
    made in eval mode, its weights without gradients.  float32 whatever autocast does.
    Needs: ConvBN, Mixed.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, 1, 0)
        dbl, fork, row, column = [(64, 1), (96, 3), (96, 3)], (384, (1, 3), (3, 1)), (1, 7), (7, 1)
        blocks = {f"5{block}": dict(
            branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=dbl,
            branch_pool=[(pool, 1)]) for block, pool in zip("bcd", (32, 64, 64))}
        blocks["6a"] = dict(branch3x3=[(384, 3)], branch3x3dbl=dbl, branch_pool=[])
        blocks |= {f"6{block}": dict(
            branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
            branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)],
            branch_pool=[(192, 1)]) for block, c in zip("bcde", (128, 160, 160, 192))}
        blocks["7a"] = dict(
            branch3x3=[(192, 1), (320, 3)],
            branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3)], branch_pool=[])
        blocks |= {f"7{block}": dict(
            branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
            branch3x3dbl=[(448, 1), (384, 3), fork], branch_pool=[(192, 1)]) for block in "bc"}
        cin = 192
        for name, branches in blocks.items():
            pool = "max" if name in ("6a", "7a", "7c") else "average"   # 7c: TF's graph alone
            block = Mixed(cin, branches, pool, stride=2 if name in ("6a", "7a") else 1)
            self.add_module(f"Mixed_{name}", block)
            cin = block.cout
        self.fc = nn.Linear(cin, 1008)                  # 1000 classes and 8 that mean nothing
        self.eval().requires_grad_(False)

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            # Pixel centres aligned, not corners, and no antialiasing: large images do alias.
            x = F.interpolate(images.float() / 255, (299, 299), mode="bilinear",
                              align_corners=False, antialias=False)
            x = 2 * x - 1                                               # (B, 3, 299, 299)
            layers = dict(self.named_children())
            fc = layers.pop("fc")
            for name, layer in layers.items():
                if name in ("Conv2d_3b_1x1", "Mixed_5b"):               # (B, 64, 73, 73) and
                    x = F.max_pool2d(x, 3, 2)                           # (B, 192, 35, 35)
                x = layer(x)            # then 35 x 35, from 6a on 17 x 17, from 7a on 8 x 8
            pool3 = x.mean(dim=(2, 3))                                  # (B, 2048)
            return pool3, fc(pool3)
