"""Two gloo ranks on this machine, for tests that compare them with one process."""

import copy
import datetime
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dr2net_d2.core import Dr2NetViT
from tests.core.stacks import tokens

RANKS = 2


def forward(model, x):
    out = model(x)
    return out["last_feat"] if isinstance(out, dict) else out


def loss_on(model, x):
    """A mean, so that the average over the ranks is the loss on the joint batch."""
    return forward(model, x).float().sin().square().mean()


def gradients(model):
    model = getattr(model, "module", model)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batch(x):
    """This rank's half."""
    return x.chunk(RANKS)[dist.get_rank()]


def one_process(model, x, backwards=1):
    model = copy.deepcopy(model)
    model.reversible = False
    for part in x.chunk(backwards):
        loss_on(model, part).backward()
    return gradients(model)


def vit():
    torch.manual_seed(0)
    vit = Dr2NetViT(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=4, pretrain_img_size=32,
        use_rel_pos=True,
    )  # fmt: skip
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    vit.coefficients.set(0.5, 0.5)
    return vit


def input_of(model):
    return tokens(4, 3, 64, 64) if hasattr(model, "blocks") else tokens(4, 5, 8)


def uneven():
    return torch.cat([tokens(2, 5, 8), 40 * tokens(2, 5, 8)])


def work(rank, folder, scenarios):
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {name: scenario() for name, scenario in scenarios.items()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(folder, scenarios):
    """What each of the scenarios returns, a dict for each rank."""
    mp.spawn(work, (folder, scenarios), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
