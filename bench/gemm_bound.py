"""The time of an expert layer's matrix products alone: the bound of a layer's step."""

import threading
from collections.abc import Iterator

import torch
from timing import clock
from torch import Tensor


def gemm_bound(load: list[int], up: Tensor, down: Tensor) -> Iterator[float]:
    """Time the six products of each expert, into outputs that are made once.

    With two threads it takes the faster of two ways: both threads inside each product, or one
    thread for each half of the experts.

    load: rows of each expert. up: [E, 2F, H]. down: [E, H, F].
    """
    up, down = up.detach(), down.detach()
    (E, hidden, ffn), dtype = down.shape, up.dtype

    def matrices(width: int) -> list[Tensor]:
        return list(torch.randn(sum(load), width).to(dtype).split(load))

    rows, grad_inner, active = matrices(hidden), matrices(2 * ffn), matrices(ffn)
    out, inner, grad_active = matrices(hidden), matrices(2 * ffn), matrices(ffn)
    grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)

    def products(experts: range) -> None:
        for e in experts:
            torch.mm(rows[e], up[e].t(), out=inner[e])
            torch.mm(active[e], down[e].t(), out=out[e])
            torch.mm(rows[e], down[e], out=grad_active[e])
            torch.mm(rows[e].t(), active[e], out=grad_down[e])
            torch.mm(grad_inner[e], up[e], out=out[e])
            torch.mm(grad_inner[e].t(), rows[e], out=grad_up[e])

    def halves() -> None:
        def work(experts: range) -> None:
            torch.set_num_threads(1)
            products(experts)

        helper = threading.Thread(target=work, args=(range(0, E, 2),))
        helper.start()
        work(range(1, E, 2))
        helper.join()

    threads = torch.get_num_threads()
    for taken in clock(products, [(range(E),)]):
        if threads == 2:
            taken = min(taken, next(clock(halves, [()])))
            torch.set_num_threads(threads)
        yield taken
